"""DVC's queue of experiments, killed as the system or a user would, and queued again."""

import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from servers import wait_until
from test_pipeline import call, copy_project, environment

pytestmark = [pytest.mark.slow, pytest.mark.long]
PATIENCE_S = 240.0  # a slow processor with other tests beside it


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DVC starts stages in the user's shell; Debian's sh, unlike bash, would stay as their parent."""
    monkeypatch.setenv("SHELL", "/bin/sh")
    return copy_project(tmp_path)


def queue(project: Path, name: str) -> None:
    """A training of some seconds, saved many times in them."""
    changes = ("train.epochs=40", "train.milestones=[30]", "machine.checkpoint.every_s=0.2")
    sets = [word for change in changes for word in ("-S", change)]
    call(project, "dvc", "exp", "run", "--queue", "-n", name, *sets, "train@stochastic")


def start(project: Path) -> None:
    """DVC's worker takes what is queued, one after the other, and ends; it is a process group of its own."""
    subprocess.run(
        ["dvc", "queue", "start"],
        cwd=project,
        env=environment(),
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE_S,
    )


def processes(project: Path, words: str) -> list[int]:
    """Those that work in the project, or in DVC's copies of it, with such a command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words in command and (folder / "cwd").resolve().is_relative_to(project):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def mlflow_runs(project: Path) -> list[tuple[str, str]]:
    """Name and status of those that have epochs."""
    with closing(sqlite3.connect(f"file:{project}/mlflow.db?mode=ro", uri=True)) as store:
        return store.execute(
            "select distinct name, status from runs join metrics using (run_uuid)"
        ).fetchall()


def is_under_way(project: Path) -> bool:
    """A training has saved, and MLflow knows of it."""
    try:
        return bool(list(project.glob(".sdpipe/runs/*/step-*")) and mlflow_runs(project))
    except sqlite3.OperationalError:  # MLflow is still making its store
        return False


@pytest.fixture
def kill_all(project: Path) -> Iterator[None]:
    yield
    for process in processes(project, "dvc") + processes(project, "pipeline"):
        os.kill(process, signal.SIGKILL)


def test_a_killed_experiment_goes_on_when_it_is_queued_again(project: Path, kill_all: None) -> None:
    """SIGKILL for DVC alone: what it trained saves and ends by itself, and its run goes on."""
    queue(project, "first")
    start(project)
    wait_until(lambda: is_under_way(project), PATIENCE_S)
    for process in processes(project, "dvc"):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not processes(project, "pipeline.train"), 10)
    assert mlflow_runs(project) == [("stochastic", "KILLED")]

    queue(project, "again")
    start(project)
    wait_until(
        lambda: re.search(r"again .* Success", call(project, "dvc", "queue", "status").stdout), PATIENCE_S
    )
    log = call(project, "dvc", "queue", "logs", "again").stdout
    assert re.search("continuing after step [1-9]", log)
    assert mlflow_runs(project) == [("stochastic", "FINISHED")]
