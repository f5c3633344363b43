"""One training as a process: its name, its lock, its checkpoints, its MLflow run, its end."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sdpipe.data.store import DataSet
from sdpipe.errors import BusyError
from sdpipe.files import project_root, work_folder
from sdpipe.provenance import fingerprint, git_state, hardware, processor_name
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.loop import train
from sdpipe.training.progress import Progress
from sdpipe.training.records import epoch_metrics, start_record
from sdpipe.training.run_files import write_training
from sdpipe.training.tracking import LiveTracker
from sdpipe.training.weights import ModelInfo


def train_run(run: str, config: TrainConfig, dataset: DataSet, code: str, folder: Path) -> None:
    """Train a run and write its files to `folder`, or continue where a killed process stopped.

    code: digest of the source files that decide the result. Raises BusyError if another process trains the
    same run, and what `train()` raises. An interruption leaves a checkpoint and an honest status.
    """
    compute = choose_compute(config.device, config.precision)
    params = json.loads(json.dumps(config.model_dump()))
    name = fingerprint(params=params, data=dataset.digest, code=code, compute=_decisive(compute))
    measured = {
        "hardware": hardware(_device_name(compute)),
        "compute": compute.reason,
        **git_state(project_root()),
    }
    print(f"run {run}, fingerprint {name}: {compute.reason}", flush=True)
    checkpoints = work_folder() / "runs" / name
    checkpoints.mkdir(parents=True, exist_ok=True)
    record = start_record(
        run,
        fingerprint=name,
        data_digest=dataset.digest,
        train_params=params,
        git=measured,
        hardware=measured["hardware"],
    )
    with (
        _locked(checkpoints.with_suffix(".lock"), run),
        _told_how_it_ends(LiveTracker(record), run) as tracker,
    ):
        result = train(
            config, dataset, compute, checkpoints, lambda progress: tracker.update(_rows(progress))
        )
        info = _describe(config, dataset, name, params, result.progress)
        write_training(folder, result, info, measured)
        tracker.close("FINISHED", {"test_error": result.test_error})
        shutil.rmtree(checkpoints)
    print(
        f"run {run}: test error {result.test_error:.4f} at epoch {info.best_epoch}, "
        f"the one of lowest validation error ({result.progress.best.validation_error:.4f})"
    )


def _rows(progress: Progress) -> list[dict[str, float]]:
    return epoch_metrics([asdict(row) for row in progress.history], [asdict(row) for row in progress.timing])


def _describe(
    config: TrainConfig, dataset: DataSet, name: str, params: dict[str, Any], progress: Progress
) -> ModelInfo:
    height, width, channels = dataset.train_images_NHWC.shape[1:]
    return ModelInfo(
        network=config.network_config(in_channels=channels, num_classes=len(dataset.class_names)),
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        class_names=dataset.class_names,
        image_size=(height, width),
        fingerprint=name,
        best_epoch=progress.best.epoch,
        train_params=params,
    )


def _decisive(compute: Compute) -> dict[str, str]:
    """What of the machine decides the result."""
    return {"device": compute.device.type, "precision": compute.precision, "torch": torch.__version__}


def _device_name(compute: Compute) -> str:
    return torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else processor_name()


@contextmanager
def _locked(path: Path, run: str) -> Iterator[None]:
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise BusyError(
            f"run {run}: another process is training it (lock {path}); wait for it or end it"
        ) from None


@contextmanager
def _told_how_it_ends(tracker: LiveTracker, run: str) -> Iterator[LiveTracker]:
    """Close the MLflow run as FAILED or KILLED when the block does not end well."""
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit):
        print(f"run {run}: stopped; `dvc repro` continues from its last whole epoch", flush=True)
        tracker.close("KILLED")
        raise
    except Exception:
        tracker.close("FAILED")
        raise
