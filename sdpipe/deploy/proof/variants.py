"""Every file of a run, each proved against its own reference over the whole test part.

model.onnx and the pruned files are held to the un-folded PyTorch network of their weights, the float16 and
int8 files to the float32 file that they were made from. N: images, K: classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.files_of_run import FLOAT16, FLOAT32, INT8, Variant
from sdpipe.deploy.proof.claims import claim_faults
from sdpipe.deploy.proof.integers import QuantizedLayer, prove_integers
from sdpipe.deploy.proof.layers import file_layers, first_departure, reference_layers, spread_over
from sdpipe.deploy.proof.parity import (
    ImageSlices,
    Parity,
    Reference,
    compare_logits,
    onnx_outputs,
    parity_faults,
)
from sdpipe.deploy.proof.scores import probability_faults
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.training.weights import Weights

_LARGEST_HALF = float(np.finfo(np.float16).max)
# Inside a network values are off by more of their layer's spread than the logits of theirs.
_WITHIN = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """What was found of a variant."""

    variant: Variant
    artifact: Artifact
    parities: list[Parity]
    logits_NK: np.ndarray
    reference_NK: np.ndarray
    layers: list[QuantizedLayer]  # of an int8 file
    faults: list[str]  # nothing, if it holds

    @property
    def figures(self) -> dict[str, bool | float | str | None]:
        """The worst of all batch sizes and thread counts; `parity` says whether everything held."""
        figures: dict[str, bool | float | str | None] = {
            "parity": not self.faults,
            "max_abs_logit_diff": _finite(max(parity.max_abs_logit_diff for parity in self.parities)),
            "relative_logit_diff": _finite(max(parity.relative_logit_diff for parity in self.parities)),
            "allowed_relative_logit_diff": self.parities[0].allowed_relative_diff,
            "logit_spread": _finite(self.parities[0].logit_spread),
            "argmax_disagreements": max(len(parity.disagreements) for parity in self.parities),
        }
        if self.layers:
            weakest = min(self.layers, key=lambda layer: layer.sqnr_db)
            figures |= {"lowest_sqnr_db": weakest.sqnr_db, "weakest_layer": weakest.name}
        return figures


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None  # JSON has no infinity


def prove(
    variant: Variant,
    weights: Weights,
    proved: Mapping[Path, Proof],
    images_NHWC: ImageSlices,
    config: EvaluateConfig,
) -> Proof:
    """Run the test part through a variant and compare. weights: of its network.

    proved: the proofs so far, by file. Raises ModelError if the file is unreadable or of another run,
    DataError if its temperature stands nowhere.
    """
    artifact = open_artifact(variant.path, device="cpu", threads=config.threads[0])
    found = (artifact.metadata.fingerprint, artifact.metadata.variant)
    if found != (weights.info.fingerprint, variant.name):
        raise ModelError(
            f"{variant.path}: its run is {found[0]} and its variant {found[1]}, "
            f"and that of its weights {weights.info.fingerprint} and {variant.name}"
        )
    reference = Reference(weights)
    shown_NHWC = spread_over(images_NHWC, config.layer_images)
    allowed, faults = allowed_difference(variant, reference, shown_NHWC, config)
    if variant.kind == FLOAT32:
        reference_NK = reference.logits(images_NHWC)
    else:
        reference_NK = proved[variant.source].logits_NK
    logits_NK, parities, wrong = _compare(variant, artifact, reference_NK, images_NHWC, allowed, config)
    faults += parity_faults(parities, allowed) + wrong
    layers: list[QuantizedLayer] = []
    if variant.kind == INT8:
        wrong, layers = prove_integers(variant.source, variant.path, shown_NHWC, config.int8)
        faults += wrong
    elif variant.kind == FLOAT16:
        faults += check_halves(variant, shown_NHWC)
    if faults and variant.kind != INT8:
        faults.append(locate(variant, reference, shown_NHWC, allowed))
    return Proof(
        variant=variant,
        artifact=artifact,
        parities=parities,
        logits_NK=logits_NK,
        reference_NK=reference_NK,
        layers=layers,
        faults=claim_faults(artifact.metadata, weights.info, variant.weights) + faults,
    )


def _compare(
    variant: Variant,
    artifact: Artifact,
    reference_NK: np.ndarray,
    images_NHWC: ImageSlices,
    allowed: float,
    config: EvaluateConfig,
) -> tuple[np.ndarray, list[Parity], list[str]]:
    """Logits of the last run, the comparison of each, and probabilities that are wrong, in words."""
    runs = [(size, config.threads[0]) for size in config.batch_sizes]
    runs += [(config.batch_sizes[-1], threads) for threads in config.threads[1:]]
    parities, faults = [], []
    for batch_size, threads in runs:
        if threads != config.threads[0]:
            artifact = open_artifact(variant.path, device="cpu", threads=threads)
        logits_NK, probabilities_NK = onnx_outputs(artifact, images_NHWC, batch_size)
        parities.append(
            compare_logits(
                reference_NK,
                logits_NK,
                batch_size=batch_size,
                threads=threads,
                max_relative_logit_diff=allowed,
            )
        )
        temperature, most = artifact.metadata.temperature, config.max_probability_diff
        wrong = probability_faults(probabilities_NK, logits_NK, temperature, most)
        faults += [f"batch {batch_size}: {fault}" for fault in wrong]
    return logits_NK, parities, faults


def allowed_difference(
    variant: Variant, reference: Reference, shown_NHWC: np.ndarray, config: EvaluateConfig
) -> tuple[float, list[str]]:
    """Of the logit spread; and why nothing can be proved with it, in words."""
    if variant.kind == FLOAT32:
        return reference.allowed(config.max_relative_logit_diff, shown_NHWC)
    bounds = config.fp16 if variant.kind == FLOAT16 else config.int8
    return bounds.max_relative_logit_diff, []


def check_halves(variant: Variant, images_NHWC: np.ndarray) -> list[str]:
    """Layers whose values do not fit into float16, which a CPU that computes in float32 does not notice."""
    return [
        f"{layer.name}: values up to {largest:.3g} do not fit into float16"
        for layer in file_layers(onnx.load(variant.source), images_NHWC)
        if (largest := float(np.abs(layer.values).max())) > _LARGEST_HALF
    ]


def locate(variant: Variant, reference: Reference, images_NHWC: np.ndarray, allowed: float) -> str:
    """The first layer in which a float file departs from its reference, in words."""
    if variant.kind == FLOAT32:
        expected = reference_layers(reference, images_NHWC)
    else:
        expected = file_layers(onnx.load(variant.source), images_NHWC)
    return first_departure(expected, file_layers(onnx.load(variant.path), images_NHWC), _WITHIN * allowed)
