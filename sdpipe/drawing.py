"""What all figures share: style, saving, and marks. Matplotlib without a screen; same data, same bytes."""

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
    with replacing(path) as beside:
        figure.savefig(beside, format="png", bbox_inches="tight", metadata={"Software": ""})


def mark_drops(axes: Any, history: Sequence[Mapping[str, float]]) -> None:
    """Dotted lines at the first row of a history with another learning rate."""
    for before, after in pairwise(history):
        if after["learning_rate"] != before["learning_rate"]:
            axes.axvline(after["epoch"], color="grey", lw=0.8, ls=":")
