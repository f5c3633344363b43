from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, export_to, make_weights, random_images
from torch import nn

from sdpipe.deploy.fold import TestNetwork, build_test_network, fold, fold_file
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import load_weights, save_weights


@pytest.mark.parametrize("p_L", [0.5, 1.0])
@pytest.mark.parametrize("depth", [20, 56])
@torch.no_grad()
def test_fold_equals_the_unfolded_network_in_float64(depth: int, p_L: float) -> None:
    """To 1e-12 of the logits; the un-folded network in eval mode is eq. (5) with BatchNorm as it stands."""
    network = make_weights(depth=depth, p_L=p_L).build_network()
    images = torch.randn(16, 1, SIZE, SIZE, dtype=torch.float64)
    folded = fold(network)(images)
    reference = network.double()(images)
    assert (folded - reference).abs().max() <= 1e-12 * reference.abs().max()
    assert reference.std() > 0.1, "logits that do not vary would prove nothing"


NETWORKS = {
    "option B": {"skip": "B"},
    "option C": {"skip": "C"},
    "plain": {"skip": "plain", "p_L": 1.0},
    "ImageNet-style, 18 layers": {"family": "imagenet", "depth": 18, "widths": (4, 8, 8, 16), "skip": "B"},
    "bottlenecks, 50 layers": {"family": "imagenet", "depth": 50, "widths": (4, 4, 8, 8), "skip": "B"},
    "bottlenecks, option A": {"family": "imagenet", "depth": 50, "widths": (4, 4, 8, 8), "skip": "A"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_folds_and_exports(name: str, tmp_path: Path) -> None:
    """In float64 to 1e-12; onnxruntime to the tolerance of the parity proof, without BatchNorm or dropout."""
    weights = make_weights(**NETWORKS[name])
    network = weights.build_network()
    images_NHWC = random_images(16, seed=3)
    normalised = (torch.from_numpy(images_NHWC).double() - weights.normalisation.mean_HWC) / 60.0
    reference = network.double()(normalised.permute(0, 3, 1, 2))
    folded = fold(network)(normalised.permute(0, 3, 1, 2))
    assert (folded - reference).abs().max() <= 1e-12 * reference.abs().max()
    path = export_to(tmp_path / "model.onnx", weights)
    logits = open_artifact(path, "cpu").run(images_NHWC)[0]
    spread = (reference.max() - reference.min()).item()
    assert np.abs(logits - reference.numpy()).max() <= 2e-6 * spread
    allowed = {"Add", "AveragePool", "Cast", "Conv", "Div", "Gemm", "MaxPool", "Pad", "ReduceMean", "Relu"}
    assert set(open_artifact(path, "cpu").operators) <= allowed | {"Softmax", "Sub", "Transpose"}


@torch.no_grad()
def test_fold_equals_it_in_float32_to_rounding() -> None:
    network = make_weights(depth=56).build_network()
    images = torch.randn(16, 1, SIZE, SIZE)
    reference = network(images)
    spread = reference.max() - reference.min()
    # 56 layers of float32 (2^-24 = 6e-8 each) leave some 3e-7 of the spread.
    assert (fold(network).float()(images) - reference).abs().max() <= 2e-6 * spread


def test_no_batchnorm_and_no_survival_probability_is_left() -> None:
    network = fold(make_weights().build_network())
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    # 19 convolutions and the head, each with weight and bias, nothing else.
    assert len(network.state_dict()) == 2 * 20


def test_the_trained_network_is_left_as_it_is() -> None:
    network = make_weights().build_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert next(network.parameters()).dtype is torch.float32


def test_files_round_trip_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.safetensors", make_weights())
    for name in ("a", "b"):
        fold_file(tmp_path / "weights.safetensors", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert isinstance(build_test_network(load_weights(tmp_path / "a")), TestNetwork)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_unreadable_weights_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    if damage == "truncated":
        save_weights(path, make_weights())
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"weights\.safetensors"):
        fold_file(path, tmp_path / "folded.safetensors")
    assert not (tmp_path / "folded.safetensors").exists()


@pytest.mark.slow
@torch.no_grad()
def test_a_removed_block_leaves_its_skip_only(tmp_path: Path) -> None:
    """Of depth 20, l = 2, 4 (transitional) and 9: 3 x 2 convolutions fewer, the logits of eq. (5)."""
    weights = make_weights(removed={2, 4, 9})
    network = weights.build_network().double()
    images_NHWC = random_images(16, seed=3)
    normalised = (torch.from_numpy(images_NHWC).double() - weights.normalisation.mean_HWC) / 60.0
    active = [ell not in (2, 4, 9) for ell in range(1, 10)]
    hidden = network.stem(normalised.permute(0, 3, 1, 2))
    for ell, block in enumerate(network.blocks, start=1):
        branch = (1 - ell / 18) * block.branch(hidden) if active[ell - 1] else 0
        hidden = torch.relu(branch + block.identity(hidden))
    reference = network.head(hidden.mean(dim=(2, 3)))
    assert (fold(network)(normalised.permute(0, 3, 1, 2)) - reference).abs().max() <= 1e-12
    path = export_to(tmp_path / "model.onnx", weights)
    logits = open_artifact(path, "cpu").run(images_NHWC)[0]
    assert np.abs(logits - reference.numpy()).max() <= 2e-6 * (reference.max() - reference.min()).item()
    counts = open_artifact(path, "cpu").operators
    assert (counts["Conv"], counts["Add"], counts["AveragePool"]) == (19 - 6, 6, 2)
    fold_file_of = tmp_path / "weights.safetensors"
    save_weights(fold_file_of, weights)
    fold_file(fold_file_of, tmp_path / "folded.safetensors")
    folded = load_weights(tmp_path / "folded.safetensors")
    assert folded.info.scales == weights.info.scales
    assert not [name for name in folded.state if name.startswith("network.blocks.1.")]
