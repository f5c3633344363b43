"""The files that `train` leaves in models/<run>/, and reading them back: they are the truth about a run."""

import csv
from io import StringIO
from pathlib import Path
from typing import Any

from sdpipe.errors import DataError
from sdpipe.files import write_json, write_records
from sdpipe.network import expected_depth
from sdpipe.training.progress import EpochRecord, EpochTiming, TrainResult
from sdpipe.training.weights import ModelInfo, Weights, save_weights

CONTINUED_ON = ", then "
"""Between the machines of a training that was continued on another."""


def write_training(folder: Path, result: TrainResult, info: ModelInfo, measured: dict[str, Any]) -> None:
    """Write weights.safetensors, history.csv, train.json, and the measured timing.csv and timing.json.

    measured: how and of what (precision, git state), kept with the times, out of what later stages read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = Weights(info=info, normalisation=result.normalisation, state=result.state)
    save_weights(folder / "weights.safetensors", weights)
    write_records(folder / "history.csv", EpochRecord, result.progress.history)
    write_records(folder / "timing.csv", EpochTiming, result.progress.timing)
    best = result.progress.best
    summary = {
        "test_error": result.test_error,
        "validation_error": best.validation_error,
        "best_epoch": best.epoch,
        "num_epochs": result.progress.epochs_done,
        "num_train": result.num_train,
        "num_validation": result.num_validation,
        "num_parameters": sum(
            tensor.numel() for name, tensor in result.state.items() if name.endswith((".weight", ".bias"))
        ),
        "num_blocks": info.network.num_blocks,
        "expected_depth": expected_depth(info.network.survival_probs),
        "fingerprint": info.fingerprint,
    }
    write_json(folder / "train.json", summary)
    timing = result.progress.timing
    images_per_s = sorted(row.images_per_s for row in timing)[len(timing) // 2]
    train_s = sum(row.epoch_s for row in timing)
    write_json(
        folder / "timing.json",
        {
            "train_s": train_s,
            "images_per_s": images_per_s,
            "hardware": CONTINUED_ON.join(dict.fromkeys(result.progress.hardware)),
            **measured,
        },
    )


def run_name(folder: Path) -> str:
    """That of models/<run>/, also where its path is `.`; a link has its own."""
    return folder.absolute().name


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of history.csv or timing.csv, all numbers. Raises DataError if it is missing or damaged."""
    try:
        return [{name: float(value) for name, value in row.items()} for row in read_cells(path)]
    except ValueError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_cells(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header. Raises DataError if it is missing, empty or cut short."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(StringIO(text)))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not text:
        raise DataError(f"{path}: is empty")
    if not text.endswith("\n"):  # a number that was cut short is one still
        raise DataError(f"{path}: the last line is cut short")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{path}: row {number} has another number of cells than the header")
    return rows
