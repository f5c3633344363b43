"""`sdpipe report`: runs in, tables out, and read again."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import rows_of, two_seeds, write_ensemble, write_run

from sdpipe.errors import ModelError
from sdpipe.report.cells import read_table, write_table
from sdpipe.report.html_tables import duration
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import Spread
from sdpipe.report.tables import verdict
from sdpipe.report.write import write_report
from sdpipe.training.records import record_from_files
from sdpipe.training.weights import load_info, load_weights


def test_tables_hold_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    two_seeds(tmp_path / "models")
    assert write_report([tmp_path / "models"], tmp_path / "out") == []
    (row,) = rows_of(tmp_path / "out" / "table1.csv")
    assert (row["n_constant"], row["n_compared"]) == ("2", "2")
    # sd of 0.1 and 0.2: sqrt(2 * 0.05^2 / 1) = 0.0707107; of 0.30 and 0.32: sqrt(2 * 0.01^2) = 0.0141421
    expected = {"constant_error_mean": 0.15, "constant_error_sd": 0.0707107, "compared_error_mean": 0.31}
    expected |= {"compared_error_sd": 0.0141421, "difference": 0.16}
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, abs=1e-6), name
    assert row["verdict"] == "stochastic is worse"
    (row,) = rows_of(tmp_path / "out" / "table2.csv")
    # three validations each: 30 s and 33 s, mean 31.5, sd sqrt(2 * 1.5^2) = 2.12132; 1 - 24 / 31.5 = 0.238095
    expected = {
        "constant_s_mean": 31.5,
        "constant_s_sd": 2.12132,
        "compared_s_mean": 24,
        "saving": 0.238095,
    }
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, abs=1e-5), name
    assert "warning" not in row


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "c", p_L=1.0, test_error=0.2)
    write_run(tmp_path / "models" / "s", p_L=0.5, test_error=0.1)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert "constant_error_sd" not in row
    assert "compared_error_sd" not in row
    assert row["verdict"] == "stochastic is better; one run tells no spread"


@pytest.mark.parametrize("sds", [(0.02, 0.001), (0.001, 0.02)])
def test_a_difference_is_held_to_the_larger_spread(sds: tuple[float, float]) -> None:
    """Of constant depth or of what is compared with it."""
    constant, compared = (Spread(mean=mean, sd=sd, n=5) for mean, sd in zip((0.1, 0.09), sds, strict=True))
    assert verdict(constant, compared, "stochastic") == "stochastic is better, by less than the spread"
    assert verdict(constant, replace(compared, mean=0.07), "stochastic") == "stochastic is better"


def test_equal_errors_are_equal_whatever_their_number(tmp_path: Path) -> None:
    """Three times 0.1 have the mean 0.10000000000000002, twice 0.1 have 0.1: none is better for that."""
    for seed in range(3):
        write_run(tmp_path / "models" / f"c{seed}", p_L=1.0, test_error=0.1, seed=seed)
    for seed in range(2):
        write_run(tmp_path / "models" / f"s{seed}", p_L=0.5, test_error=0.1, seed=seed)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert (row["difference"], row["verdict"]) == (0, "equal")
    assert "+0.00" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_a_report_of_a_report_is_the_same(tmp_path: Path) -> None:
    """Every byte, also with an ensemble, validations within an epoch, and params that are mappings."""
    models = tmp_path / "models"
    two_seeds(models)
    write_ensemble(models / "s0", write_run(models / "s0", p_L=0.5, test_error=0.3))
    write_run(models / "svhn", p_L=0.5, validated_at=(0.5, 1, 1.5, 2), validation={"train": 4, "extra": 2})
    write_report([models], tmp_path / "one")
    write_report([tmp_path / "one"], tmp_path / "two")
    write_report([models, tmp_path / "two"], tmp_path / "mixed")  # each fingerprint counts once
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for other in ("two", "mixed"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == first, other
    assert {"index.html", "runs.csv", "history.csv", "ensemble.csv", "table1.csv", "table2.csv"} <= set(first)


def test_runs_csv_has_the_facts_and_all_params_flat(tmp_path: Path) -> None:
    fingerprint = write_run(tmp_path / "models" / "s", p_L=0.5, weight_decay=1e-4)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "runs.csv")
    expected = {"run": "s", "fingerprint": fingerprint, "test_error": "0.1", "validation_error": "0.25"}
    expected |= {"num_train": "9000", "expected_depth": "2.0", "train_s": "30.0", "warmup.epochs": "0"}
    expected |= {
        "hardware": "a machine, 2 cores",
        "recipe": "",
        "full_size": "false",
        "weight_decay": "0.0001",
    }
    assert {name: row[name] for name in expected} == expected


def test_validations_within_an_epoch_keep_their_places(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "s", validated_at=(0.25, 0.5, 0.75, 1))
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "history.csv")
    assert [row["epoch"] for row in rows] == ["0.25", "0.5", "0.75", "1"]
    assert {row["epoch_s"] for row in rows} == {"10"}
    assert rows_of(tmp_path / "out" / "runs.csv")[0]["best_epoch"] == "0.5"


def test_rows_of_an_earlier_training_in_ensemble_csv_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "s"
    write_ensemble(folder, write_run(folder))
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "ensemble.csv")
    assert [(row["run"], row["members"]) for row in rows] == [("s", "1"), ("s", "4")] * 2
    assert all(float(row["ensemble_error"]) < 0.5 for row in rows)


def test_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    prints = [write_run(tmp_path / name / "run", seed=seed) for seed, name in enumerate(("a", "b"))]
    runs, _ = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "run"])
    assert sorted(run.run for run in runs) == sorted(f"run~{found[:8]}" for found in prints)


def test_a_run_of_another_ones_training_is_said_and_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row was missing without a word. A report's row of it, also with a hash behind, is none."""
    write_run(tmp_path / "models" / "batch")
    shutil.copytree(tmp_path / "models" / "batch", tmp_path / "models" / "stochastic")
    assert write_report([tmp_path / "models"], tmp_path / "out") == []
    assert [row["run"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["batch"]
    line = "stochastic: the same training as batch"
    assert capsys.readouterr().err == f"note: {line}\n"
    assert f"<li>{line}</li>" in (tmp_path / "out" / "index.html").read_text()
    write_run(tmp_path / "other" / "batch", seed=1)
    write_report([tmp_path / "out", tmp_path / "other"], tmp_path / "both")
    write_report([tmp_path / "both", tmp_path / "out", tmp_path / "other"], tmp_path / "again")
    assert {row["run"].partition("~")[0] for row in rows_of(tmp_path / "again" / "runs.csv")} == {"batch"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "value",
    ["", "text", "1", "12e3", "true", "null", '"', "a,b\n'c'", "NaN", 1, 1.0, 1e-4, True, None, [1, 2.5]],
)
def test_cells_read_back_as_they_were(tmp_path: Path, value: Any) -> None:
    """A fingerprint of digits stays text, 1.0 a float and 1 a whole number."""
    write_table(tmp_path / "t.csv", [{"a": value, "b": 0}, {"b": 0}])
    first, second = read_table(tmp_path / "t.csv")
    assert (first["a"], type(first["a"])) == (value, type(value))
    assert "a" not in second


@pytest.mark.slow
@pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "-cmd", "\t=1+1"])
def test_no_name_is_a_formula_to_a_spreadsheet(tmp_path: Path, name: str) -> None:
    """In quotes of its own it is none, and reads back as it was."""
    write_run(tmp_path / "models" / name)
    write_report([tmp_path / "models"], tmp_path / "out")
    for table in ("runs", "history"):
        row = rows_of(tmp_path / "out" / f"{table}.csv")[0]
        assert row["run"].startswith('"'), table
    write_report([tmp_path / "out"], tmp_path / "again")
    assert read_table(tmp_path / "again" / "runs.csv")[0]["run"] == name


def test_not_a_number_reads_back(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": math.nan}])
    assert math.isnan(read_table(tmp_path / "t.csv")[0]["a"])


def test_load_info_is_what_load_weights_reads(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "weights.safetensors"
    assert load_info(path) == load_weights(path).info
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a readable weights file"):
        load_info(path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (845, "14 min 05 s"),
        (3599.7, "1 h 00 min"),
        (74520, "20 h 42 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("folder", [".", "../run", "./"])
def test_a_run_has_the_name_of_its_folder_from_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """In the report and, by the record of it, in MLflow."""
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    ((run,), _) = read_runs([Path(folder)])
    assert (run.run, record_from_files(Path(folder)).name) == ("run", "run")
