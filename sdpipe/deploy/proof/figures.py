"""The pictures of a run: each function writes a PNG, and returns what was drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sdpipe.deploy.confidence import Bin, expected_calibration_error
from sdpipe.drawing import STYLE, mark_drops, save_png

_MAX_CLASSES_WITH_NUMBERS = 20
_MOST_LETTERS = 17  # of a class name above a mistake


def draw_confusion(path: Path, counts_KK: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Confusion matrix: rows are true classes, columns predicted ones, colour is the share of the row."""
    num = len(class_names)
    share_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.42 * num if num <= _MAX_CLASSES_WITH_NUMBERS else 10.0)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(side + 1.5, side + 0.5))
        axes = figure.add_subplot()
        image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
        if num <= _MAX_CLASSES_WITH_NUMBERS:
            axes.set_xticks(range(num), class_names, rotation=45, ha="right")
            axes.set_yticks(range(num), class_names)
            for row, column in np.argwhere(counts_KK):
                colour = "white" if share_KK[row, column] > 0.5 else "black"
                axes.text(
                    column,
                    row,
                    str(counts_KK[row, column]),
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=7,
                )
        axes.set(xlabel="predicted", ylabel="true", title=title)
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
        save_png(figure, path)
    return figure


def draw_training(path: Path, history: Sequence[dict[str, float]], best_epoch: float, title: str) -> Figure:
    """Validation error and training loss against epoch (paper, figure 3).

    The kept epoch and the drops of the learning rate are marked.
    """
    epochs = [row["epoch"] for row in history]
    errors = [100 * row["validation_error"] for row in history]
    kept = errors[epochs.index(best_epoch)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(epochs, errors, color="tab:blue", label="validation error")
        label = f"kept: epoch {best_epoch:.4g}, {kept:.2f} %"
        axes.plot(best_epoch, kept, "o", color="tab:blue", clip_on=False, zorder=3, label=label)
        axes.set(xlabel="epoch", ylabel="validation error (%)", title=title)
        axes.set_ylim(bottom=0)
        loss_axes = axes.twinx()
        loss_axes.spines["right"].set_visible(True)
        losses = [row["train_loss"] for row in history]
        loss_axes.plot(epochs, losses, color="tab:orange", lw=1, label="training loss")
        loss_axes.set_ylabel("training loss")
        loss_axes.set_ylim(bottom=0)
        mark_drops(axes, history)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        save_png(figure, path)
    return figure


def draw_mistakes(
    path: Path,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    probabilities_NK: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """The most confident mistakes, up to 24, each with what it was taken for, how surely, and what it is."""
    predicted_N, surety_N = probabilities_NK.argmax(axis=1), probabilities_NK.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    wrong = wrong[np.argsort(-surety_N[wrong], kind="stable")][:24]
    columns = 8
    rows = max(1, -(-len(wrong) // columns))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, at in zip(grid, wrong, strict=False):
            image = images_NHWC[at]
            is_grey = image.shape[2] == 1
            shown = image[:, :, 0] if is_grey else image
            axes.imshow(shown, cmap="gray" if is_grey else None, vmin=0, vmax=255)
            taken, true = (_short(class_names[each[at]]) for each in (predicted_N, labels_N))
            axes.set_title(f"{taken} {surety_N[at]:.0%}\nis {true}", fontsize=8)
        figure.suptitle(title if len(wrong) else f"{title}: none")
        save_png(figure, path)
    return figure


def _short(name: str) -> str:
    """Both ends of a long class name, since neighbours' names must not touch."""
    return name if len(name) <= _MOST_LETTERS else f"{name[:8]}...{name[-6:]}"


def draw_reliability(path: Path, bins: Mapping[str, Sequence[Bin]], temperature: float, title: str) -> Figure:
    """Accuracy against confidence before and after calibration, and below how many images are in each bin."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        grid = figure.subplots(2, len(bins), sharex=True, sharey="row", height_ratios=[3, 1], squeeze=False)
        for (above, below), (name, found) in zip(grid.T, bins.items(), strict=True):
            centres = [(each.lowest + each.highest) / 2 for each in found]
            widths = [each.highest - each.lowest for each in found]
            edges: Any = {"edgecolor": "white", "linewidth": 0.5}
            above.bar(centres, [each.accuracy for each in found], widths, color="tab:blue", **edges)
            above.plot([0, 1], [0, 1], color="black", lw=0.8, ls="--")
            filled = [each for each in found if each.num_images]
            above.plot(
                [each.confidence for each in filled], [each.accuracy for each in filled], "o", ms=3,
                color="tab:orange", clip_on=False, label="mean confidence of a bin's images",
            )  # fmt: skip
            error = expected_calibration_error(list(found))
            above.set_title(f"{name}: calibration error {error:.1%}")
            below.bar(centres, [each.num_images for each in found], widths, color="grey", **edges)
            below.set(xlabel="confidence", xlim=(0, 1))
        grid[0, 0].set(ylabel="accuracy", ylim=(0, 1))
        grid[1, 0].set_ylabel("images")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
        figure.suptitle(f"{title}, temperature {temperature:.3g}")
        save_png(figure, path)
    return figure
