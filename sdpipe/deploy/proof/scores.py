"""How good a file is on the test part: error, likelihood, calibration, and each class by itself.

N: images, K: classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix

from sdpipe.deploy.confidence import (
    Bin,
    error_fraction,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
    tempered,
)
from sdpipe.deploy.proof.figures import draw_confusion, draw_reliability
from sdpipe.files import write_csv

SCORES = ("test_error", "negative_log_likelihood", "expected_calibration_error")


def score(
    logits_NK: np.ndarray, labels_N: np.ndarray, temperature: float, num_bins: int
) -> dict[str, float | None]:
    """Error, and likelihood and calibration of softmax(logits / T), in float64.

    None of logits that are not finite, which say nothing of a class.
    """
    if not np.isfinite(logits_NK).all():
        return dict.fromkeys(SCORES)
    return {
        "test_error": error_fraction(logits_NK, labels_N),
        "negative_log_likelihood": negative_log_likelihood(logits_NK, labels_N, temperature),
        "expected_calibration_error": expected_calibration_error(
            reliability(tempered(logits_NK, temperature), labels_N, num_bins)
        ),
    }


def probability_faults(
    probabilities_NK: np.ndarray, logits_NK: np.ndarray, temperature: float, allowed: float
) -> list[str]:
    """What is wrong with a file's probabilities, in words; nothing, if they are softmax(logits / T)."""
    off = float(np.abs(probabilities_NK - tempered(logits_NK, temperature)).max())
    return [] if off <= allowed else [f"probabilities are {off:.3g} off softmax(logits / T)"]


def write_reliability(
    folder: Path, logits_NK: np.ndarray, labels_N: np.ndarray, temperature: float, num_bins: int, title: str
) -> None:
    """reliability.csv, a row for each bin before and after calibration, and reliability.png."""
    bins = {
        name: reliability(tempered(logits_NK, temp), labels_N, num_bins)
        for name, temp in (("uncalibrated", 1.0), ("calibrated", temperature))
    }
    header = ["probabilities", *(column.name for column in fields(Bin))]
    rows = [[name, *asdict(each).values()] for name, found in bins.items() for each in found]
    write_csv(folder / "reliability.csv", header, rows)
    draw_reliability(folder / "reliability.png", bins, temperature, title)


def write_classes(
    folder: Path, logits_NK: np.ndarray, labels_N: np.ndarray, names: Sequence[str], title: str
) -> None:
    """classes.csv with precision and recall of each class, confusion.csv and confusion.png.

    A class that was never predicted has no precision, one without an image no recall.
    """
    counts_KK = confusion_matrix(labels_N, logits_NK.argmax(axis=1), labels=range(len(names)))
    rows = [
        [name, _share(counts_KK[k, k], counts_KK[:, k]), _share(counts_KK[k, k], counts_KK[k]), count]
        for k, (name, count) in enumerate(zip(names, counts_KK.sum(axis=1).tolist(), strict=True))
    ]
    write_csv(folder / "classes.csv", ["class", "precision", "recall", "images"], rows)
    table = [[name, *row] for name, row in zip(names, counts_KK.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", ["true \\ predicted", *names], table)
    draw_confusion(folder / "confusion.png", counts_KK, names, title)


def _share(right: int, counts_K: np.ndarray) -> float | None:
    """None of nothing."""
    total = counts_K.sum()
    return float(right / total) if total else None
