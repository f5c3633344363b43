"""Activation checkpointing: the same bytes from less memory."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, make_dataset, train_alone, train_config
from torch.utils.checkpoint import checkpoint

from sdpipe.data.store import DataSet
from sdpipe.network import NetworkConfig, ResNet, initialise
from sdpipe.training.compute import choose_compute
from sdpipe.training.recompute import recompute_branches


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"p_L": 1.0},
        {"draw": "sample"},
        {"micro_batches": 2},
        {"dropout": 0.3},
        {"skip": "B", "draw": "sample", "dropout": 0.2, "micro_batches": 2},
        {"skip": "C"},
        {"skip": "plain", "p_L": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_result_is_unchanged(
    dataset: DataSet,
    tmp_path: Path,
    settings: dict[str, object],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, BatchNorm's statistics and counts, and the history are the same to the byte.

    bf16 also where the processor has no instructions for it: PyTorch computes it without.
    """
    monkeypatch.setattr("sdpipe.training.compute._cpu_has_bf16", lambda: True)
    compute = choose_compute("cpu", precision)
    kept, again = (
        train_alone(
            train_config(**(settings | {"recompute": recompute, "epochs": 2, "milestones": [1]})),
            dataset,
            tmp_path / str(recompute),
            compute=compute,
        )
        for recompute in (False, True)
    )
    assert kept.progress.history == again.progress.history
    assert kept.state.keys() == again.state.keys()
    for name, tensor in kept.state.items():
        assert torch.equal(tensor, again.state[name]), name


def test_bottlenecks_are_unchanged(tmp_path: Path) -> None:
    """As above, for the blocks of 50 layers."""
    dataset = make_dataset(tmp_path / "data", size=17)
    net = {"family": "imagenet", "depth": 50, "widths": [2, 2, 4, 4], "skip": "B", "epochs": 1}
    kept, again = (
        train_alone(
            train_config(**net, milestones=[], recompute=recompute), dataset, tmp_path / str(recompute)
        )
        for recompute in (False, True)
    )
    assert kept.progress.history == again.progress.history
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in kept.state.items())


def network_of(depth: int) -> ResNet:
    config = NetworkConfig(
        family="cifar",
        depth=depth,
        widths=(4, 8, 16),
        skip="A",
        dropout=0.0,
        rule="uniform",
        p_L=0.5,
        in_channels=1,
        num_classes=3,
    )
    network = ResNet(config)
    initialise(network, 0)
    return network


def bytes_kept_for_backward(recompute: bool) -> int:
    network = network_of(56).train()
    if recompute:
        recompute_branches(network)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(torch.rand(8, 1, 16, 16), [True] * 27).sum()
    del loss
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of a block, about 5 activations are kept: 2 convolutions' inputs, 2 BatchNorms' inputs, the ReLU.

    With recomputation it is the block's input, which is also the ReLU's output of the block before.
    """
    assert bytes_kept_for_backward(recompute=True) < 0.5 * bytes_kept_for_backward(recompute=False)


def test_evaluation_is_not_recomputed() -> None:
    """In eval mode the test network runs as without; in training each of the 3 branches goes by PyTorch's."""
    network = network_of(8).eval()
    images = torch.rand(2, 1, 8, 8)
    expected = network(images)
    recompute_branches(network)
    with patch("sdpipe.training.recompute.checkpoint", wraps=checkpoint) as recomputing:
        assert torch.equal(network(images), expected)
        assert recomputing.call_count == 0
        network.train()(images, [True] * 3)
        assert recomputing.call_count == 3


@pytest.mark.slow
@pytest.mark.parametrize("p_L", [pytest.param("1.0", marks=pytest.mark.long), "0.5"])
def test_1202_layers_train_in_bounded_memory(p_L: str) -> None:
    """Three steps at batch 16 of the full network in less than 1.6 GiB, or 1.8 in fp32.

    Without recomputation it is 1.8 GiB at constant depth, and 2.5 in fp32.
    """
    run = [sys.executable, str(ROOT / "tests" / "deep_steps.py"), "16", p_L, "true"]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert found["steps"] == 3
    assert found["peak_gib"] < {"bf16": 1.6, "fp32": 1.8}[found["precision"]]
