"""What only a CUDA device can show; without one these are left out."""

from pathlib import Path

import pytest
import torch
from conftest import ALONE, CPU, make_dataset, same, train_alone, train_config
from picture_files import AUGMENTED, make_pictures
from test_training import StopAfter

from sdpipe.data.store import DataSet
from sdpipe.errors import TrainingError
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.session import memory_on_one_line
from sdpipe.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device")


def on_cuda(precision: str = "auto") -> Compute:
    return choose_compute("cuda", precision)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(
    "overrides", [{}, {"dropout": 0.2}, AUGMENTED], ids=["arrays", "dropout", "pictures"]
)
def test_no_step_waits_for_the_device(dataset: DataSet, tmp_path: Path, overrides: dict[str, object]) -> None:
    """The first step warms up; PyTorch raises where one of the next three synchronises."""
    data = make_pictures(tmp_path) if overrides is AUGMENTED else dataset
    config = train_config(device="cuda", precision="auto", p_L=1.0, **overrides)
    trainer = Trainer(config, data, on_cuda(), ALONE, workers=0)
    trainer.images.num_at_once = 1  # so that each of the steps makes its batch
    steps = trainer.steps()
    next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "overrides", [{}, {"draw": "sample"}, {"dropout": 0.2}, {"dropout": 0.2, "compile": True}], ids=str
)
def test_a_step_has_the_gradients_of_a_cpu(
    dataset: DataSet, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fp32, without TF32, which rounds to ten bits; the first step is the one that captures the graphs."""
    config, gradients = train_config(**overrides), []
    for compute in (CPU, on_cuda("fp32")):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
            False  # until the next choice
        )
        trainer = Trainer(config, dataset, compute, ALONE)
        monkeypatch.setattr(trainer.step, "clear_gradients", lambda: None)
        next(trainer.steps())
        gradients.append(torch.cat([gradient.flatten().cpu() for gradient in trainer.step.gradients]))
    of_cpu, of_cuda = gradients
    assert torch.linalg.vector_norm(of_cuda - of_cpu) < 1e-3 * torch.linalg.vector_norm(of_cpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_graphs_change_no_byte(
    dataset: DataSet, tmp_path: Path, precision: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, BatchNorm's statistics and counts, momentum through the weights, and the history."""
    config, compute = train_config(micro_batches=micro_batches), on_cuda(precision)
    with_graphs = train_alone(config, dataset, tmp_path / "with", compute=compute)
    monkeypatch.setattr("sdpipe.training.step.launch_blocks_as_graphs", lambda *_args: None)
    without = train_alone(config, dataset, tmp_path / "without", compute=compute)
    assert same(with_graphs.state, without.state)
    assert with_graphs.progress.history == without.progress.history


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns(dataset: DataSet, tmp_path: Path, precision: str) -> None:
    """Three classes of stripes: chance is an error of 2/3. fp16 has loss scaling."""
    config = train_config(epochs=12, milestones=[9], p_L=0.8)
    result = train_alone(config, dataset, tmp_path, compute=on_cuda(precision))
    assert result.test_error <= 0.15


@pytest.mark.parametrize(
    "overrides",
    [{}, {"draw": "sample"}, {"skip": "C", "dropout": 0.2}, {"recompute": True}, {"micro_batches": 2}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_bytes_again_and_after_a_stop(
    dataset: DataSet, tmp_path: Path, overrides: dict[str, object], precision: str
) -> None:
    config = train_config(**overrides)
    compute = on_cuda(precision)
    whole = train_alone(config, dataset, tmp_path / "whole", compute=compute)
    again = train_alone(config, dataset, tmp_path / "again", compute=compute)
    assert same(whole.state, again.state)
    with pytest.raises(SystemExit):
        train_alone(config, dataset, tmp_path / "stopped", interruption=StopAfter(9), compute=compute)
    continued = train_alone(config, dataset, tmp_path / "stopped", compute=compute)
    assert same(whole.state, continued.state)
    assert whole.progress.history == continued.progress.history


def test_the_same_bytes_in_the_other_family(tmp_path: Path) -> None:
    """Whose stem has max-pooling."""
    data = make_dataset(tmp_path / "data", size=33)
    config = train_config(family="imagenet", depth=18, widths=[8, 8, 8, 8], skip="B", epochs=2, milestones=[])
    first, second = (train_alone(config, data, tmp_path / str(at), compute=on_cuda()) for at in range(2))
    assert same(first.state, second.state)


def test_a_gradient_that_is_not_finite_is_left_out_on_the_device(dataset: DataSet) -> None:
    """The host learns of it some steps later; until then no update makes a weight not finite."""
    trainer = Trainer(train_config(p_L=1.0), dataset, on_cuda("bf16"), ALONE)
    steps = trainer.steps()
    next(steps)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        once.remove()
        return gradient * float("nan")

    once = trainer.network.get_parameter("blocks.3.branch.conv1.weight").register_hook(spoil)
    with pytest.raises(TrainingError, match="epoch 1, step 2 of 6: loss .*gradient norm nan"):
        list(steps)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
    with pytest.raises(TrainingError):
        trainer.checkpoint()


def test_memory_of_the_device_that_is_out_is_one_line() -> None:
    """A real allocation that fails."""
    with (
        pytest.raises(TrainingError, match="out of memory at train.batch_size 16"),
        memory_on_one_line(train_config()),
    ):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
