"""Trainings in this process or in one of their own, and what they leave."""

import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, machine, train_config
from mlflow import MlflowClient
from mlflow.entities import Run
from servers import wait_until

from sdpipe.data.store import DataSet
from sdpipe.training.session import train_run

RESULTS = ("weights.safetensors", "history.csv", "train.json")
WORKER = str(ROOT / "tests" / "session_worker.py")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def run_to(folder: Path, dataset: DataSet, **overrides: object) -> dict[str, bytes]:
    train_run("plain", train_config(**overrides), machine(), dataset, "code", folder)
    return results(folder)


def start(
    project: Path, epochs: int, every_steps: int = 5, fault: str = "", **environment: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, WORKER, str(epochs), str(every_steps), fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(project: Path, process: "subprocess.Popen[str]") -> None:
    while not list(project.glob(".sdpipe/runs/*/step-*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


def steps_saved(project: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in project.glob(".sdpipe/runs/*/step-*"))


def wait_for_the_run(store: Path) -> None:
    """Until MLflow knows of it: a busy machine takes seconds to import MLflow."""
    client = MlflowClient(f"sqlite:///{store}")

    def knows() -> object:
        found = client.get_experiment_by_name("sdpipe")
        return found is not None and client.search_runs([found.experiment_id])

    wait_until(knows)


def the_run(store: Path) -> Run:
    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("sdpipe")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def in_mounts(script: str, project: Path, **environment: str) -> str:
    """Run a shell script in a mount namespace of its own, where it may mount what it likes."""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-eu", "-c", script],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "TRAIN": f"{sys.executable} {WORKER}",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr
