"""What is measured: the command's options, and the recipe around them, which is the paper's for CIFAR-10."""

from dataclasses import dataclass
from pathlib import Path

from sdpipe.config import get_value, parse_section, read_params
from sdpipe.recipes import load_recipes
from sdpipe.training.config import MachineConfig, TrainConfig

PARAMS_PATH = Path(__file__).resolve().parent.parent / "params.yaml"
IMAGE_SIZE, NUM_CHANNELS, NUM_CLASSES = 32, 3, 10  # CIFAR-10's


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `python -m benchmarks.training`, which has the defaults and says what they mean."""

    depth: int
    batch_size: int  # images
    p_L: float
    steps: int  # counted rounds of the step table
    warmup: int  # rounds of either table before those that count
    epoch_depth: int
    epoch_steps: int  # of an epoch, and of each variant in the counted rounds of the epoch table
    chunk: int  # steps of one turn in the epoch table
    repeats: int  # of saving and of validating
    workers: int  # of the plain script's DataLoader

    @property
    def epoch_rounds(self) -> int:
        """Counted rounds of the epoch table."""
        return self.epoch_steps // self.chunk


def train_config(*, depth: int, batch_size: int, p_L: float) -> TrainConfig:
    """The recipe cifar10 for such a network, whatever params.yaml holds."""
    recipe = {**load_recipes()["cifar10"].train, "depth": depth, "batch_size": batch_size, "p_L": p_L}
    return parse_section(TrainConfig, recipe, "train")


def checkpoint_every_s() -> float:
    """Seconds between two checkpoints, from params.yaml. Raises ConfigError."""
    machine = get_value(read_params(PARAMS_PATH), "machine")
    return parse_section(MachineConfig, machine, "machine").checkpoint.every_s
