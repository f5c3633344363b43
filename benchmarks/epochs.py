"""The epoch table: what the training loop adds to its steps, next to a plain PyTorch script."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.bare import ALONE, BareStep
from benchmarks.plain import PlainScript
from benchmarks.settings import (
    IMAGE_SIZE,
    NUM_CHANNELS,
    NUM_CLASSES,
    Settings,
    checkpoint_every_s,
    train_config,
)
from benchmarks.timing import ratio, seconds, spread, take_turns
from sdpipe.data.store import DataSet, open_dataset, write_meta, write_part
from sdpipe.files import work_folder
from sdpipe.runtime.turns import Turn
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.compute import Compute
from sdpipe.training.config import CheckpointConfig, TrainConfig
from sdpipe.training.loop import MAX_COST, Saver, show_loss
from sdpipe.training.trainer import Trainer

KINDS = ("stochastic", "constant")
_TRAIN_PER_VALIDATION = 9  # 45,000 and 5,000 of CIFAR-10 (paper, section 4)


def make_dataset(folder: Path, num_train: int) -> DataSet:
    """Random pixels: so many images to train on, a ninth of that to validate on, a few to test on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = {"train": num_train, "validation": max(1, num_train // _TRAIN_PER_VALIDATION)}
    for part, num in (("train", sum(parts.values())), ("test", NUM_CLASSES)):
        shape = (num, IMAGE_SIZE, IMAGE_SIZE, NUM_CHANNELS)
        images_NHWC = rng.integers(0, 256, size=shape, dtype=np.uint8)
        write_part(folder, part, [(images_NHWC, np.arange(num) % NUM_CLASSES)])
    class_names = [str(k) for k in range(NUM_CLASSES)]
    write_meta(folder, name="random", class_names=class_names, source={}, train_parts=list(parts.items()))
    return open_dataset(folder)


class Loop:
    """sdpipe's loop in turns of some steps, with checkpoints when they are due by its own turns' time.

    Of `train()` it does all that happens between two validations: the steps, the progress bar with its loss,
    the questions behind each step. What is sent to MLflow comes behind a validation, from another thread.
    """

    def __init__(
        self, config: TrainConfig, dataset: DataSet, compute: Compute, folder: Path, every_s: float
    ) -> None:
        self.trainer = Trainer(config, dataset, compute, ALONE)
        self.saves_s: list[float] = []  # of each turn; 0: none was due
        self._checkpoints = CheckpointFolder(folder, "benchmark")
        self._every_s = every_s
        self._since_s = 0.0
        self._cost_s = 0.0
        self._steps = self.trainer.steps()
        self._bar = tqdm(unit="step", file=StringIO(), mininterval=0.1)  # drawn as on a terminal
        self._saver = Saver(self._checkpoints, CheckpointConfig(every_s=every_s, every_steps=0), ALONE)

    def turn(self, num_steps: int) -> float:
        """Take so many steps and save if that is due; seconds of the steps alone."""
        taken_s = self.take(num_steps)
        self._since_s += taken_s
        due = self._since_s >= max(self._every_s, self._cost_s / MAX_COST)  # as in sdpipe.training.loop
        self.saves_s.append(self.save() if due else 0.0)
        return taken_s

    def take(self, num_steps: int) -> float:
        """Take so many steps of one epoch, the next one if this is at its end; seconds."""
        if self.trainer.sums.num_steps == self.trainer.steps_per_epoch:
            self.validate()

        def work() -> None:
            for _ in range(num_steps):
                next(self._steps)
                self._bar.update()
                show_loss(self._bar, self.trainer)
                ALONE.any(False, self._saver.is_due(self.trainer.num_steps))

        return seconds(work, self.trainer.compute.device)

    def save(self) -> float:
        """Write a checkpoint; seconds."""
        self._cost_s = seconds(
            lambda: self._checkpoints.save(self.trainer.checkpoint()), self.trainer.compute.device
        )
        self._since_s = 0.0
        return self._cost_s

    def validate(self) -> float:
        """End the epoch where it is, and begin the next; seconds."""

        def end() -> None:
            self.trainer.validate()

        taken_s = seconds(end, self.trainer.compute.device)
        self._steps = self.trainer.steps()
        return taken_s


def bare_turn(loop: Loop, num_steps: int) -> Turn:
    """The loop's steps, with the blocks that it draws, on its first mini-batch again and again."""
    trainer = loop.trainer
    (batch,) = next(trainer.batches.epoch(0, range(1), trainer.step.parts))
    step = BareStep(trainer.config, trainer.compute, batch)
    probs = trainer.network.config.survival_probs
    taken = 0

    def turn() -> float:
        nonlocal taken
        numbers = [divmod(taken + at, trainer.steps_per_epoch) for at in range(num_steps)]
        drawn = [trainer.draws.active_blocks(*number, probs) for number in numbers]
        taken += num_steps

        def work() -> None:
            for active in drawn:
                step.take(active)

        return seconds(work, trainer.compute.device)

    return turn


@dataclass(kw_only=True)
class _Measured:
    """Seconds of each variant's turns, and of what the loops saved meanwhile, (rounds,)."""

    turns_s: dict[str, np.ndarray]
    saves_s: dict[str, np.ndarray]


def measure_epochs(settings: Settings, compute: Compute) -> dict[str, Any]:
    """The loop, the bare step and a plain script by turns; see `Settings`.

    Data and checkpoints go to a folder in `.sdpipe/`, which is removed.
    """
    config = train_config(depth=settings.epoch_depth, batch_size=settings.batch_size, p_L=settings.p_L)
    configs = dict(zip(KINDS, (config, config.model_copy(update={"p_L": 1.0})), strict=True))
    num_train = settings.epoch_steps * config.batch_size
    every_s = checkpoint_every_s()
    with TemporaryDirectory(prefix="benchmark-", dir=work_folder()) as name:
        folder = Path(name)
        dataset = make_dataset(folder / "data", num_train)
        loops = {kind: Loop(configs[kind], dataset, compute, folder / kind, every_s) for kind in KINDS}
        assert isinstance(dataset.train_images, np.ndarray)
        in_memory = np.array(dataset.train_images[:num_train])
        labels_N = dataset.train_labels_N[:num_train]
        script = PlainScript(configs["constant"], in_memory, labels_N, compute.device, settings.workers)
        with closing(script):
            measured = _take_turns(settings, loops, script)
        extras = _saving_and_validating(loops["stochastic"], settings.repeats, every_s)
    return {**_ratios(settings, measured), **extras}


def _take_turns(settings: Settings, loops: dict[str, Loop], script: PlainScript) -> _Measured:
    chunk = settings.chunk
    turns: dict[str, Turn] = {}
    for kind, loop in loops.items():
        turns[f"bare_{kind}"] = bare_turn(loop, chunk)
        turns[f"loop_{kind}"] = _turn_of(loop.turn, chunk)
    turns["plain"] = _turn_of(script.turn, chunk)
    rounds = settings.epoch_rounds
    turns_s = take_turns(turns, rounds=rounds, warmup=settings.warmup, label="epochs")
    saves_s = {f"loop_{kind}": np.array(loop.saves_s[settings.warmup :]) for kind, loop in loops.items()}
    return _Measured(turns_s=turns_s, saves_s=saves_s)


def _turn_of(take: Callable[[int], float], num_steps: int) -> Turn:
    return lambda: take(num_steps)


def _saving_and_validating(loop: Loop, repeats: int, every_s: float) -> dict[str, Any]:
    """Both again and again, with a step before each save, since the same step is not saved twice."""
    validations_s, saves_s = [], []
    for _ in range(repeats):
        loop.take(1)
        validations_s.append(loop.validate())
        loop.take(1)
        saves_s.append(loop.save())
    saving = spread(np.array(saves_s))
    return {
        "validation": {
            "num_images": len(loop.trainer.validation_indices),
            "seconds": spread(np.array(validations_s)),
        },
        "checkpoint": {
            "every_s": every_s,
            "seconds": saving,
            "share": saving["median"] / max(every_s, saving["median"] / MAX_COST),
        },
    }


def _ratios(settings: Settings, measured: _Measured) -> dict[str, Any]:
    """Of each variant to the bare step at its own survival probabilities, and of the script to the loops."""
    rows: dict[str, Any] = {}
    num_images = settings.chunk * settings.batch_size
    for name, times_s in measured.turns_s.items():
        bare_s = measured.turns_s["bare_constant" if name == "plain" else f"bare_{name.split('_')[1]}"]
        rows[name] = {
            "step_s": spread(times_s / settings.chunk),
            "images_per_s": spread(num_images / times_s),
            "ratio": ratio(times_s, bare_s),
        }
        if name in measured.saves_s:
            saves_s = measured.saves_s[name]
            rows[name]["num_checkpoints"] = int(np.count_nonzero(saves_s))
            rows[name]["ratio_with_checkpoints"] = ratio(times_s + saves_s, bare_s)
    plain_s = measured.turns_s["plain"]
    return {
        "rows": rows,
        "plain_to_loop": {kind: ratio(plain_s, measured.turns_s[f"loop_{kind}"]) for kind in KINDS},
    }
