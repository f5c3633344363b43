"""What is not finite stops a training before it does harm."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, CPU, run_epoch, same, train_alone, train_config

from sdpipe.data.store import DataSet
from sdpipe.errors import TrainingError
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.compute import Compute
from sdpipe.training.guard import FP16_STREAK, Guard
from sdpipe.training.trainer import Trainer


def test_a_loss_that_is_not_finite_stops_before_the_update(dataset: DataSet, tmp_path: Path) -> None:
    """The message has the step, the rate and the images; the weights and the newest checkpoint are finite."""
    config = train_config(learning_rate=1e30, weight_decay=1.0)
    with pytest.raises(TrainingError) as caught:
        train_alone(config, dataset, tmp_path, every_steps=1)
    message = str(caught.value)
    assert "at learning rate 1e+30" in message
    checkpoint, damaged = CheckpointFolder(tmp_path, "0123456789abcdef").load_newest()
    assert checkpoint is not None
    assert damaged == []
    bad_step = checkpoint.num_steps
    assert f"epoch 1, step {bad_step + 1} of 6: loss" in message
    trainer = Trainer(config, dataset, CPU, ALONE)
    order = trainer.draws.order(0, 96)[bad_step * 16 : (bad_step + 1) * 16]
    assert f"images {trainer.train_indices[order].tolist()};" in message
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(dataset: DataSet, value: float) -> None:
    """One number in one gradient, while the loss is finite."""
    trainer = Trainer(train_config(p_L=1.0), dataset, CPU, ALONE)
    weight = trainer.network.get_parameter("blocks.3.branch.conv1.weight")

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled[0, 0, 1, 1] = value
        return spoiled

    steps = trainer.steps()
    next(steps)
    before = copy.deepcopy(list(trainer.network.parameters()))
    weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"epoch 1, step 2 of 6: loss [\d.]+, gradient norm (nan|inf)"):
        next(steps)
    assert all(map(torch.equal, before, trainer.network.parameters()))
    with pytest.raises(TrainingError):
        trainer.checkpoint()


def test_the_guard_bears_with_fp16_for_a_while() -> None:
    """Overflowing gradients in a row are the scaler's work, until the scale cannot be the reason."""
    guard = Guard(torch.device("cpu"), FP16_STREAK)
    loss, finite, inf = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(float("inf"))
    for step in range(FP16_STREAK):
        guard.watch(step, loss, inf)
    guard.watch(FP16_STREAK, loss, finite)
    for step in range(FP16_STREAK):
        guard.watch(100 + step, loss, inf)
        assert guard.bad_step() is None
    guard.watch(200, loss, inf)
    guard.watch(201, loss, inf)
    assert guard.bad_step() == (200, 1.0, float("inf"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_guard_does_not_bear_with_a_loss(value: float) -> None:
    """In fp16 gradients may overflow, since they are scaled; the loss is noted before that."""
    guard = Guard(torch.device("cpu"), FP16_STREAK)
    guard.watch(0, torch.tensor(1.0), torch.tensor(2.0))
    guard.watch(1, torch.tensor(value), torch.tensor(3.0))
    assert guard.bad_step() == pytest.approx((1, value, 3.0), nan_ok=True)


def test_a_gradient_that_overflows_in_fp16_is_not_noted(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler skips such a step by design; the mean over the others stays finite."""
    fp16 = Compute(device=torch.device("cpu"), precision="fp16", reason="to try the scaler")
    trainer = Trainer(train_config(), dataset, fp16, ALONE)
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    run_epoch(trainer)
    assert np.isfinite(trainer.progress.history[0].mean_abs_grad)


def test_the_scaler_goes_on_where_it_was(dataset: DataSet, tmp_path: Path) -> None:
    """fp16 from a scale of 2^40, which overflows for many steps: stopped in between, the same bytes."""
    fp16 = Compute(device=torch.device("cpu"), precision="fp16", reason="to try the scaler")
    states = []
    for stop_at in (0, 8):
        trainer = Trainer(train_config(epochs=3), dataset, fp16, ALONE)
        trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        for _ in range(3):
            for _ in trainer.steps():
                if trainer.num_steps == stop_at:
                    saved = trainer.checkpoint()
                    trainer = Trainer(train_config(epochs=3), dataset, fp16, ALONE)
                    trainer.step.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
                    trainer.restore(saved)
                    break
            if trainer.sums.num_steps < 6:
                for _ in trainer.steps():
                    pass
            trainer.validate()
        states.append({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
    assert same(*states)


def test_a_state_that_is_not_finite_is_not_saved(dataset: DataSet) -> None:
    """Running statistics may overflow while loss and gradients are finite."""
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    next(trainer.steps())
    trainer.network.get_buffer("blocks.2.branch.bn1.running_var").fill_(float("inf"))
    with pytest.raises(
        TrainingError, match=r"after step 1: network.blocks.2.branch.bn1.running_var and 0 other"
    ):
        trainer.checkpoint()


def test_a_validation_loss_that_is_not_finite_ends_the_training(dataset: DataSet) -> None:
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    for _ in trainer.steps():
        pass
    trainer.network.get_buffer("stem.bn.running_mean").fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"epoch 1: the validation loss is nan at learning rate 0\.1"):
        trainer.validate()
    assert trainer.progress.history == []
