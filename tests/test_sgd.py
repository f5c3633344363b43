"""The update is that of torch.optim.SGD, also under torch.amp.GradScaler, without what that imports."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from sdpipe.training.sgd import FusedSGD

SHAPES = [(5, 3, 3, 3), (5,), (2, 5)]
RATES = [0.1, 0.1, 0.01, 0.05]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def trained(
    update: Callable[[float], object], of: list[Tensor], gradients: list[list[Tensor]]
) -> list[Tensor]:
    for rate, step in zip(RATES, gradients, strict=True):
        for parameter, gradient in zip(of, step, strict=True):
            parameter.grad = gradient.clone()
        update(rate)
    return [parameter.detach() for parameter in of]


def some_gradients() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in RATES]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("is_scaled", "unscales_first"), [(False, True), (True, True), (True, False)])
def test_the_update_is_that_of_torch(momentum: float, is_scaled: bool, unscales_first: bool) -> None:
    """To the bit. Scaled, a step with an infinite gradient is left out, and the scale halves."""
    gradients = some_gradients()
    if is_scaled:
        gradients = [[64 * gradient for gradient in step] for step in gradients]
        gradients[2][0][0] = torch.inf
    ours, theirs = parameters(), parameters()
    our = FusedSGD(ours, momentum=momentum, weight_decay=0.01)
    their = torch.optim.SGD(
        theirs, lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=0.01, fused=True
    )
    our_scaler, their_scaler = (torch.amp.GradScaler("cpu", enabled=is_scaled, init_scale=64.0) for _ in "ab")
    for scaler in (our_scaler, their_scaler):
        scaler.scale(torch.zeros(()))  # a scaler makes its state in the first loss

    def step_of_ours(rate: float) -> None:
        if unscales_first:
            our_scaler.unscale_(our)  # type: ignore[arg-type]
        our_scaler.step(our, rate)  # type: ignore[arg-type]
        our_scaler.update()

    def step_of_theirs(rate: float) -> None:
        their.param_groups[0]["lr"] = rate
        if unscales_first:
            their_scaler.unscale_(their)
        their_scaler.step(their)
        their_scaler.update()

    got = trained(step_of_ours, ours, gradients)
    expected = trained(step_of_theirs, theirs, gradients)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert not torch.equal(got[0], parameters()[0])
    assert our_scaler.get_scale() == their_scaler.get_scale() == (32.0 if is_scaled else 1.0)


def test_gradients_begin_and_are_cleared_as_zeros_in_place() -> None:
    ours = parameters()
    optimizer = FusedSGD(ours, momentum=0.9, weight_decay=0.0)
    before = [gradient.data_ptr() for gradient in optimizer.gradients]
    assert not any(gradient.any() for gradient in optimizer.gradients)
    sum((parameter * parameter).sum() for parameter in ours).backward()  # type: ignore[union-attr]
    assert all(gradient.any() for gradient in optimizer.gradients)
    optimizer.clear_gradients()
    assert not any(gradient.any() for gradient in optimizer.gradients)
    assert [gradient.data_ptr() for gradient in optimizer.gradients] == before


@pytest.mark.slow
def test_a_training_imports_no_compiler(tmp_path: object) -> None:
    """Which takes seconds and 150 MB."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from conftest import make_dataset, train_alone, train_config\n"
        "folder = Path(sys.argv[1])\n"
        "train_alone(train_config(epochs=1, milestones=[]), make_dataset(folder / 'data'), folder / 'run')\n"
        "print('torch.optim' in sys.modules, 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT / "tests",
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "True False"
