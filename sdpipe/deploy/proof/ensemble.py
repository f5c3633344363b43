"""The proof of ensemble.onnx: as the test network and as sub-networks it is the PyTorch network.

N: images, K: classes, L: blocks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.files_of_run import WEIGHTS
from sdpipe.deploy.proof.claims import claim_faults
from sdpipe.deploy.proof.layers import spread_over
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
from sdpipe.files import sha256_of
from sdpipe.runtime.artifact import ENSEMBLE, open_artifact
from sdpipe.runtime.uncertainty import FILE_NAME, SEED, draw_members
from sdpipe.training.weights import Weights

_MEMBERS = 2  # drawn sub-networks that are compared over the whole test part


@dataclass(frozen=True, kw_only=True)
class EnsembleProof:
    """What was found of ensemble.onnx."""

    path: Path
    parities: list[Parity]  # with b_l = p_l, then with each draw
    faults: list[str]  # nothing, if it holds

    @property
    def figures(self) -> dict[str, Any]:
        """The file, and the worst of its comparisons; `parity` says whether everything held."""
        worst = max(self.parities, key=lambda parity: parity.relative_logit_diff)
        is_finite = np.isfinite(worst.relative_logit_diff)
        return {
            "file": self.path.name,
            "sha256": sha256_of(self.path),
            "bytes": self.path.stat().st_size,
            "parity": not self.faults,
            "max_abs_logit_diff": worst.max_abs_logit_diff if is_finite else None,
            "relative_logit_diff": worst.relative_logit_diff if is_finite else None,
            "allowed_relative_logit_diff": worst.allowed_relative_diff,
        }


def prove_ensemble(
    folder: Path, weights: Weights, images_NHWC: ImageSlices, config: EvaluateConfig
) -> EnsembleProof:
    """Run the test part through the ensemble and compare.

    With b_l = p_l the file is held to the un-folded test network, with drawn b_l in {0, 1} to the same
    network with these blocks active, over all images, at the last batch size and the first number of threads.
    Raises ModelError if it is another run's, DataError if calibration.json cannot be read.
    """
    path = folder / FILE_NAME
    artifact = open_artifact(path, device="cpu", threads=config.threads[0])
    found = (artifact.metadata.fingerprint, artifact.metadata.variant)
    if found != (weights.info.fingerprint, ENSEMBLE):
        raise ModelError(
            f"{path}: expected the {ENSEMBLE} of run {weights.info.fingerprint}, got {found[1]} of {found[0]}"
        )
    probs, size = weights.info.network.survival_probs, config.batch_sizes[-1]
    reference = Reference(weights)
    shown_NHWC = spread_over(images_NHWC, config.layer_images)
    parities, faults = [], claim_faults(artifact.metadata, weights.info, folder / WEIGHTS)
    for active in (None, *draw_members(probs, _MEMBERS, SEED)):
        allowed, too_coarse = reference.allowed(config.max_relative_logit_diff, shown_NHWC, active)
        switches_L = np.asarray(probs if active is None else active, dtype=np.float32)
        logits_NK, probabilities_NK = onnx_outputs(artifact, images_NHWC, size, switches_L)
        parity = compare_logits(
            reference.logits(images_NHWC, active),
            logits_NK,
            batch_size=size,
            threads=config.threads[0],
            max_relative_logit_diff=allowed,
        )
        parities.append(parity)
        faults += too_coarse + parity_faults([parity], allowed)
        temperature, most = artifact.metadata.temperature, config.max_probability_diff
        faults += probability_faults(probabilities_NK, logits_NK, temperature, most)
    return EnsembleProof(path=path, parities=parities, faults=faults)
