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
import onnx
import torch
from conftest import export_to
from test_evaluate import FAULTS

from sdpipe.data.store import open_dataset
from sdpipe.deploy import fold as fold_module
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.integers import measure_layers
from sdpipe.deploy.proof.layers import file_layers, reference_layers, spread_over
from sdpipe.deploy.proof.parity import Reference, onnx_logits
from sdpipe.deploy.quantize import insert_ranges, observe_ranges
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


def calibrate_int8(folder: Path) -> None:
    """Print what the bounds of the quantised files are compared with, layer by layer."""
    weights = load_weights(folder / "weights.safetensors")
    dataset = open_dataset(Path("data") / weights.info.dataset)
    shown = spread_over(dataset.test_images_NHWC, 64)
    source = folder / "model.onnx"
    model = onnx.load(source)
    exact = reference_layers(Reference(weights), shown)
    for name in ("model.onnx", "model.fp16.onnx"):
        found = file_layers(onnx.load(folder / name), shown)
        worst = max(relative(a.values, b.values) for a, b in zip(exact, found, strict=True))
        last = relative(exact[-1].values, found[-1].values)
        print(f"  {name}: {worst:.1e} of the spread in the worst layer, {last:.1e} in the logits")
    trained, _ = open_held_out(weights.info, dataset)
    images = trained.sample(128, 1)[:]
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    files = {"as deployed": onnx.load(folder / "model.int8.onnx")} | {
        f"min-max of {name}": insert_ranges(source, observe_ranges(source, [batch], "minmax", 99.0))
        for name, batch in {
            "128 training images": images,
            "white noise": noise,
            "images of a quarter of the brightness": images // 4,
            "black images": images * 0,
        }.items()
    }
    for name, quantized in files.items():
        layers = measure_layers(model, quantized, shown)
        weakest = min(layers, key=lambda layer: layer.sqnr_db)
        print(
            f"  int8, {name}: {weakest.sqnr_db:.1f} dB at {weakest.name}, "
            f"clipped {max(layer.clipped for layer in layers):.1e}, "
            f"range {max(layer.range_ratio for layer in layers):.2f}"
        )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        calibrate(Path(argument))
        calibrate_int8(Path(argument))
