"""How far the sub-networks of stochastic depth agree on a picture.

The test network stands for the average of 2^L sub-networks (section 3 of the paper). M of them are drawn as
in training, b_l ~ Bernoulli(p_l), the same M for every picture, and run through the ensemble's file.
N: images, K: classes, L: blocks, M: members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import ENSEMBLE, Artifact, open_artifact

SEED = 0  # of the draws; fixed, so that the same call gives the same figures
FILE_NAME = "ensemble.onnx"


def draw_members(survival_probs: Sequence[float], num_members: int, seed: int) -> list[list[bool]]:
    """b_1..b_L of each sub-network, b_l ~ Bernoulli(p_l). The first 4 of 16 are the 4 of 4."""
    draws = [
        np.random.default_rng((seed, member)).random(len(survival_probs)) for member in range(num_members)
    ]
    return [[bool(active) for active in draw_L < np.asarray(survival_probs)] for draw_L in draws]


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """What M sub-networks say of the label that the model named."""

    members: int  # M
    probability_mean: float  # of the label, over the members
    probability_std: float  # of the same: sample standard deviation, M - 1 in the denominator
    agreement: float  # fraction of the members that name the label, too


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """M sub-networks, ready to run."""

    artifact: Artifact  # the ensemble's
    switches_ML: np.ndarray  # float32, 0 or 1

    def judge(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> list[Uncertainty]:
        """How the members see each image's label, the number of a class; M runs over one batch.

        Raises ModelError as `Artifact.run` does.
        """
        num_members, num_images = len(self.switches_ML), len(images_NHWC)
        probability_MN = np.empty((num_members, num_images))
        agrees_MN = np.empty((num_members, num_images), dtype=bool)
        for member, switches_L in enumerate(self.switches_ML):
            probabilities_NK = self.artifact.probabilities(images_NHWC, switches_L)
            probability_MN[member] = probabilities_NK[np.arange(num_images), labels_N]
            agrees_MN[member] = probabilities_NK.argmax(axis=1) == labels_N
        return [
            Uncertainty(
                members=num_members,
                probability_mean=float(probability_M.mean()),
                probability_std=float(probability_M.std(ddof=1)),
                agreement=float(agrees_M.mean()),
            )
            for probability_M, agrees_M in zip(probability_MN.T, agrees_MN.T, strict=True)
        ]


def open_ensemble(
    model: Artifact, num_members: int, device: str = "auto", *, verify: bool = False
) -> Ensemble:
    """The ensemble that stands beside a model's file, as ensemble.onnx or variants/ensemble.onnx.

    num_members: M, at least 2, else there is no spread. verify: against the SHA256SUMS beside it. Raises
    ModelError if the model's training has no sub-networks, if the model lacks blocks that they have, or if
    the file is missing, no ensemble, or of another training.
    """
    if all(prob == 1 for prob in model.metadata.survival_probs):
        raise ModelError(f"{model.path}: constant depth has no sub-networks; expected p_L below 1, got 1")
    if 0 in model.metadata.scales:
        raise ModelError(f"{model.path}: lacks blocks that the sub-networks have; expected the whole network")
    path = _beside(model.path)
    artifact = open_artifact(path, device, verify=verify)
    if artifact.metadata.variant != ENSEMBLE:
        raise ModelError(f"{path}: expected the variant {ENSEMBLE}, got {artifact.metadata.variant}")
    expected, found = model.metadata.fingerprint, artifact.metadata.fingerprint
    if found != expected:
        raise ModelError(f"{path}: expected the training {expected} of {model.path}, got {found}")
    members = draw_members(artifact.metadata.survival_probs, num_members, SEED)
    return Ensemble(artifact=artifact, switches_ML=np.array(members, dtype=np.float32))


def _beside(model_path: Path) -> Path:
    places = (model_path.parent / FILE_NAME, model_path.parent / "variants" / FILE_NAME)
    for path in places:
        if path.is_file():
            return path
    raise ModelError(f"{model_path}: --uncertainty needs {places[0]} or {places[1]}, and neither is there")
