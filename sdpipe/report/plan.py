"""What a planned figure is, and what is said of one that cannot be drawn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from sdpipe.colours import CONSTANT_COLOUR, compared_colours
from sdpipe.report.plots import Line, Sheet
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
    missing: str  # keys and values between backticks
    commands: tuple[str, ...]  # that make such runs


def caption(*sentences: str) -> str:
    """The sentences that are not empty."""
    return " ".join(filter(None, sentences))


def repeated_seeds(arms: Iterable[Arm]) -> str:
    """A sentence for a caption that speaks of seeds."""
    repeated = any(arm.repeats_a_seed for arm in arms)
    return "Of a training here a seed was run more than once." if repeated else ""


def arm_lines(setting: Setting, arms: Sequence[Arm]) -> list[Line]:
    """The curves of trainings, each in a colour of its own; constant depth always has the same."""
    colours = iter(compared_colours(len(arms)))
    return [
        line_of(arm, arm.name, CONSTANT_COLOUR if arm is setting.constant else next(colours)) for arm in arms
    ]


def line_of(arm: Arm, name: str, colour: str) -> Line:
    """The curves of one training."""
    return Line(
        name=name,
        colour=colour,
        histories=[run.history for run in arm.runs],
        best_epochs=[run.best_epoch for run in arm.runs],
    )
