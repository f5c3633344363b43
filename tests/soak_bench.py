"""The trainings that the kill harness kills, seconds long in a forked process, and what is wrong after it."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from conftest import machine as machine_config
from conftest import make_dataset, train_config
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from sdpipe.data.store import open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.training.session import train_run

EPOCHS = 10
CONFIG = train_config(epochs=EPOCHS, milestones=[6], micro_batches=2)
MACHINE = machine_config(every_steps=4)  # an epoch has 6 steps, so most checkpoints lie within one
RESULTS = ("weights.safetensors", "history.csv", "train.json")


class Bench:
    """A folder with a data set and an empty store, from which each trial starts afresh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        make_dataset(self.pristine / "data")
        SqlAlchemyStore(f"sqlite:///{self.pristine / 'mlflow.db'}", str(folder / "artifacts"))
        finish_well(self.new_trial("first"))  # reads files that the others find in memory
        reference = self.new_trial("reference")
        started = time.monotonic()
        finish_well(reference)
        self.seconds = time.monotonic() - started
        self.expected = results(reference)

    def new_trial(self, name: str) -> Path:
        """A project of its own."""
        trial = self.folder / name
        shutil.copytree(self.pristine, trial)
        return trial

    def faults(self, trial: Path) -> list[str]:
        """What is wrong after the end; empty if all is as if nothing had happened."""
        found = [
            f"{name} differs" for name, content in results(trial).items() if content != self.expected[name]
        ]
        return found + tracking_faults(trial)


def results(trial: Path) -> dict[str, bytes]:
    return {name: (trial / "out" / name).read_bytes() for name in RESULTS}


def tracking_faults(trial: Path) -> list[str]:
    """MLflow must hold one run, finished, with each epoch once."""
    client = MlflowClient(f"sqlite:///{trial / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdpipe")
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    if [run.info.status for run in runs] != ["FINISHED"]:
        return [f"MLflow has runs {[run.info.status for run in runs]}"]
    steps = [row.step for row in client.get_metric_history(runs[0].info.run_id, "validation_error")]
    return [] if sorted(steps) == list(range(1, EPOCHS + 1)) else [f"MLflow has epochs {sorted(steps)}"]


def start(
    trial: Path, *, broken: Callable[[], None] | None = None, stopped: bool = False, track: bool = True
) -> int:
    """Fork a training session; returns its process id. stopped: it waits for SIGCONT before it begins."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(trial)
        os.environ["DVC_ROOT"] = str(trial)
        if not track:  # a refused address: no thread of MLflow's touches the disk
            os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if broken is not None:
            broken()
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        with errors_on_one_line():
            train_run("plain", CONFIG, MACHINE, open_dataset(Path("data")), "code", Path("out"))
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  (the forked process must end here whatever happens)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(trial: Path, **keywords: Callable[[], None]) -> int:
    """Run a session to its end."""
    return wait(start(trial, **keywords))  # type: ignore[arg-type]


def finish_well(trial: Path) -> None:
    status = finish(trial)
    assert status == 0, f"{trial}: exit {status}\n{(trial / 'log').read_text()}"
