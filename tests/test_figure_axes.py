"""The axes of the report's figures: their ticks, and where they begin and end."""

from itertools import product
from pathlib import Path

import pytest
from report_runs import write_run
from test_figures import apart, drawn
from test_report_page import write_draws


def test_ticks_of_figure_8_left_stand_apart_and_say_where_they_are(tmp_path: Path) -> None:
    """p_L 0.5, 0.51 and 0.52 are closer than their digits are wide; 1e-6 was labelled 0.0."""
    for p_L in (1e-6, 0.5, 0.51, 0.52):
        write_run(tmp_path / f"{p_L}", p_L=p_L)
    (axes,) = drawn(tmp_path, "Figure 8 left").axes
    labels = axes.get_xticklabels()
    assert len(apart(labels)) > 2
    shown = [float(label.get_text().replace("\N{MINUS SIGN}", "-")) for label in labels]
    assert shown == pytest.approx(list(axes.get_xticks()), abs=1e-9)


@pytest.mark.parametrize("number", ["Figure 5", "Figure 8 left", "Figure 8 right", "Depths", "Ensemble"])
def test_no_axis_has_negative_errors_where_all_are_0(tmp_path: Path, number: str) -> None:
    """They went from -0.06 to 0.06 %; a heatmap's are those of its colours."""
    for depth, p_L in ((20, 0.5), (20, 0.8), (20, 1.0), (26, 0.5), (26, 1.0), (32, 1.0)):
        write_run(tmp_path / f"{depth}-{p_L}", depth=depth, p_L=p_L, test_error=0.0)
    fingerprint = write_run(tmp_path / "20-0.5", depth=20, p_L=0.5, test_error=0.0)
    write_draws(tmp_path / "20-0.5", fingerprint, (1, 4), error=0.0, seed=0)
    figure = drawn(tmp_path, number)
    (errors,) = [axes for axes in figure.axes if axes.get_ylabel() == "test error (%)"]
    assert errors.get_ylim() == (0, 1)


def test_an_error_bar_that_reaches_below_0_is_not_cut(tmp_path: Path) -> None:
    """Errors 0 and 10 %: mean 5, deviation sqrt(2 * 5^2 / 1) = 7.07."""
    for depth, p_L, seed in product((20, 26), (0.5, 1.0), (0, 1)):
        folder = tmp_path / f"{depth}-{p_L}-{seed}"
        write_run(folder, depth=depth, p_L=p_L, seed=seed, test_error=0.1 * seed)
    (axes,) = drawn(tmp_path, "Figure 5").axes
    assert axes.get_ylim()[0] < 5 - 7.07
