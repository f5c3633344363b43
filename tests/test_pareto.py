"""What is in the picture of a family: its points, and the front that no file beats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from test_family import variant

from sdpipe.deploy.pruning.family import ParetoRow
from sdpipe.deploy.pruning.pareto import draw_pareto


def one(run: str, name: str, test: float, ms: float, kilobytes: int, blocks: int, **facts: Any) -> ParetoRow:
    """Its validation error, and its latency at another batch size, are far from what is to be drawn."""
    made = replace(variant(name, validation=0.9, test=test, ms=ms), run=run, blocks=blocks, **facts)
    return replace(made, latency_ms={1: 1000 / ms, 64: ms}, num_bytes=1000 * kilobytes)


FAMILY = [
    one("a", "fp32", 0.125, 8, 40, 9),
    one("a", "keep-5", 0.25, 4, 30, 5),
    one("a", "int8", 0.1875, 2, 10, 9),
    one("a", "keep-5.int8", 0.5, 1, 8, 5),
    one("b", "fp32", 0.375, 6, 20, 7),
    one("b", "int8", 0.0625, 0.5, 4, 7, parity=False),
]


def lines(axes: Axes) -> list[tuple[bool, list[tuple[float, float]]]]:
    """Whether its marks are filled, and the points of each line."""
    return [
        (line.get_markerfacecolor() != "white", [(float(x), float(y)) for x, y in line.get_xydata()])  # type: ignore[union-attr]
        for line in axes.lines
    ]


@pytest.mark.parametrize("panel", ["latency", "size"])
def test_points_and_front_are_those_of_the_test_errors(tmp_path: Path, panel: str) -> None:
    """By hand. In latency as in size int8 beats keep-5, and b's fp32; b's int8 would beat all, and failed."""
    figure = draw_pareto(tmp_path / "p.png", FAMILY, 64, "title")
    axes = figure.axes[panel == "size"]
    xs = [8, 4, 2, 1, 6, 0.5] if panel == "latency" else [40, 30, 10, 8, 20, 4]
    points = list(zip(xs, [12.5, 25, 18.75, 50, 37.5, 6.25], strict=True))
    *families, (_, front) = lines(axes)
    assert families == [(True, points[:2]), (False, points[2:4]), (True, points[4:5]), (False, points[5:])]
    assert front == [points[3], points[2], points[0]]
    assert axes.lines[-1].get_drawstyle() == "steps-post"
    assert [text.get_text() for text in axes.texts] == ["9", "5", "9", "5", "7", "7"]
    assert axes.get_xlabel() == {
        "latency": "milliseconds for a batch of 64", "size": "size of the file (kB)"
    }[panel]  # fmt: skip
    assert figure.axes[0].get_ylabel() == "test error (%)"


def test_the_legend_tells_filled_marks_from_hollow_ones(tmp_path: Path) -> None:
    """Runs by colour; without an int8 file there is nothing to tell."""
    for variants, kinds in ((FAMILY, ["fp32", "int8"]), ([FAMILY[0], FAMILY[4]], [])):
        (legend,) = draw_pareto(tmp_path / "p.png", variants, 64, "title").legends
        assert [text.get_text() for text in legend.get_texts()] == ["a", "b", *kinds, "Pareto front"]


def test_every_run_has_a_colour_of_its_own(tmp_path: Path) -> None:
    """Of nine the ninth looked like the first; a run's points in both panels are those of the legend."""
    runs = [replace(FAMILY[0], run=name) for name in "abcdefghi"]
    figure = draw_pareto(tmp_path / "p.png", runs, 64, "title")
    (legend,) = figure.legends
    *handles, front = [str(line.get_color()) for line in legend.get_lines()]
    assert len({*handles, front}) == 10
    for axes in figure.axes:
        lines_of_runs = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
        assert [str(line.get_color()) for line in lines_of_runs] == handles
