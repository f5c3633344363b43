"""What MLflow shall hold of a run: from a training in progress, or from the files that it left."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdpipe.errors import DataError, ModelError
from sdpipe.files import read_json, sha256_of
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
    return epoch_metrics([asdict(row) for row in progress.history], [asdict(row) for row in progress.timing])


def epoch_metrics(
    history: Sequence[Mapping[str, float]], timing: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    """The same, of rows with whatever metrics they have. Both have the same epochs."""
    return [
        {name: value for name, value in row.items() if name != "epoch"}
        | {"images_per_s": times["images_per_s"]}
        for row, times in zip(history, timing, strict=True)
    ]


def record_from_files(folder: Path) -> RunRecord:
    """The record of a finished run in models/<run>/, with its ONNX model and figures where they are there.

    Raises ModelError or DataError if one that is needed is missing or damaged.
    """
    info = load_weights(folder / "weights.safetensors").info
    timing = read_json(folder / "timing.json", ("hardware", "git_commit", "git_dirty"))
    started = start_record(
        run_name(folder),
        fingerprint=info.fingerprint,
        data_digest=info.dataset_digest,
        train_params=info.train_params,
        git=timing,
        hardware=timing["hardware"],
    )
    facts = {"train.json": read_json(folder / "train.json"), "timing.json": timing}
    metrics_path = folder / "metrics.json"
    metrics = read_json(metrics_path) if metrics_path.exists() else {}
    # An evaluation of an older training, which a failed repro may leave, is not this run's.
    is_current = metrics.get("fingerprint") == info.fingerprint
    if is_current:
        facts["metrics.json"] = metrics
    summary: dict[str, float] = {}
    for name, found in facts.items():
        summary |= _numbers(folder / name, {metric: found.get(metric) for metric in _SUMMARY[name]})
    if is_current:
        summary |= _numbers(metrics_path, _of_variants(metrics))
        summary |= _numbers(folder / "latency.json", _of_latency(read_json(folder / "latency.json")))
    return RunRecord(
        name=started.name,
        fingerprint=started.fingerprint,
        status="FINISHED",
        params=started.params,
        tags={**started.tags, "stage": "evaluate" if is_current else "train"},
        epochs=_epochs_of(folder),
        summary=summary,
        artifacts=[path for name in _EVALUATION if is_current and (path := folder / name).exists()],
        model=_evaluated(folder / "model.onnx", metrics.get("model_sha256")) if is_current else None,
        written_ms=_written_ms(folder),
    )


def record_of_times(run: str, fingerprint: str, folder: Path) -> RunRecord:
    """No more of a finished run than MLflow knows it by, and its times, if `folder` holds that training."""
    record = RunRecord(name=run, fingerprint=fingerprint, status="FINISHED", params={}, tags={})
    with suppress(DataError):  # what was deployed may be all there is
        if read_json(folder / "train.json").get("fingerprint") == fingerprint:
            path = folder / "timing.json"
            summary = _numbers(path, {"train_s": read_json(path).get("train_s")})
            return replace(record, summary=summary, written_ms=_written_ms(folder))
    return record


def _written_ms(folder: Path) -> int:
    """When timing.json was written, at the end of the training, or brought back; no file says more."""
    return int((folder / "timing.json").stat().st_mtime * 1000)


def _evaluated(model: Path, digest: Any) -> Path:
    """The model itself, if it is the file that was evaluated. Raises ModelError if not."""
    try:
        is_that = sha256_of(model) == digest
    except OSError as error:
        raise ModelError(f"{model}: cannot be read: {error.strerror}") from error
    if not is_that:
        raise ModelError(f"{model}: damaged, or another file than metrics.json is about; run `dvc repro`")
    return model


def _epochs_of(folder: Path) -> list[dict[str, float]]:
    history, timing = read_rows(folder / "history.csv"), read_rows(folder / "timing.csv")
    epochs = [row.get("epoch") for row in history]
    if not epochs or epochs != [row.get("epoch") for row in timing] or "images_per_s" not in timing[0]:
        raise DataError(
            f"{folder}: expected history.csv and timing.csv of the same epochs, the latter with images_per_s"
        )
    for row in history:
        _numbers(folder / "history.csv", row)
    return epoch_metrics(history, timing)


def _numbers(path: Path, values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are known. Raises DataError if one is no finite number."""
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{path}: {name}: expected a finite number, got {str(value)[:20]!r}")
    return known


def _of_variants(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's files have side by side, such as int8.test_error."""
    return {
        f"{variant}.{name}": figures.get(name)
        for variant, figures in _mappings(metrics.get("variants"))
        for name in _VARIANT
    }


def _of_latency(latency: Mapping[str, Any]) -> dict[str, Any]:
    """Of the files and of PyTorch, such as int8.batch_64_ms."""
    return {
        f"{name}.{batch}_ms": times.get("median_ms")
        for batch, contenders in latency.items()
        for name, times in _mappings(contenders)
    }


def _mappings(section: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings of a section; what an older sdpipe wrote otherwise is passed over."""
    for name, value in section.items() if isinstance(section, Mapping) else ():
        if isinstance(value, Mapping):
            yield name, value


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
