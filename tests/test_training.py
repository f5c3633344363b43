"""The loop: the paper's update, the same bytes each time, from any step on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, CPU, run_epoch, same, train_alone, train_config
from torch import nn

from sdpipe.data.store import DataSet
from sdpipe.training.config import CheckpointConfig
from sdpipe.training.interruption import Interruption
from sdpipe.training.loop import Saver
from sdpipe.training.progress import EpochRecord, Progress
from sdpipe.training.trainer import Trainer


def test_it_learns(dataset: DataSet, tmp_path: Path) -> None:
    """Three classes of stripes: chance is an error of 2/3."""
    result = train_alone(train_config(epochs=12, milestones=[9], p_L=0.8), dataset, tmp_path)
    assert result.test_error <= 0.15


def test_a_plateau_of_the_validation_error_divides_the_rate(dataset: DataSet, tmp_path: Path) -> None:
    """By 10 for the next epoch, after each epoch that is no better than the best before."""
    config = train_config(epochs=8, milestones=[], plateau_epochs=1)
    rate, best, dropped = 0.1, 1.1, 0
    for record in train_alone(config, dataset, tmp_path).progress.history:
        assert record.learning_rate == pytest.approx(rate, rel=1e-9)
        if record.validation_error >= best:
            rate, dropped = rate / 10, dropped + 1
        best = min(best, record.validation_error)
    assert dropped, "the example has a plateau"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dataset: DataSet, tmp_path: Path) -> None:
    first, second, other = (
        train_alone(train_config(seed=seed), dataset, tmp_path / str(at)) for at, seed in enumerate((0, 0, 1))
    )
    assert same(first.state, second.state)
    assert first.progress.history == second.progress.history
    assert not same(first.state, other.state)


class StopAfter(Interruption):
    """As if SIGTERM came during the n-th step: the loop asks once after each."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(lambda: None)
        self.left = num_steps

    @property
    def requested(self) -> bool:
        """Asked once a step and once a batch of validation images."""
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("overrides", [{"draw": "sample"}, {"dropout": 0.2}, {"skip": "C"}], ids=str)
def test_it_learns_and_continues_in_other_ways(
    dataset: DataSet, tmp_path: Path, overrides: dict[str, object]
) -> None:
    """Drawn for each image, with dropout, with projections: to the bit after a stop within an epoch."""
    config = train_config(micro_batches=2, epochs=6, milestones=[4], **overrides)
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(config, dataset, tmp_path / "stopped", interruption=StopAfter(9))
    assert same(whole.state, train_alone(config, dataset, tmp_path / "stopped").state)
    assert whole.test_error <= 0.5
    assert whole.progress.history[-1].train_loss < whole.progress.history[0].train_loss


@pytest.mark.parametrize("asked", range(1, 21))
def test_a_run_stopped_at_any_step_continues_and_ends_the_same(
    dataset: DataSet, tmp_path: Path, asked: int
) -> None:
    """3 epochs of 6 steps and a validation: weights, history and test error to the bit.

    Two micro-batches and a scaler's absence are the harder case: BatchNorm moves twice a step.
    """
    config = train_config(micro_batches=2)
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(config, dataset, tmp_path / "stopped", interruption=StopAfter(asked))
    continued = train_alone(config, dataset, tmp_path / "stopped")
    assert same(whole.state, continued.state)
    assert whole.progress.history == continued.progress.history
    assert whole.test_error == continued.test_error


def test_where_checkpoints_are_written_changes_nothing(dataset: DataSet, tmp_path: Path) -> None:
    often, seldom = (
        train_alone(train_config(), dataset, tmp_path / str(every), every_steps=every) for every in (1, 0)
    )
    assert same(often.state, seldom.state)
    assert often.progress.history == seldom.progress.history


def trainer_with_inactive_block(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, **overrides: object
) -> Trainer:
    """A training in which block 4 (of 9, from 0) is never active and the others always are."""
    trainer = Trainer(train_config(**overrides), dataset, CPU, ALONE)
    active = [at != 4 for at in range(9)]
    monkeypatch.setattr(trainer.draws, "active_blocks", lambda *_arguments: active)
    return trainer


def test_an_inactive_block_is_still_decayed(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 0, not None. By hand, with Nesterov momentum m, decay d, rate r, all steps g = d w:

    v = m v + g;  w = w - r (g + m v). One epoch has 96 // 16 = 6 steps.
    """
    trainer = trainer_with_inactive_block(dataset, monkeypatch, weight_decay=0.1)
    weight = trainer.network.get_parameter("blocks.4.branch.conv1.weight")
    expected = weight.detach().double().clone()
    velocity = torch.zeros_like(expected)
    assert trainer.steps_per_epoch == 6
    for _ in range(6):
        gradient = 0.1 * expected
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.1 * (gradient + 0.9 * velocity)
    run_epoch(trainer)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_an_inactive_block_is_carried_by_its_momentum(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decay and gradient: v_k = m^k v_0 and w falls by r m v_k in each step k = 1..6."""
    trainer = trainer_with_inactive_block(dataset, monkeypatch, weight_decay=0.0)
    weight = trainer.network.get_parameter("blocks.4.branch.conv2.weight")
    before = weight.detach().clone()
    trainer.step.momentum()["blocks.4.branch.conv2.weight"].fill_(1.0)
    run_epoch(trainer)
    fall = sum(0.1 * 0.9 * 0.9**k for k in range(1, 7))
    torch.testing.assert_close(weight.detach(), before - fall, rtol=1e-5, atol=1e-6)


def test_batchnorm_of_an_inactive_block_keeps_its_statistics(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    run_epoch(trainer)
    assert not trainer.network.get_buffer("blocks.4.branch.bn1.running_mean").any()
    assert trainer.network.get_buffer("blocks.5.branch.bn1.running_mean").any()


def test_history_records_what_was_drawn(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    run_epoch(trainer)
    (record,) = trainer.progress.history
    assert record.blocks_active == 8
    assert record.learning_rate == 0.1
    assert record.mean_abs_grad > 0


def test_the_gradient_of_figure_7_is_that_of_block_1(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of |gradient| over the weights of its first convolution, and over an epoch's steps."""
    trainer = Trainer(train_config(p_L=1.0), dataset, CPU, ALONE)
    weight, means = trainer.network.get_parameter("blocks.0.branch.conv1.weight"), []
    weight.register_post_accumulate_grad_hook(lambda each: means.append(each.grad.abs().mean().item()))
    run_epoch(trainer)
    (record,) = trainer.progress.history
    assert len(means) == trainer.steps_per_epoch
    assert record.mean_abs_grad == pytest.approx(float(np.mean(means)), rel=1e-5)


def test_constant_depth_uses_every_block(dataset: DataSet, tmp_path: Path) -> None:
    result = train_alone(train_config(p_L=1.0, epochs=1, milestones=[]), dataset, tmp_path)
    assert result.progress.history[0].blocks_active == 9


def record(epoch: int, error: float) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        learning_rate=0.1,
        train_loss=1.0,
        validation_loss=1.0,
        validation_error=error,
        blocks_active=9.0,
        mean_abs_grad=0.1,
    )


def test_the_epoch_of_lowest_validation_error_is_kept() -> None:
    """Of equal ones the last; never the best test error, which is not even measured before the end."""
    errors = [0.5, 0.2, 0.3, 0.2, 0.4]
    progress = Progress(history=[record(at, error) for at, error in enumerate(errors, start=1)])
    assert progress.best.epoch == 4


def test_the_reported_test_error_is_that_of_the_kept_epoch(dataset: DataSet, tmp_path: Path) -> None:
    """Measured again from the returned weights, one image at a time."""
    result = train_alone(train_config(epochs=4), dataset, tmp_path)
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    trainer.network.load_state_dict(result.state)
    trainer.network.eval()
    wrong = 0
    with torch.no_grad():
        for image, label in zip(dataset.test_images_NHWC, dataset.test_labels_N, strict=True):
            pixels = torch.from_numpy(np.array(image[None]))
            wrong += int(trainer.network(trainer.normalise(pixels).permute(0, 3, 1, 2)).argmax()) != label
    assert result.test_error == wrong / len(dataset.test_labels_N)


def test_a_checkpoint_is_due_by_step_and_by_time_and_never_costs_more_than_2_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save of 3 s is followed by 150 s of training, though every 10 s were asked for."""
    now = 0.0
    monkeypatch.setattr("sdpipe.training.loop.time.monotonic", lambda: now)

    class SlowFolder:
        def save(self, _checkpoint: object) -> None:
            nonlocal now
            now += 3.0

    class Idle:
        def checkpoint(self) -> None:
            """Has no state."""

    saver = Saver(SlowFolder(), CheckpointConfig(every_s=10.0, every_steps=7), ALONE)  # type: ignore[arg-type]
    assert [step for step in range(1, 22) if saver.is_due(step)] == [7, 14, 21]
    now = 9.9
    assert not saver.is_due(1)
    now = 10.0
    assert saver.is_due(1)
    saver.save(Idle())  # type: ignore[arg-type]
    now = 13.0 + 149.9
    assert not saver.is_due(2)
    now = 13.0 + 150.0
    assert saver.is_due(2)


def test_validations_within_an_epoch(dataset: DataSet, tmp_path: Path) -> None:
    """96 images in batches of 16 are 6 steps: with one every 4 an epoch is validated after 4 and after 6.

    The steps are the same as without, and so are the epochs' last validations.
    """
    often = train_alone(train_config(validate_steps=4), dataset, tmp_path / "often")
    seldom = train_alone(train_config(), dataset, tmp_path / "seldom")
    history = often.progress.history
    assert [row.epoch for row in history] == pytest.approx([4 / 6, 1, 1 + 4 / 6, 2, 2 + 4 / 6, 3])
    whole = [row for row in history if row.epoch == int(row.epoch)]
    for ours, theirs in zip(whole, seldom.progress.history, strict=True):
        assert ours.validation_loss == theirs.validation_loss
    losses = [row.train_loss for row in history]
    assert seldom.progress.history[0].train_loss == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6)
    assert often.progress.best.validation_error == min(row.validation_error for row in history)


@pytest.mark.parametrize("kept", [1, 2])
def test_resume_between_validations_within_an_epoch(dataset: DataSet, tmp_path: Path, kept: int) -> None:
    """Continued inside an epoch, before or behind a validation: the same as never stopped."""
    config = train_config(validate_steps=2, epochs=2)
    whole = train_alone(config, dataset, tmp_path / "whole")

    class _StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if len(progress.history) == kept + 1:
            raise _StoppedError

    folder = tmp_path / "stopped"
    with pytest.raises(_StoppedError):
        train_alone(config, dataset, folder, every_steps=1, on_epoch=stop)
    continued = train_alone(config, dataset, folder)
    assert continued.progress.history == whole.progress.history
    assert all(torch.equal(tensor, continued.state[name]) for name, tensor in whole.state.items())


def test_p_L_warmup_starts_at_constant_depth(dataset: DataSet, tmp_path: Path) -> None:
    """In the first of two warm-up epochs all 9 blocks are active in every step, later fewer are."""
    history = train_alone(train_config(p_L_warmup_epochs=2, epochs=4), dataset, tmp_path).progress.history
    assert history[0].blocks_active == 9
    assert history[3].blocks_active < history[0].blocks_active


def test_no_step_walks_through_the_modules(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 110 layers that took 2 ms a step, in which a GPU waits for the processor."""
    trainer = Trainer(train_config(micro_batches=2), dataset, CPU, ALONE)
    steps = trainer.steps()
    next(steps)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_args, **_options: pytest.fail("it does"))
    monkeypatch.setattr(nn.Module, "train", lambda *_args: pytest.fail("it does"))
    next(steps)
