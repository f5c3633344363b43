"""What all figures share."""

from itertools import pairwise
from pathlib import Path

import pytest

from sdpipe.drawing import ticks_apart
from sdpipe.report.plots import Sheet, draw_p_L
from sdpipe.report.settings import Spread

TWENTIETHS = [at / 20 for at in range(1, 20)]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.8, 0.5, 0.8], [0.5, 0.8]),
        ([0.1, 0.5, 0.51, 0.52], [0.1, 0.5]),
        (TWENTIETHS, TWENTIETHS),
        ([at / 60 for at in range(1, 61)], [at / 60 for at in range(1, 61, 3)]),
    ],
)
def test_ticks_are_a_twentieth_apart(values: list[float], ticks: list[float]) -> None:
    assert ticks_apart(values) == ticks


@pytest.mark.parametrize(("p_Ls", "close"), [(TWENTIETHS, (0.51, 0.515)), ((1e-6, 0.5, 1.0), ())])
def test_labels_of_p_L_do_not_touch(tmp_path: Path, p_Ls: list[float], close: tuple[float, ...]) -> None:
    """In steps of 0.05 all have one, and of close ones the first; a tiny one is not 0."""
    points = {p_L: Spread(mean=0.1, sd=None, n=1) for p_L in (*p_Ls, *close)}
    figure = draw_p_L(Sheet(path=tmp_path / "p.png", title="title", mark=""), {"linear decay": points}, None)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [f"{p_L:g}" for p_L in p_Ls]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(left.overlaps(right) for left, right in pairwise(boxes))
