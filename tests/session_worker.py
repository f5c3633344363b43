"""One training session as a process: `python session_worker.py EPOCHS EVERY_STEPS [FAULT]`, in a project.

Faults: `slow` makes each step take a minute; `memory` leaves 300 MB for a training that needs more; with
`pictures` they are decoded by two more processes; `import` makes MLflow's take a minute.
"""

import resource
import sys
import time
from pathlib import Path

import prompt_start
import torch
from conftest import machine, train_config
from mlflow import MlflowClient
from picture_files import AUGMENTED

from sdpipe.data.store import open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.training import interruption, tracking
from sdpipe.training.mlflow_store import store_uri
from sdpipe.training.session import train_run
from sdpipe.training.step import TrainingStep


def main(epochs: int, every_steps: int, fault: str) -> None:
    prompt_start.done()
    torch.set_num_threads(1)
    config = train_config(epochs=epochs, milestones=[])
    if fault == "slow":
        interruption.GRACE_S = 1.0
        TrainingStep.run = lambda *_arguments: time.sleep(60)  # type: ignore[method-assign]
    elif fault == "memory":
        config = train_config(epochs=epochs, milestones=[], depth=110, widths=[64, 64, 64], batch_size=96)
        MlflowClient(store_uri()).search_experiments()  # so that its libraries are there already
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 300 * 2**20,) * 2)
    elif fault == "import":
        connected = tracking.connected
        tracking.connected = lambda: (time.sleep(60), connected())[1]
    elif fault == "pictures":
        config = train_config(**AUGMENTED, epochs=epochs, milestones=[])
    how = machine(every_steps=every_steps).model_copy(update={"workers": 2})
    with interruption.ending_at_once(), errors_on_one_line():
        print("ready", flush=True)
        data = open_dataset(Path("data"))
        train_run("plain", config, how, data, "code", Path("out"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
