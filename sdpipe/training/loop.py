"""The training loop: one run, from arrays to the weights of the epoch with the lowest validation error."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.errors import LoadingError
from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder
from sdpipe.training.compute import Compute
from sdpipe.training.config import CheckpointConfig, MachineConfig, TrainConfig
from sdpipe.training.interruption import Interruption, say
from sdpipe.training.progress import Progress, TrainResult
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World

MAX_LINES = 20  # of progress where there is no terminal to draw a bar in
MAX_COST = 0.02  # of the time may go into checkpoints that are written because of the time
_BAR_S = 0.5  # between two looks at the loss

OnEpoch = Callable[[Progress], None]


class Saver:
    """Writes checkpoints when they are due."""

    def __init__(self, folder: CheckpointFolder | None, config: CheckpointConfig, world: World) -> None:
        """folder: None in a process that does not lead."""
        self._folder = folder
        self._world = world
        self._config = config
        self._cost_s = 0.0
        self._last = time.monotonic()

    def is_due(self, num_steps: int) -> bool:
        """By step, or by time, but not so often that it would cost more than MAX_COST; the leader knows."""
        if self._folder is None:
            return False
        every_steps, every_s = self._config.every_steps, self._config.every_s
        if every_steps and num_steps % every_steps == 0:
            return True
        return time.monotonic() - self._last >= max(every_s, self._cost_s / MAX_COST)

    def save(self, trainer: Trainer) -> None:
        """Write the trainer's state; called in all processes, who wait for the leader."""
        if self._folder is not None:
            started = time.monotonic()
            self._folder.save(trainer.checkpoint())
            self._last = time.monotonic()
            self._cost_s = self._last - started
        self._world.wait()


def train(
    config: TrainConfig,
    dataset: DataSet,
    compute: Compute,
    world: World,
    *,
    checkpoints: CheckpointFolder | None,
    machine: MachineConfig,
    start: Checkpoint | None,
    on_epoch: OnEpoch,
    interruption: Interruption,
) -> TrainResult:
    """Train one run, from a checkpoint if there is one.

    checkpoints: where to save, in the process that leads; machine: when.
    start: what to continue from, in the process that leads.
    on_epoch: called after each epoch, and at the start of a continued run, with the progress so far.
    An interruption ends the step, saves, and raises KeyboardInterrupt or SystemExit.
    Raises ConfigError, DataError, TrainingError.
    """
    with _ended_without_images(interruption):  # mean and deviation are taken
        trainer = Trainer(config, dataset, compute, world, machine.workers)
    trainer.restore(start)
    if trainer.num_steps:
        on_epoch(trainer.progress)
    saver = Saver(checkpoints, machine.checkpoint, world)
    total = config.epochs * trainer.steps_per_epoch

    silent = None if world.leads and sys.stderr is not None else True
    with tqdm(total=total, initial=trainer.num_steps, unit="step", disable=silent) as bar:
        while trainer.epoch < config.epochs:
            with _saved_without_images(saver, trainer, interruption):
                for _ in trainer.steps():
                    bar.update()
                    show_loss(bar, trainer)
                    asked, is_due = world.any(interruption.requested, saver.is_due(trainer.num_steps))
                    if asked:
                        _save_and_end(saver, trainer, interruption)
                    # Before a validation it is not saved, but behind it.
                    if is_due and not trainer.lacks_validation_only:
                        saver.save(trainer)
                if not trainer.validate(lambda: world.size == 1 and interruption.requested):
                    _save_and_end(saver, trainer, interruption)
            _show_epoch(bar, trainer)
            on_epoch(trainer.progress)
            (is_due,) = world.any(saver.is_due(trainer.num_steps))
            if is_due:
                saver.save(trainer)
    saver.save(trainer)
    return trainer.finish()


@contextmanager
def _saved_without_images(saver: Saver, trainer: Trainer, interruption: Interruption) -> Iterator[None]:
    """Save when the next images cannot be had: all steps so far are whole."""
    with _ended_without_images(interruption):
        try:
            yield
        except LoadingError:
            saver.save(trainer)
            raise


@contextmanager
def _ended_without_images(interruption: Interruption) -> Iterator[None]:
    """If this process was asked to end, so were those that decode the images: that they did is no failure."""
    try:
        yield
    except LoadingError:
        if interruption.requested:
            interruption.end()
        raise


def _save_and_end(saver: Saver, trainer: Trainer, interruption: Interruption) -> None:
    saver.save(trainer)
    interruption.end()


def show_loss(bar: "tqdm[Any]", trainer: Trainer) -> None:
    """The loss so far, where looking at it makes no device wait."""
    if bar.disable or trainer.compute.device.type != "cpu":
        return
    now = time.monotonic()
    if now - getattr(bar, "looked_at", 0.0) >= _BAR_S:
        bar.looked_at = now  # type: ignore[attr-defined]
        mean = trainer.sums.loss.item() / (trainer.sums.num_steps - trainer.sums.first_step)
        bar.set_postfix_str(f"epoch {trainer.epoch + 1}/{trainer.config.epochs}, loss {mean:.3f}")


def _show_epoch(bar: "tqdm[Any]", trainer: Trainer) -> None:
    record, epochs = trainer.progress.history[-1], trainer.config.epochs
    bar.set_postfix_str(
        f"epoch {record.epoch:.4g}/{epochs}, loss {record.train_loss:.3f}, "
        f"error {record.validation_error:.4f}, best {trainer.progress.best.validation_error:.4f}"
    )
    num_validations = epochs * math.ceil(
        trainer.steps_per_epoch / (trainer.config.validate_steps or trainer.steps_per_epoch)
    )
    is_shown = len(trainer.progress.history) % max(1, num_validations // MAX_LINES) == 0
    if bar.disable and trainer.world.leads and is_shown:
        say(
            f"epoch {record.epoch:.4g}/{epochs}: loss {record.train_loss:.4f}, "
            f"validation error {record.validation_error:.4f}"
        )
