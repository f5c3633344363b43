"""What a planned figure is, and what is said of one that cannot be drawn."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from sdpipe.report.plots import COLOURS, Line, Sheet
from sdpipe.report.settings import Arm, Setting


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure for which the runs suffice."""

    number: str  # the paper's figure
    name: str  # of the PNG, without its ending
    title: str
    caption: str
    mark: str  # of runs that are of no recipe; "" for none
    draw: Callable[[Sheet], Figure]


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A figure for which they do not."""

    number: str
    title: str
    missing: str
    commands: tuple[str, ...]  # that make such runs


def caption(*sentences: str) -> str:
    """The sentences that are not empty."""
    return " ".join(filter(None, sentences))


def arm_line(at: int, setting: Setting, arm: Arm) -> Line:
    """The curves of one training; constant depth always has the first colour. at: among those shown."""
    colour = COLOURS[(at if setting.constant else at + 1) % len(COLOURS)]
    return line_of(arm, arm.name, colour)


def line_of(arm: Arm, name: str, colour: str) -> Line:
    """The curves of one training."""
    return Line(
        name=name,
        colour=colour,
        histories=[run.history for run in arm.runs],
        best_epochs=[run.best_epoch for run in arm.runs],
    )
