"""What all figures share: style, saving, and marks. Matplotlib without a screen; same data, same bytes."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sdpipe.files import replacing

mpl.use("Agg")

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "text.parse_math": False,
}
"""For `matplotlib.rc_context` around each figure."""


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, cut to what is drawn, without a version or a time in it."""
    with replacing(path) as beside, warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; the tables beside the figures have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(beside, format="png", bbox_inches="tight", metadata={"Software": ""})


def mark_drops(axes: Any, *histories: Sequence[Mapping[str, float]]) -> None:
    """Dotted lines where the learning rate changes in all histories (on plateaus each has its own).

    A row's epoch is the end of what it tells of, so the change is at the last row of the old rate.
    """
    changes = [
        {
            before["epoch"]
            for before, after in pairwise(history)
            if after["learning_rate"] != before["learning_rate"]
        }
        for history in histories
    ]
    for epoch in sorted(set.intersection(*changes)):
        axes.axvline(epoch, color="grey", lw=0.8, ls=":")
