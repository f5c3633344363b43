"""Drawing: numbers in, one PNG out. What belongs into which figure is decided in figures.py.

Each function returns the figure that it wrote.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator, NullLocator

from sdpipe.colours import COLOURS, CONSTANT_COLOUR, compared_colours
from sdpipe.drawing import STYLE, mark_drops, save_png
from sdpipe.report.runs import Numbers
from sdpipe.report.settings import Spread

_ROWS, _ROW = 3, 0.19  # of a legend for which a figure has the height, and of each one more, inches
_MARK_COLOUR = "#a3231f"
_WIDTH = 6.4  # inches, or more where the numbers of many columns need it
_BAR, _CELL = 0.45, 0.6  # inches for the number over a bar and for that in a heatmap, like 12.34 and ± 12.34


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Where a figure goes and what is written around it."""

    path: Path
    title: str
    mark: str  # of runs that are of no recipe; "" for none


@dataclass(frozen=True, kw_only=True)
class Line:
    """One training: the histories of its seeds, each with the epoch of lowest validation error."""

    name: str
    colour: str
    histories: Sequence[Sequence[Numbers]]
    best_epochs: Sequence[float]


@contextmanager
def _drawing(
    sheet: Sheet, height: float, rows: int = 1, columns: int = 1, width: float = 0, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Yield the figure and its axes in a grid; then write it with title and mark."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(_WIDTH, width), height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        for axes in figure.axes:
            if axes.get_ylim()[0] < 0 == axes.dataLim.ymax:  # all is 0, and the margins reach below
                axes.set_ylim(0, 1)
        figure.suptitle(textwrap.fill(sheet.title, 80), fontsize=10)
        if sheet.mark:
            _write_mark(figure, textwrap.fill(sheet.mark, 95))
        save_png(figure, sheet.path)


def _write_mark(figure: Figure, mark: str) -> None:
    """Over the legend, whose place the layout keeps free."""
    if not figure.legends:
        figure.legend([], [], loc="outside lower center", frameon=False)
    legend = figure.legends[0]
    legend.set_title(mark, prop=FontProperties(size=8))
    legend.get_title().set(color=_MARK_COLOUR, multialignment="center")


def _log_scale(axes: Any) -> None:
    """y logarithmic, with plain numbers at 1, 2 and 5 of each power of ten, or closer or wider apart."""
    if math.isinf(axes.dataLim.minposy):  # nothing over 0
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) < 3:
        shown = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    elif len(shown) > 9:
        shown = [10.0**power for power in powers if low <= 10.0**power <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, axes: Any, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    more = math.ceil(len(labels) / columns) - _ROWS
    figure.set_figheight(figure.get_figheight() + _ROW * max(0, more))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_curves(sheet: Sheet, lines: Sequence[Line]) -> Figure:
    """Validation error and training loss against epoch (paper, figures 3, 4 and 6)."""
    with _drawing(sheet, 5.6, rows=2, sharex=True, height_ratios=(3, 2)) as (figure, grid):
        errors, losses = grid[:, 0]
        for line in lines:
            _draw_line(errors, line, "validation_error", 100.0)
            _draw_line(losses, line, "train_loss", 1.0)
            points = [
                min(history, key=lambda row, best=best: abs(row["epoch"] - best))  # type: ignore[misc]
                for history, best in zip(line.histories, line.best_epochs, strict=True)
            ]
            errors.plot(
                [row["epoch"] for row in points],
                [100 * row["validation_error"] for row in points],
                "o",
                color=line.colour,
                markeredgecolor="white",
                markersize=6,
                clip_on=False,
                zorder=4,
                label=f"lowest, {line.name}",
            )
        errors.set(ylabel="validation error (%)")
        errors.set_ylim(bottom=0)
        losses.set(xlabel="epoch", ylabel="training loss")
        _log_scale(losses)
        for axes in (errors, losses):
            _mark_drops(axes, lines)
        losses.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _legend(figure, errors)
    return figure


def draw_gradient(sheet: Sheet, lines: Sequence[Line]) -> Figure:
    """Mean absolute gradient of block 1's first convolution against epoch (paper, figure 7)."""
    with _drawing(sheet, 3.8) as (figure, grid):
        axes = grid[0, 0]
        for line in lines:
            _draw_line(axes, _where_measured(line), "mean_abs_grad", 1.0)
        axes.set(xlabel="epoch", ylabel="mean absolute gradient")
        _log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _mark_drops(axes, lines)
        _legend(figure, axes)
    return figure


def _where_measured(line: Line) -> Line:
    """Without the rows of gradient 0: block 1 was active in none of their steps."""
    histories = [[row for row in history if row["mean_abs_grad"]] for history in line.histories]
    return replace(line, histories=histories)


def _mark_drops(axes: Any, lines: Sequence[Line]) -> None:
    mark_drops(axes, *(history for line in lines for history in line.histories))


def _draw_line(axes: Any, line: Line, column: str, scale: float) -> None:
    """Each seed thin, their mean bold over the epochs that all have."""
    by_epoch = [{row["epoch"]: scale * row[column] for row in history} for history in line.histories]
    for points in by_epoch:
        thin = {"lw": 0.7, "alpha": 0.5} if len(by_epoch) > 1 else {"lw": 1.5, "label": line.name}
        marker = "." if len(points) == 1 else ""  # a line of one point is none
        axes.plot(list(points), list(points.values()), color=line.colour, marker=marker, **thin)
    if len(by_epoch) > 1:
        shared = sorted(set.intersection(*map(set, by_epoch)))
        means = [float(np.mean([points[epoch] for points in by_epoch])) for epoch in shared]
        label = f"{line.name}, mean of {len(by_epoch)}"
        axes.plot(shared, means, color=line.colour, lw=1.9, label=label)


def draw_bars(sheet: Sheet, depths: Sequence[int], bars: Mapping[str, Sequence[Spread | None]]) -> Figure:
    """Test error of each training at each depth (paper, figure 5). bars: name -> one for each depth."""
    with _drawing(sheet, 3.8, width=1 + _BAR * len(bars) * len(depths)) as (figure, grid):
        axes = grid[0, 0]
        width = 0.8 / len(bars)
        for at, (name, spreads) in enumerate(bars.items()):
            for where, found in enumerate(spreads):
                if found is None:
                    continue
                x = where + (at - (len(bars) - 1) / 2) * width
                mean, sd = 100 * found.mean, 100 * (found.sd or 0.0)
                label = name if found is next(filter(None, spreads)) else None
                axes.bar(x, mean, 0.92 * width, color=COLOURS[at % len(COLOURS)], label=label)
                if found.sd is not None:
                    axes.errorbar(x, mean, yerr=sd, color="black", lw=1, capsize=3)
                axes.annotate(
                    f"{mean:.2f}", (x, mean + sd), (0, 2), textcoords="offset points", ha="center", fontsize=8
                )
        axes.set_xticks(range(len(depths)), depths)
        axes.set(xlabel="layers", ylabel="test error (%)")
        axes.margins(y=0.1)
        _legend(figure, axes)
    return figure


def draw_p_L(sheet: Sheet, lines: Mapping[str, Mapping[float, Spread]], constant: Spread | None) -> Figure:
    """Test error against p_L, a line for each rule, with the constant-depth line (paper, figure 8 left)."""
    with _drawing(sheet, 3.8) as (figure, grid):
        axes = grid[0, 0]
        if constant:
            mean, sd = 100 * constant.mean, 100 * (constant.sd or 0.0)
            axes.axhline(mean, color=CONSTANT_COLOUR, ls="--", lw=1.2, label=f"constant depth, {mean:.2f} %")
            axes.axhspan(mean - sd, mean + sd, color=CONSTANT_COLOUR, alpha=0.12, lw=0)
        for colour, (name, points) in zip(compared_colours(len(lines)), lines.items(), strict=True):
            _errorbar(axes, {x: points[x] for x in sorted(points)}, name, colour, 100.0)
        axes.set(xlabel="p_L, survival probability of the last block", ylabel="test error (%)")
        _legend(figure, axes)
    return figure


def _errorbar(axes: Any, points: Mapping[float, Spread], name: str, colour: str, scale: float) -> None:
    axes.errorbar(
        list(points),
        [scale * found.mean for found in points.values()],
        yerr=[scale * (math.nan if found.sd is None else found.sd) for found in points.values()],
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
        label=name,
    )


def draw_heatmap(
    sheet: Sheet, p_Ls: Sequence[float], depths: Sequence[int], errors: Mapping[tuple[float, int], Spread]
) -> Figure:
    """Test error over p_L and depth, values written in (paper, figure 8 right)."""
    values = np.full((len(p_Ls), len(depths)), np.nan)
    for (p_L, depth), found in errors.items():
        values[p_Ls.index(p_L), depths.index(depth)] = 100 * found.mean
    low, high = np.nanmin(values), np.nanmax(values)
    with _drawing(sheet, 1.6 + 0.45 * len(p_Ls), width=2 + _CELL * len(depths)) as (figure, grid):
        axes = grid[0, 0]
        image = axes.imshow(values, cmap="Blues", aspect="auto", vmax=high or 1.0)  # all may be 0
        for (p_L, depth), found in errors.items():
            row, column = p_Ls.index(p_L), depths.index(depth)
            dark = high > low and (values[row, column] - low) / (high - low) > 0.6
            # In two lines, for beside each other both do not fit into a column of the paper's grid.
            text = f"{100 * found.mean:.2f}" + (f"\n± {100 * found.sd:.2f}" if found.sd is not None else "")
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        axes.set_xticks(range(len(depths)), depths)
        axes.set_yticks(range(len(p_Ls)), [f"{p_L:g}{' (constant)' if p_L == 1 else ''}" for p_L in p_Ls])
        axes.set(xlabel="layers", ylabel="p_L")
        figure.colorbar(image, ax=axes, label="test error (%)")
    return figure


def draw_degradation(sheet: Sheet, columns: Mapping[str, Sequence[Line]]) -> Figure:
    """Plain nets left, residual right: training loss and validation error (ResNet, figures 1, 4 and 6)."""
    with _drawing(sheet, 5.6, rows=2, columns=len(columns), sharex=True, sharey="row") as (figure, grid):
        for at, (name, lines) in enumerate(columns.items()):
            for line in lines:
                _draw_line(grid[0, at], line, "train_loss", 1.0)
                _draw_line(grid[1, at], line, "validation_error", 100.0)
            grid[0, at].set_title(name, fontsize=9)
            grid[1, at].set(xlabel="epoch")
            grid[1, at].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            for axes in grid[:, at]:
                _mark_drops(axes, lines)
        grid[0, 0].set(ylabel="training loss")
        grid[1, 0].set(ylabel="validation error (%)")
        grid[0, 0].set_ylim(bottom=0)
        grid[1, 0].set_ylim(bottom=0)
        _legend(figure, grid[0, 0], columns=3)
    return figure


@dataclass(frozen=True, kw_only=True)
class EnsembleLine:
    """One training: an ensemble's value for each number of members, and the test network's."""

    name: str
    colour: str
    errors: Mapping[float, Spread]
    test_network_error: float
    nlls: Mapping[float, Spread]
    test_network_nll: float


def draw_ensemble(sheet: Sheet, lines: Sequence[EnsembleLine]) -> Figure:
    """Averages of sampled sub-networks against the test network: error, negative log-likelihood."""
    with _drawing(sheet, 3.6, columns=2) as (figure, grid):
        errors, nlls = grid[0]
        for line in lines:
            _errorbar(errors, line.errors, f"sub-networks, {line.name}", line.colour, 100.0)
            _errorbar(nlls, line.nlls, line.name, line.colour, 1.0)
            test = {"color": line.colour, "ls": "--", "lw": 1.2}
            errors.axhline(100 * line.test_network_error, label=f"test network, {line.name}", **test)
            nlls.axhline(line.test_network_nll, **test)
        members = sorted({count for line in lines for count in line.errors})
        for axes in (errors, nlls):
            axes.set(xlabel="sub-networks averaged", xscale="log")
            axes.set_xticks(members, [f"{count:g}" for count in members])
            axes.minorticks_off()
        errors.set(ylabel="test error (%)")
        nlls.set(ylabel="negative log-likelihood")
        _legend(figure, errors)
    return figure
