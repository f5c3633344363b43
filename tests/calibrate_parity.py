"""Where the tolerance of evaluate comes from: rounding on one side, planted faults on the other.

Usage: python tests/calibrate_parity.py models/RUN... For each trained run it prints, in parts of the logit
spread over the whole test set: the difference of the sound ONNX file (the worst of batch 1, 7 and 256), that
of PyTorch's own float32 to float64, and that of each planted fault. docs/parity.md holds the figures.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import export_to
from test_evaluate import FAULTS

from sdpipe.data.store import open_dataset
from sdpipe.deploy import fold as fold_module
from sdpipe.deploy.parity import Reference, onnx_logits
from sdpipe.network import ResNet
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import load_weights


def relative(reference_NK: np.ndarray, other_NK: np.ndarray) -> float:
    """Largest difference over the reference's spread."""
    return float(np.abs(reference_NK - other_NK).max() / (reference_NK.max() - reference_NK.min()))


@torch.no_grad()
def float64_logits(network: ResNet, normalised_NHWC: np.ndarray) -> np.ndarray:
    """The un-folded network in float64."""
    network = network.double()
    batches = range(0, len(normalised_NHWC), 256)
    images_NCHW = torch.from_numpy(normalised_NHWC.astype(np.float64)).permute(0, 3, 1, 2)
    return np.concatenate([network(images_NCHW[at : at + 256]).numpy() for at in batches])


def calibrate(folder: Path) -> None:
    """Print one run's figures."""
    weights = load_weights(folder / "weights.safetensors")
    images = np.array(open_dataset(Path("data") / weights.info.dataset).test_images_NHWC)
    reference = Reference(weights).logits(images)
    artifact = open_artifact(folder / "model.onnx", "cpu")
    sound = max(relative(reference, onnx_logits(artifact, images, size)) for size in (1, 7, 256))
    normalised = weights.normalisation(torch.from_numpy(images)).numpy()
    rounding = relative(float64_logits(weights.build_network(), normalised), reference)
    print(
        f"{folder.name}, {weights.info.dataset}, depth {weights.info.network.depth}, {len(images):,} images"
    )
    print(f"  sound {sound:.1e}, PyTorch's float32 against float64 {rounding:.1e}")
    sound_fold: Callable[[ResNet], fold_module.TestNetwork] = fold_module.fold
    for name, plant in FAULTS.items():

        def faulty(network: ResNet, plant: Callable[[ResNet], None] = plant) -> fold_module.TestNetwork:
            plant(network)
            return sound_fold(network)

        fold_module.fold = faulty
        with tempfile.TemporaryDirectory() as scratch:
            planted = open_artifact(export_to(Path(scratch) / "model.onnx", weights))
            logits = onnx_logits(planted, images, 256)
        flips = int((logits.argmax(axis=1) != reference.argmax(axis=1)).sum())
        print(f"  {name}: {relative(reference, logits):.1e}, {flips} other classes")
    fold_module.fold = sound_fold


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        calibrate(Path(argument))
