"""What is noted of each epoch, which epoch is kept, and what a training hands over at its end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdpipe.data.augment import Normalisation


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of history.csv, a validation: the same inputs give the same numbers.

    What is a mean is one over the training steps since the validation before.
    """

    epoch: float  # epochs done; whole at the end of an epoch, 1 at that of the first
    learning_rate: float
    train_loss: float  # mean cross-entropy over the training steps
    validation_loss: float
    validation_error: float  # fraction
    blocks_active: float  # mean number of active blocks in a step
    mean_abs_grad: float  # of block 1's first convolution, mean over the steps in which block 1 was active


@dataclass(frozen=True, kw_only=True)
class EpochTiming:
    """One line of timing.csv: wall-clock times, which differ from run to run."""

    epoch: float
    epoch_s: float  # of the steps since the validation before, and this validation
    images_per_s: float  # training images over the time of the training steps


@dataclass(kw_only=True)
class Sums:
    """What is added up between two validations. The scalars on the device wait there until the second."""

    loss: Tensor
    gradient: Tensor  # mean absolute value, over the steps in which block 1 was active
    num_gradients: Tensor
    first_step: int  # of the epoch, behind the validation before
    num_steps: int  # of the epoch, so far
    num_active: float = 0.0
    train_s: float = 0.0
    last_tick: float = field(default_factory=time.perf_counter)

    @classmethod
    def zero(cls, device: torch.device, step: int = 0) -> "Sums":
        """Nothing added up yet, behind so many steps of the epoch."""
        zero = torch.zeros((), device=device)
        return cls(
            loss=zero, gradient=zero.clone(), num_gradients=zero.clone(), first_step=step, num_steps=step
        )

    def tick(self) -> None:
        """Count the time since the last tick as training."""
        now = time.perf_counter()
        self.train_s += now - self.last_tick
        self.last_tick = now


@dataclass(kw_only=True)
class Progress:
    """What has been learned of the run so far; JSON-able, part of each checkpoint."""

    history: list[EpochRecord] = field(default_factory=list)
    timing: list[EpochTiming] = field(default_factory=list)
    hardware: list[str] = field(default_factory=list)  # that it ran on, in this order

    @property
    def epochs_done(self) -> int:
        """Whole epochs, with their validation."""
        return int(self.history[-1].epoch) if self.history else 0

    @property
    def epoch_errors(self) -> list[float]:
        """The validation error at the end of each whole epoch."""
        return [record.validation_error for record in self.history if record.epoch == int(record.epoch)]

    @property
    def best(self) -> EpochRecord:
        """The validation of lowest error; of equal ones the last, whose learning rate is lowest."""
        return min(reversed(self.history), key=lambda record: record.validation_error)

    def continued_on(self, hardware: Sequence[str]) -> "Progress":
        """The same, with what it goes on on, where that is something else."""
        is_same = self.hardware[-1:] == list(hardware)
        return replace(self, hardware=self.hardware if is_same else [*self.hardware, *hardware])

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Progress":
        """What `dataclasses.asdict` made of it."""
        return cls(
            history=[EpochRecord(**record) for record in value["history"]],
            timing=[EpochTiming(**record) for record in value["timing"]],
            hardware=value["hardware"],
        )


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome: weights of the best epoch, its test error, and how it went."""

    state: dict[str, Tensor]
    normalisation: Normalisation
    progress: Progress
    test_error: float
    num_train: int
    num_validation: int
