"""Stage train@<run>: from data/<dataset>/ to the weights of the epoch with the lowest validation error."""

import hashlib
import os
import shlex
from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import check_arrays, open_dataset
from sdpipe.errors import ConfigError, TrainingError
from sdpipe.provenance import code_digest
from sdpipe.training.config import MachineConfig, TrainConfig, parse_run
from sdpipe.training.interruption import end_with_parent, ending_at_once
from sdpipe.training.session import train_run

LAUNCHED = "SDPIPE_LAUNCHED"  # set for the processes that a launcher starts
# Each of torchrun's restarts then has a store of its own; else nodes read addresses of what is gone.
OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# What tells MLflow of a training and decides nothing of it: a change here makes no other training.
TELLING = (
    "sdpipe/training/logged_models.py",
    "sdpipe/training/mlflow_store.py",
    "sdpipe/training/records.py",
    "sdpipe/training/run_record.py",
    "sdpipe/training/sqlite_store.py",
    "sdpipe/training/tracking.py",
)


def main(run: str) -> None:
    if "DVC_ROOT" in os.environ:  # a DVC that is killed takes nothing of what this would make
        end_with_parent()
    machine = parse_section(MachineConfig, get_value(read_params(Path("params.yaml")), "machine"), "machine")
    if machine.launch is not None and "WORLD_SIZE" not in os.environ:
        launch(machine.launch, run)
    config, code = read_setting(run)
    folder = Path("data") / config.dataset
    dataset = open_dataset(folder)
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        check_arrays(folder)
    train_run(run, config, machine, dataset, code, Path("models") / run, committed_md5=committed_md5(run))
    # What DVC would write into dvc.lock, though it was not trained. Of several processes the leader says it:
    # the others end while it still writes, and a launcher ends all when one fails.
    if leads and read_setting(run) != (config, code):
        raise TrainingError(
            f"run {run}: params.yaml or the code was changed while it trained; its end is kept: with them as "
            "they were `dvc repro` takes it, with what they are now it trains anew"
        )


def read_setting(run: str) -> tuple[TrainConfig, str]:
    """What params.yaml asks of a run, and the digest of the code that trains it."""
    params = read_params(Path("params.yaml"))
    deps = get_value(read_params(Path("dvc.yaml")), "stages.train.do.deps")
    return (
        parse_run(get_value(params, "train"), get_value(params, "runs"), run),
        code_digest(Path(), [path for path in deps if path.endswith(".py") and path not in TELLING]),
    )


def launch(launcher: str, run: str) -> None:
    """Become the launcher; it starts this stage again in each of its processes."""
    where = f"params.yaml: machine.launch: {launcher!r}"
    if LAUNCHED in os.environ:
        raise ConfigError(f"{where}: expected a launcher like torchrun, which sets WORLD_SIZE; it did not")
    try:
        words = [*shlex.split(launcher), "-m", "pipeline.train", run]
        os.execvpe(words[0], words, {OWN_STORES: "1", **os.environ, LAUNCHED: "1"})  # noqa: S606
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be started: {error}") from error


def committed_md5(run: str) -> str | None:
    """What dvc.lock says of the weights of the run's last training.

    None, too, where TELLING was changed since: then the stage runs for that, and not to train once more.
    """
    path = Path("dvc.lock")
    stages = read_params(path).get("stages") or {} if path.exists() else {}
    stage = stages.get(f"train@{run}", {})
    told_by = {dep["path"]: dep.get("md5") for dep in stage.get("deps", []) if dep["path"] in TELLING}
    if any(md5 != _md5(name) for name, md5 in told_by.items()):
        return None
    found = [out.get("md5") for out in stage.get("outs", []) if out["path"].endswith("weights.safetensors")]
    return next((md5 for md5 in found if isinstance(md5, str)), None)


def _md5(name: str) -> str:
    return hashlib.md5(Path(name).read_bytes(), usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    with ending_at_once():
        run_stage(main)
