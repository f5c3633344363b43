"""How far confidence can be trusted, and the temperature that mends it.

Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599: probabilities
are softmax(logits / T). The classes stay as they are. N: images, K: classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from sdpipe.errors import DataError
from sdpipe.files import read_json

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that are looked at."""


def tempered(logits_NK: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T), float64."""
    with np.errstate(invalid="ignore"):  # the proof finds an infinity
        probabilities_NK: np.ndarray = softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    return probabilities_NK


def error_fraction(scores_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Fraction of the images whose class is not that of the highest score, a logit or a probability."""
    return float((scores_NK.argmax(axis=1) != labels_N).mean())


def negative_log_likelihood(logits_NK: np.ndarray, labels_N: np.ndarray, temperature: float) -> float:
    """Mean of -log softmax(logits / T) of the true class, in nats, computed in float64."""
    log_probabilities_NK = log_softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    return float(-log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean())


def divergence(exact_NK: np.ndarray, other_NK: np.ndarray, temperature: float) -> float:
    """Mean Kullback-Leibler divergence of softmax(other / T) from softmax(exact / T), in nats, in float64."""
    exact_log_NK, other_log_NK = (
        log_softmax(logits_NK.astype(np.float64) / temperature, axis=1) for logits_NK in (exact_NK, other_NK)
    )
    return float((np.exp(exact_log_NK) * (exact_log_NK - other_log_NK)).sum(axis=1).mean())


def fit_temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature of lowest negative log-likelihood, 0.05 to 20.

    1 where no image is wrong: the likelihood then only grows as T falls to 0, and says nothing of confidence.
    """
    if error_fraction(logits_NK, labels_N) == 0:
        return 1.0
    found = minimize_scalar(
        lambda log_temperature: negative_log_likelihood(logits_NK, labels_N, float(np.exp(log_temperature))),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
    )
    return float(np.exp(found.x))


def is_at_bound(temperature: float) -> bool:
    """Whether the search ended where it may look no further, which it approaches to five digits."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images of about one confidence, the probability of the class that is named."""

    lowest: float
    highest: float
    num_images: int
    confidence: float  # mean; 0 where there is no image
    accuracy: float  # fraction of them that is right; 0 where there is no image


def reliability(probabilities_NK: np.ndarray, labels_N: np.ndarray, num_bins: int) -> list[Bin]:
    """Confidence and accuracy in bins of equal width, (lowest, highest]: the reliability diagram."""
    confidence_N = probabilities_NK.max(axis=1).astype(np.float64)
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    edges = np.linspace(0, 1, num_bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside_N = bin_N == number
        count = int(inside_N.sum())
        bins.append(
            Bin(
                lowest=float(edges[number]),
                highest=float(edges[number + 1]),
                num_images=count,
                confidence=float(confidence_N[inside_N].mean()) if count else 0.0,
                accuracy=float(right_N[inside_N].mean()) if count else 0.0,
            )
        )
    return bins


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean distance of confidence and accuracy over all images (Guo et al., eq. 3)."""
    num_images = sum(each.num_images for each in bins)
    return sum(each.num_images * abs(each.confidence - each.accuracy) for each in bins) / num_images


def read_temperature(path: Path) -> float:
    """From calibration.json. Raises DataError if it is missing or damaged."""
    temperature = read_json(path).get("temperature")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise DataError(f"{path}: expected a positive temperature, got {temperature!r}")
    return float(temperature)
