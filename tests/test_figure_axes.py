"""The axes of the report's figures: their ticks, and where they begin and end."""

from pathlib import Path

import pytest
from report_runs import write_run
from test_figures import apart, drawn


def test_ticks_of_figure_8_left_stand_apart_and_say_where_they_are(tmp_path: Path) -> None:
    """p_L 0.5, 0.51 and 0.52 are closer than their digits are wide; 1e-6 was labelled 0.0."""
    for p_L in (1e-6, 0.5, 0.51, 0.52):
        write_run(tmp_path / f"{p_L}", p_L=p_L)
    (axes,) = drawn(tmp_path, "Figure 8 left").axes
    labels = axes.get_xticklabels()
    assert len(apart(labels)) > 2
    shown = [float(label.get_text().replace("\N{MINUS SIGN}", "-")) for label in labels]
    assert shown == pytest.approx(list(axes.get_xticks()), abs=1e-9)
