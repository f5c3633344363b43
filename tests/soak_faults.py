"""Faults that the kill harness plants: in restores, and in checkpoints on the disk."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import train_alone
from soak_bench import CONFIG, Bench, finish, start, wait
from tqdm import tqdm

from sdpipe.data.store import open_dataset
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.trainer import Trainer

DAMAGES = (
    "flipped bits",
    "a truncated file",
    "a missing file",
    "swapped manifests",
    "swapped tensors",
    "zeros",
    "bytes added",
    "no folder",
)


def _broken_restores() -> dict[str, Callable[[], None]]:
    """Faults planted in the restoring process."""
    restore = Trainer.restore

    def losing(prefix: str) -> Callable[[], None]:
        def plant() -> None:
            def broken(self: Trainer, checkpoint: object) -> None:
                groups = self._groups()
                lost = {
                    name: tensor.clone()
                    for group, named in groups.items()
                    for name, tensor in named.items()
                    if f"{group}.{name}".startswith(prefix) or prefix in name
                }
                restore(self, checkpoint)  # type: ignore[arg-type]
                for named in self._groups().values():
                    for name, tensor in named.items():
                        if name in lost and lost[name].shape == tensor.shape:
                            with torch.no_grad():
                                tensor.copy_(lost[name])

            Trainer.restore = broken  # type: ignore[method-assign,assignment]

        return plant

    def after(change: Callable[[Trainer], object]) -> Callable[[], None]:
        def plant() -> None:
            def broken(self: Trainer, checkpoint: object) -> None:
                restore(self, checkpoint)  # type: ignore[arg-type]
                change(self)

            Trainer.restore = broken  # type: ignore[method-assign,assignment]

        return plant

    def one_step_back(trainer: Trainer) -> None:
        trainer.sums.num_steps -= 1

    def count_anew(trainer: Trainer) -> None:
        trainer.sums.num_active = 0

    return {
        "momentum is lost": losing("momentum."),
        "BatchNorm's running means are lost": losing("running_mean"),
        "the loss so far is lost": losing("sums.loss"),
        "one step is repeated": after(one_step_back),
        "the count of active blocks starts anew": after(count_anew),
        "one weight is off by 1e-5 of it": after(
            lambda trainer: trainer.network.head.weight.data[0, 0].mul_(1 + 1e-5)
        ),
    }


def broken_restores(bench: Bench) -> str:
    """Each planted fault must show as a difference, or in a crash."""
    planted = _broken_restores()
    for at, (name, plant) in enumerate(tqdm(planted.items(), desc="broken restores", disable=None)):
        trial = bench.new_trial(f"broken{at}")
        child = start(trial)
        while not list(trial.glob(".sdpipe/runs/*/step-0000000008")):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        wait(child)
        status = finish(trial, broken=plant)
        assert status != 0 or bench.faults(trial), f"not noticed: {name}"
    return f"{len(planted)} planted ({'; '.join(planted)}), all noticed"


def damages(bench: Bench, num_damages: int, chance: random.Random) -> str:
    """Damage one or both of two checkpoints; what is loaded must be one of them, bit for bit, or nothing."""
    sound = bench.folder / "sound"
    train_alone(CONFIG, open_dataset(bench.pristine / "data"), sound, every_steps=4)
    checkpoints = CheckpointFolder(sound, "0123456789abcdef")
    newest, _ = checkpoints.load_newest()
    assert newest is not None
    names = sorted(path.name for path in sound.iterdir())
    originals = {name: checkpoints._read(sound / name) for name in names}
    kinds: dict[str, int] = {}
    for at in tqdm(range(num_damages), desc="damaged checkpoints", disable=None):
        folder = bench.folder / "damaged"
        shutil.copytree(sound, folder)
        both = chance.random() < 0.2
        kind = _damage(folder, names if both else names[1:], names, chance)
        kinds[kind] = kinds.get(kind, 0) + 1
        found, told = CheckpointFolder(folder, "0123456789abcdef").load_newest()
        if found is not None:
            original = originals[f"step-{found.num_steps:010d}"]
            assert found.state == original.state, (at, kind)
            assert found.tensors.keys() == original.tensors.keys(), (at, kind)
            for name, tensor in found.tensors.items():
                assert tensor.numpy().tobytes() == original.tensors[name].numpy().tobytes(), (at, kind)
            assert found.num_steps < newest.num_steps, f"{kind} was not noticed"
        assert told or kind == "no folder", f"{kind} was passed over silently"
        shutil.rmtree(folder)
    listed = ", ".join(f"{count} with {kind}" for kind, count in sorted(kinds.items()))
    return f"{num_damages} ({listed}); none used, each that stood there named"


def _damage(folder: Path, victims: list[str], names: list[str], chance: random.Random) -> str:
    kind = chance.choice(DAMAGES)
    for name in victims:
        path = chance.choice(sorted((folder / name).iterdir()))
        raw = bytearray(path.read_bytes())
        if kind == "flipped bits":
            for _ in range(chance.choice((1, 1, 2, 8))):
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        elif kind == "a truncated file":
            raw = raw[: chance.randrange(len(raw))]
        elif kind == "zeros":
            start_at = chance.randrange(len(raw))
            raw[start_at : start_at + 512] = bytes(len(raw[start_at : start_at + 512]))
            raw[-1] ^= 255  # a region may have been zeros already
        elif kind == "bytes added":
            raw += chance.randbytes(chance.randrange(1, 100))
        if kind == "a missing file":
            path.unlink()
        elif kind == "no folder":
            shutil.rmtree(folder / name)
        elif kind.startswith("swapped"):
            swap = "SHA256SUMS" if kind == "swapped manifests" else "tensors.safetensors"
            first, second = (folder / other / swap for other in names)
            one, two = first.read_bytes(), second.read_bytes()
            first.write_bytes(two)
            second.write_bytes(one)
            break
        else:
            path.write_bytes(raw)
    return kind
