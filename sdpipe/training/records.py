"""What MLflow shall hold of a run: from a training in progress, or from the files that it left."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpipe.files import read_json
from sdpipe.training.progress import Progress
from sdpipe.training.run_files import read_rows, run_name
from sdpipe.training.run_record import RunRecord
from sdpipe.training.weights import load_weights

_EVALUATION = (
    "training.png",
    "confusion.png",
    "mistakes.png",
    "confusion.csv",
    "classes.csv",
    "parity.csv",
    "disagreements.csv",
    "layers.csv",
    "reliability.png",
    "reliability.csv",
    "variants.csv",
    "metrics.json",
)
_SUMMARY = {
    "train.json": ("test_error", "best_epoch", "expected_depth", "num_parameters"),
    "timing.json": ("train_s",),
    "metrics.json": (
        "negative_log_likelihood",
        "negative_log_likelihood_uncalibrated",
        "expected_calibration_error",
        "expected_calibration_error_uncalibrated",
        "max_abs_logit_diff",
        "relative_logit_diff",
        "argmax_disagreements",
    ),
}


_VARIANT = (
    "test_error",
    "negative_log_likelihood",
    "expected_calibration_error",
    "bytes",
    "disagreements_with_fp32",
    "relative_logit_diff",
)


def start_record(
    run: str,
    *,
    fingerprint: str,
    data_digest: str,
    train_params: Mapping[str, Any],
    git: Mapping[str, Any],
    hardware: str,
) -> RunRecord:
    """The record of a training that begins."""
    tags = {
        "stage": "train",
        "data_digest": data_digest,
        "hardware": hardware,
    }
    if git["git_commit"] is not None:
        tags["git_commit"] = git["git_commit"]
        tags["git_dirty"] = str(git["git_dirty"])
        tags["mlflow.source.git.commit"] = git["git_commit"]  # the column "Version" of MLflow's UI
    return RunRecord(
        name=run,
        fingerprint=fingerprint,
        status="RUNNING",
        params=dict(_flat(train_params)),
        tags=tags,
    )


def progress_metrics(progress: Progress) -> list[dict[str, float]]:
    """Of a training in progress, one mapping of metrics for each epoch."""
    return _epoch_metrics([asdict(row) for row in progress.history], [asdict(row) for row in progress.timing])


def _epoch_metrics(
    history: Sequence[Mapping[str, float]], timing: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "epoch"}
        | {"images_per_s": times["images_per_s"]}
        for row, times in zip(history, timing, strict=True)
    ]


def record_from_files(folder: Path) -> RunRecord:
    """The record of a finished run in models/<run>/, with its ONNX model and figures where they are there.

    Raises ModelError or DataError if a file of the training is missing or damaged.
    """
    info = load_weights(folder / "weights.safetensors").info
    timing = read_json(folder / "timing.json")
    started = start_record(
        run_name(folder),
        fingerprint=info.fingerprint,
        data_digest=info.dataset_digest,
        train_params=info.train_params,
        git=timing,
        hardware=timing["hardware"],
    )
    metrics_path = folder / "metrics.json"
    # An evaluation of an older training, which a failed repro may leave, is not this run's.
    is_current = metrics_path.exists() and read_json(metrics_path).get("fingerprint") == info.fingerprint
    sources = [name for name in _SUMMARY if name != "metrics.json" or is_current]
    summary = {
        metric: value
        for name in sources
        for metric, value in read_json(folder / name).items()
        if metric in _SUMMARY[name] and value is not None
    }
    if is_current:
        summary |= _variant_metrics(read_json(metrics_path), read_json(folder / "latency.json"))
    return RunRecord(
        name=started.name,
        fingerprint=started.fingerprint,
        status="FINISHED",
        params=started.params,
        tags={**started.tags, "stage": "evaluate" if is_current else "train"},
        epochs=_epoch_metrics(read_rows(folder / "history.csv"), read_rows(folder / "timing.csv")),
        summary=summary,
        artifacts=[path for name in _EVALUATION if is_current and (path := folder / name).exists()],
        model=folder / "model.onnx" if is_current else None,
    )


def _variant_metrics(metrics: Mapping[str, Any], latency: Mapping[str, Any]) -> dict[str, float]:
    """What the run's files and PyTorch have side by side, such as int8.test_error and int8.batch_64_ms."""
    found = {
        f"{variant}.{name}": figures[name]
        for variant, figures in metrics.get("variants", {}).items()
        for name in _VARIANT
        if figures.get(name) is not None
    }
    for batch, contenders in latency.items():
        found |= {f"{name}.{batch}_ms": times["median_ms"] for name, times in contenders.items()}
    return found


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
