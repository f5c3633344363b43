"""The picture of a family: test error against latency and against size."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from sdpipe.colours import compared_colours
from sdpipe.deploy.pruning.family import ParetoRow
from sdpipe.drawing import STYLE, save_png


def draw_pareto(path: Path, variants: Sequence[ParetoRow], batch_size: int, title: str) -> Figure:
    """One colour a run, filled for fp32 and hollow for int8, with the number of blocks that each file kept.

    The Pareto front is a grey staircase. Returns what was drawn.
    """
    runs = list(dict.fromkeys(one.run for one in variants))
    colours = dict(zip(runs, compared_colours(len(runs)), strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_panel(left, variants, colours, lambda one: one.latency_ms[batch_size])
        _draw_panel(right, variants, colours, lambda one: one.num_bytes / 1000)
        left.set(xlabel=f"milliseconds for a batch of {batch_size}", ylabel="test error (%)")
        right.set(xlabel="size of the file (kB)")
        figure.suptitle(f"{title} (numbers: blocks kept)")
        figure.legend(handles=_legend(variants, colours), loc="outside lower center", ncols=6, frameon=False)
        save_png(figure, path)
    return figure


def _draw_panel(
    axes: Any, variants: Sequence[ParetoRow], colours: Mapping[str, str], x_of: Callable[[ParetoRow], float]
) -> None:
    """colours: of each run."""
    for at, (run, colour) in enumerate(colours.items()):
        family = [one for one in variants if one.run == run]
        for is_int8 in (False, True):
            points = [one for one in family if _is_int8(one) == is_int8]
            xs, ys = [x_of(one) for one in points], [100 * one.test_error for one in points]
            axes.plot(
                xs, ys, "o-", color=colour, lw=0.8, ms=5.5, mfc="white" if is_int8 else colour, alpha=0.9
            )
            for one, x, y in zip(points, xs, ys, strict=True):
                is_above = at % 2 == 1  # of two runs, the labels of one stand below
                axes.annotate(
                    str(one.blocks),
                    (x, y),
                    xytext=(0, 6 if is_above else -6),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if is_above else "top",
                    color=colour,
                    fontsize=8,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )
    proved = [one for one in variants if one.parity is not False]
    front = sorted((x_of(one), 100 * one.test_error) for one in _front(proved, x_of))
    xs, ys = [x for x, _ in front], [y for _, y in front]
    axes.step(xs, ys, where="post", color="0.8", lw=3, zorder=0, solid_capstyle="round")
    axes.grid(alpha=0.25)
    axes.margins(0.05, 0.1)
    axes.set_xlim(left=0)


def _front(variants: Sequence[ParetoRow], x_of: Callable[[ParetoRow], float]) -> list[ParetoRow]:
    """Those that no other beats in error and x."""
    front: list[ParetoRow] = []
    for one in sorted(variants, key=lambda one: (x_of(one), one.test_error)):
        if not front or one.test_error < front[-1].test_error:
            front.append(one)
    return front


def _is_int8(one: ParetoRow) -> bool:
    return one.variant.endswith("int8")


def _legend(variants: Sequence[ParetoRow], colours: Mapping[str, str]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, marker="o", lw=0.8, label=run) for run, colour in colours.items()]
    if any(map(_is_int8, variants)):
        handles.append(Line2D([], [], color="0.3", marker="o", mfc="0.3", lw=0, label="fp32"))
        handles.append(Line2D([], [], color="0.3", marker="o", mfc="white", lw=0, label="int8"))
    handles.append(Line2D([], [], color="0.8", lw=3, label="Pareto front"))
    return handles
