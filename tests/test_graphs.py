"""Which blocks are launched as graphs, and that capturing leaves no trace. On CUDA: tests/test_cuda.py."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import CPU, make_weights
from torch import Tensor, nn

from sdpipe.network import ResNet
from sdpipe.segment import Active, Segment
from sdpipe.training.graphs import launch_blocks_as_graphs

BATCH = 4
EVERY = [True] * 9
SOME = [True, False] * 4 + [True]


class Captures:
    """In place of PyTorch's captures: tries each block three times, then counts how often it is launched."""

    def __init__(self) -> None:
        self.num_launches = 0

    def __call__(self, modules: tuple[nn.Module, ...], inputs: tuple[tuple[Tensor], ...]) -> None:
        for module, (sample,) in zip(modules, inputs, strict=True):
            for _ in range(3):
                output = module(sample)
            torch.autograd.grad(output.sum(), [sample, *module.parameters()])
            block = module.get_submodule("block")
            module.forward = self._launch(block.forward, sample)  # type: ignore[method-assign]

    def _launch(
        self, forward: Callable[[Tensor, bool], Tensor], sample: Tensor
    ) -> Callable[[Tensor], Tensor]:
        def launch(hidden_NCHW: Tensor) -> Tensor:
            assert (hidden_NCHW.shape, hidden_NCHW.stride()) == (sample.shape, sample.stride())
            self.num_launches += 1
            return forward(hidden_NCHW, True)

        return launch


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", found)
    return found


def network() -> ResNet:
    built = make_weights().build_network()
    CPU.place(built)
    return built.train()


def images(num: int = BATCH) -> Tensor:
    return torch.rand(num, 9, 9, 1).permute(0, 3, 1, 2)


def test_capturing_changes_nothing_in_the_network(captures: Captures) -> None:
    """BatchNorm's statistics and counts too, though each block ran several times."""
    own = network()
    before = copy.deepcopy(own.state_dict())
    gradients = [torch.zeros_like(parameter) for parameter in own.parameters()]
    for parameter, gradient in zip(own.parameters(), gradients, strict=True):
        parameter.grad = gradient
    launch_blocks_as_graphs(own, images(), CPU)
    assert captures.num_launches == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("active", "num_images", "num_launches"),
    [
        (EVERY, BATCH, 9),
        (SOME, BATCH, 5),
        (EVERY, BATCH - 1, 0),
        ([Segment(start=1, count=2)] * 9, BATCH, 0),
    ],
    ids=["every block", "some blocks", "another size", "drawn for each image"],
)
def test_active_blocks_are_launched(
    captures: Captures, active: list[Active], num_images: int, num_launches: int
) -> None:
    """What no graph was captured for runs as before. The numbers are the same either way."""
    own, plain = network(), network()
    launch_blocks_as_graphs(own, images(), CPU)
    batch = images(num_images)
    for each in (own, plain):
        each(batch, active).square().sum().backward()
    assert captures.num_launches == num_launches
    theirs = plain.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.state_dict().items())
    for mine, expected in zip(own.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (expected.grad is None)
        assert mine.grad is None or expected.grad is None or torch.equal(mine.grad, expected.grad)


@pytest.mark.parametrize("active", [None, EVERY], ids=["test network", "sub-network"])
def test_evaluation_launches_no_graph(captures: Captures, active: list[Active] | None) -> None:
    """A graph of training would normalise by the batch."""
    own = network()
    launch_blocks_as_graphs(own, images(), CPU)
    with torch.no_grad():
        own.eval()(images(), active)
    assert captures.num_launches == 0
