"""Runs for the tests of the report, written as a training writes them."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import make_weights, train_config

from sdpipe.training.progress import EpochRecord, EpochTiming, Progress, TrainResult
from sdpipe.training.run_files import write_training

FULL = {"dataset": "cifar10", "depth": 110, "widths": [16, 32, 64], "epochs": 500, "milestones": [250, 375]}
FULL |= {"shift_px": 4, "batch_size": 128, "validation": 0.1, "num_train": 45_000, "image_size": (32, 32)}
_WEIGHTS = make_weights(depth=8, widths=(2, 2, 2))


def write_run(
    folder: Path,
    *,
    test_error: float = 0.1,
    epoch_s: float = 10.0,
    validated_at: Sequence[float] = (1, 2, 3),
    hardware: str = "a machine, 2 cores",
    digest: str = "d" * 64,
    class_names: Sequence[str] = ("cat", "dog", "eel"),
    image_size: tuple[int, int] = (9, 9),
    num_train: int = 9000,
    **overrides: Any,
) -> str:
    """Write models/<run>/; returns the fingerprint. The second validation has the lowest error.

    validated_at: epochs, also fractions of them.
    """
    params = train_config(**overrides).model_dump(mode="json")
    fingerprint = hashlib.sha256(f"{folder.name} {sorted(params.items())}".encode()).hexdigest()[:16]
    errors = [0.5, 0.25, *(0.375 for _ in validated_at[2:])]
    history = [
        EpochRecord(
            epoch=epoch,
            learning_rate=0.1 if epoch <= 2 else 0.01,
            train_loss=2.0 / epoch,
            validation_loss=2.0 / epoch,
            validation_error=error,
            blocks_active=6.5,
            mean_abs_grad=0.01 / epoch,
        )
        for epoch, error in zip(validated_at, errors, strict=False)
    ]
    timing = [EpochTiming(epoch=row.epoch, epoch_s=epoch_s, images_per_s=100.0) for row in history]
    result = TrainResult(
        state=_WEIGHTS.state,
        normalisation=_WEIGHTS.normalisation,
        progress=Progress(history=history, timing=timing, hardware=[hardware]),
        test_error=test_error,
        num_train=num_train,
        num_validation=1000,
    )
    info = replace(
        _WEIGHTS.info,
        dataset=params["dataset"],
        dataset_digest=digest,
        class_names=tuple(class_names),
        image_size=image_size,
        fingerprint=fingerprint,
        best_epoch=validated_at[1],
        train_params=params,
    )
    measured = {"compute": "fp32", "git_commit": "a" * 40, "git_dirty": False}
    write_training(folder, result, info, measured)
    return fingerprint


def write_ensemble(folder: Path, fingerprint: str) -> None:
    """ensemble.csv of a run for 1 and 4 members and two draws, with a row of an earlier training."""
    lines = ["fingerprint,members,seed,ensemble_error,test_network_error,ensemble_nll,test_network_nll"]
    for seed in (0, 1):
        lines += [f"{fingerprint},1,{seed},0.2{seed},0.1,0.5,0.3", f"{fingerprint},4,{seed},0.12,0.1,0.4,0.3"]
    lines.append("0000000000000000,1,0,0.9,0.9,9,9")
    (folder / "ensemble.csv").write_text("\n".join(lines) + "\n")


def rows_of(path: Path) -> list[dict[str, str]]:
    """By Python's own reader, empty cells as ''."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def two_seeds(models: Path, **overrides: Any) -> None:
    """Constant 0.10 and 0.20 in 30 s and 33 s, stochastic 0.30 and 0.32 in 24 s and 24 s."""
    for seed, (constant, seconds, stochastic) in enumerate([(0.10, 10.0, 0.30), (0.20, 11.0, 0.32)]):
        write_run(models / f"c{seed}", test_error=constant, epoch_s=seconds, p_L=1.0, seed=seed, **overrides)
        write_run(models / f"s{seed}", test_error=stochastic, epoch_s=8.0, p_L=0.5, seed=seed, **overrides)
