"""Parity: the deployed file against the un-folded PyTorch network, over the whole test set.

N: images, K: classes. The reference is what was trained, with BatchNorm and p_l in their places, so that a
mistake in fold or export cannot be on both sides.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sdpipe.runtime.artifact import Artifact
from sdpipe.training.weights import Weights

REFERENCE_BATCH = 256  # images
# A sound file is off by up to so many times what PyTorch's own float32 is (docs/parity.md).
_ROUNDINGS = 10
# In parts of the logit spread: below the smallest planted fault, 9e-5 (docs/parity.md).
COARSEST = 5e-5


class ImageSlices(Protocol):
    """uint8 images (N, H, W, C) that can be had by slice: an array, or what is decoded when asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, wanted: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A test image for which the two name different classes."""

    batch_size: int  # of the ONNX run
    threads: int  # of the ONNX run
    image_index: int  # in the test part
    pytorch_class: int
    onnx_class: int
    margin: float  # of the reference: its logit of the one class minus that of the other
    near_tie: bool  # the allowed difference of both logits could turn it


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The comparison at one batch size and thread count."""

    batch_size: int
    threads: int
    max_abs_logit_diff: float
    relative_logit_diff: float  # the same over logit_spread
    allowed_relative_diff: float  # what it is held to
    logit_spread: float  # largest minus smallest logit of the reference
    disagreements: tuple[Disagreement, ...]


def compare_logits(
    reference_NK: np.ndarray,
    onnx_NK: np.ndarray,
    *,
    batch_size: int,
    threads: int,
    max_relative_logit_diff: float,
) -> Parity:
    """Compare float32 logits, both (N, K). A logit that is not finite counts as an infinite difference."""
    reference_NK, onnx_NK = reference_NK.astype(np.float64), onnx_NK.astype(np.float64)
    difference = float(np.abs(reference_NK - onnx_NK).max())
    spread = float(reference_NK.max() - reference_NK.min())
    if not (np.isfinite(difference) and np.isfinite(spread)):
        difference = float("inf")
    allowed = max_relative_logit_diff * spread
    return Parity(
        batch_size=batch_size,
        threads=threads,
        max_abs_logit_diff=difference,
        relative_logit_diff=difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf")),
        allowed_relative_diff=max_relative_logit_diff,
        logit_spread=spread,
        disagreements=tuple(_disagreements(reference_NK, onnx_NK, batch_size, threads, allowed)),
    )


def _disagreements(
    reference_NK: np.ndarray, onnx_NK: np.ndarray, batch_size: int, threads: int, allowed: float
) -> list[Disagreement]:
    reference_N, onnx_N = reference_NK.argmax(axis=1), onnx_NK.argmax(axis=1)
    found = []
    for at in np.flatnonzero(reference_N != onnx_N):
        margin = float(reference_NK[at, reference_N[at]] - reference_NK[at, onnx_N[at]])
        found.append(
            Disagreement(
                batch_size=batch_size,
                threads=threads,
                image_index=int(at),
                pytorch_class=int(reference_N[at]),
                onnx_class=int(onnx_N[at]),
                margin=margin,
                near_tie=margin <= 2 * allowed,  # each of the two logits may be off by `allowed`
            )
        )
    return found


def parity_faults(parities: Sequence[Parity], max_relative_logit_diff: float) -> list[str]:
    """What does not hold, in words; nothing, if every comparison does."""
    faults = []
    for parity in parities:
        if not parity.relative_logit_diff <= max_relative_logit_diff:
            faults.append(
                f"batch {parity.batch_size}: logits differ by {parity.max_abs_logit_diff:.3g}, "
                f"{parity.relative_logit_diff:.3g} of their spread {parity.logit_spread:.3g}; "
                f"allowed {max_relative_logit_diff:.3g}"
            )
        real = [found for found in parity.disagreements if not found.near_tie]
        faults += [
            f"batch {parity.batch_size}: image {found.image_index} is class {found.pytorch_class} in PyTorch "
            f"and {found.onnx_class} in ONNX, margin {found.margin:.3g}"
            for found in real[:5]
        ]
    return faults


def onnx_outputs(
    artifact: Artifact, images_NHWC: ImageSlices, batch_size: int, switches_L: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities (N, K) of the deployed file, batch after batch. switches_L: of an ensemble."""
    batches = range(0, len(images_NHWC), batch_size)
    outputs = [artifact.run(images_NHWC[at : at + batch_size], switches_L) for at in batches]
    return np.concatenate([logits for logits, _ in outputs]), np.concatenate([probs for _, probs in outputs])


def onnx_logits(artifact: Artifact, images_NHWC: ImageSlices, batch_size: int) -> np.ndarray:
    """Logits (N, K) of the deployed file, batch after batch."""
    return onnx_outputs(artifact, images_NHWC, batch_size)[0]


class Reference:
    """The un-folded network in PyTorch eager, on the CPU, float32."""

    def __init__(self, weights: Weights) -> None:
        self.network = weights.build_network()
        self._normalisation = weights.normalisation

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray, active: Sequence[bool] | None = None) -> np.ndarray:
        """Logits (N, K) of one batch of uint8 images. active: b_1..b_L; None: the test network."""
        logits_NK: np.ndarray[Any, Any] = self.network(self.normalise(images_NHWC), active).numpy()
        return logits_NK

    def logits(self, images_NHWC: ImageSlices, active: Sequence[bool] | None = None) -> np.ndarray:
        """Logits (N, K) of all images."""
        batches = range(0, len(images_NHWC), REFERENCE_BATCH)
        return np.concatenate([self(images_NHWC[at : at + REFERENCE_BATCH], active) for at in batches])

    @torch.inference_mode()
    def allowed(
        self, bound: float, shown_NHWC: np.ndarray, active: Sequence[bool] | None = None
    ) -> tuple[float, list[str]]:
        """What a float32 file may be off, in parts of the logit spread: the bound, or more where float32 is.

        shown_NHWC: a few images, on which the network is also run in float64. A network whose rounding grows
        on its way, such as one that lost blocks it needed, cannot be proved more sharply than it computes.
        With it what is wrong with that, in words: beyond COARSEST a fault would pass as rounding.
        """
        exact = copy.deepcopy(self.network).double()
        exact_NK = exact(self.normalise(shown_NHWC).double(), active).numpy()
        rounding = float(np.abs(self(shown_NHWC, active) - exact_NK).max())
        spread = float(exact_NK.max() - exact_NK.min())
        if not (math.isfinite(rounding) and spread):
            return bound, []
        needed, most = _ROUNDINGS * rounding / spread, max(bound, COARSEST)
        if needed <= most:
            return max(bound, needed), []
        return most, [
            "the network rounds too coarsely to be proved: PyTorch's float32 is "
            f"{rounding / spread:.3g} of the logit spread off float64, and {_ROUNDINGS} times that is over "
            f"{most:.3g}"
        ]

    def normalise(self, images_NHWC: np.ndarray) -> Tensor:
        """Float32 (N, C, H, W), as the network takes them, of uint8 images."""
        normalised: Tensor = self._normalisation(torch.from_numpy(np.array(images_NHWC)))
        return normalised.permute(0, 3, 1, 2)
