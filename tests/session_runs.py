"""Trainings in this process, and the files that they leave."""

from pathlib import Path

from conftest import machine, train_config

from sdpipe.data.store import DataSet
from sdpipe.training.session import train_run

RESULTS = ("weights.safetensors", "history.csv", "train.json")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def run_to(folder: Path, dataset: DataSet, **overrides: object) -> dict[str, bytes]:
    train_run("plain", train_config(**overrides), machine(), dataset, "code", folder)
    return results(folder)
