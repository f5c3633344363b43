"""What is noted of each epoch, which epoch is kept, and what a training hands over at its end."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdpipe.data.augment import Normalisation


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of history.csv: the same inputs give the same numbers."""

    epoch: int  # from 1
    learning_rate: float
    train_loss: float  # mean cross-entropy over the epoch's training steps
    validation_loss: float
    validation_error: float  # fraction
    blocks_active: float  # mean number of active blocks in a step
    mean_abs_grad: float  # of block 1's first convolution, mean over the steps in which block 1 was active


@dataclass(frozen=True, kw_only=True)
class EpochTiming:
    """One line of timing.csv: wall-clock times, which differ from run to run."""

    epoch: int
    epoch_s: float
    images_per_s: float  # training images over the time of the training steps


@dataclass(kw_only=True)
class Progress:
    """What has been learned of the run so far; JSON-able, part of each checkpoint."""

    history: list[EpochRecord] = field(default_factory=list)
    timing: list[EpochTiming] = field(default_factory=list)

    @property
    def best(self) -> EpochRecord:
        """The epoch of lowest validation error; of equal ones the last, whose learning rate is lowest."""
        return min(reversed(self.history), key=lambda record: record.validation_error)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Progress":
        """What `dataclasses.asdict` made of it."""
        return cls(
            history=[EpochRecord(**record) for record in value["history"]],
            timing=[EpochTiming(**record) for record in value["timing"]],
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
