"""Training times that a report does not compare without a word."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from sdpipe.report.cells import read_table
from sdpipe.report.write import write_report


@pytest.mark.parametrize("machines", [("fast", "slow"), ("slow, then fast", "slow, then fast")])
def test_different_hardware_is_warned_of(tmp_path: Path, machines: tuple[str, str]) -> None:
    """Between the two trainings, or within each."""
    write_run(tmp_path / "models" / "c", p_L=1.0, hardware=machines[0])
    write_run(tmp_path / "models" / "s", p_L=0.5, hardware=machines[1])
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table2.csv")
    assert row["warning"] == "different hardware: the times do not compare"
    assert row["warning"] in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("unlike", [{"recompute": True}, {"compile": True}])
def test_a_training_computed_in_another_way_is_warned_of(tmp_path: Path, unlike: dict[str, Any]) -> None:
    """1202 layers at constant depth may need their blocks computed twice: a saving of another kind."""
    write_run(tmp_path / "models" / "c", p_L=1.0, **unlike)
    write_run(tmp_path / "models" / "s", p_L=0.5)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table2.csv")
    (key,) = unlike
    assert row["hardware"] == f"a machine, 2 cores; fp32 | a machine, 2 cores; fp32; {key}"
    assert row["warning"] == "different precision or options of computing: the times do not compare"
    write_run(tmp_path / "models" / "s", p_L=0.5, **unlike)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table2.csv")
    assert "warning" not in row
