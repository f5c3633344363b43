"""Evaluate: prove the ONNX file against PyTorch over the whole test set, then say how good it is."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.figures import draw_confusion, draw_mistakes, draw_training
from sdpipe.deploy.latency import measure_latency
from sdpipe.deploy.parity import Disagreement, Parity, Reference, check_parity, compare_logits, onnx_logits
from sdpipe.errors import ModelError, ParityError
from sdpipe.files import replacing, sha256_of, write_json
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.training.weights import Weights, load_weights


def evaluate_run(
    folder: Path, dataset: DataSet, history: Sequence[dict[str, float]], config: EvaluateConfig
) -> None:
    """Evaluate models/<run>/model.onnx against its weights.safetensors on the test part.

    Writes metrics.json, latency.json, parity.csv, disagreements.csv, classes.csv, confusion.csv and the
    figures. Raises ParityError after writing them if the two differ, ModelError if one cannot be read or they
    do not belong together.
    """
    weights = load_weights(folder / "weights.safetensors")
    artifact = open_artifact(folder / "model.onnx", device="cpu")
    if artifact.metadata.fingerprint != weights.info.fingerprint:
        raise ModelError(
            f"{artifact.path}: its run is {artifact.metadata.fingerprint}, "
            f"and that of its weights {weights.info.fingerprint}"
        )
    reference = Reference(weights)
    images_NHWC, labels_N = dataset.test_images_NHWC, dataset.test_labels_N
    reference_NK = reference.logits(images_NHWC)
    onnx_by_batch = {size: onnx_logits(artifact, images_NHWC, size) for size in config.batch_sizes}
    parities = [
        compare_logits(
            reference_NK, logits_NK, batch_size=size, max_relative_logit_diff=config.max_relative_logit_diff
        )
        for size, logits_NK in onnx_by_batch.items()
    ]
    logits_NK = onnx_by_batch[config.batch_sizes[-1]]
    _write_parity(folder, parities, weights)
    _write_classes(folder, logits_NK, labels_N, weights)
    metrics = {
        **_parity_metrics(parities, config.max_relative_logit_diff),
        **_scores(logits_NK, reference_NK, labels_N),
        "num_test": len(labels_N),
        "model_sha256": sha256_of(artifact.path),
        "fingerprint": weights.info.fingerprint,
    }
    write_json(folder / "metrics.json", metrics)
    _draw(folder, dataset, logits_NK, history, weights)
    write_json(folder / "latency.json", _latency(reference, artifact, images_NHWC, config))
    check_parity(parities, config.max_relative_logit_diff, str(artifact.path))


def _parity_metrics(parities: Sequence[Parity], allowed: float) -> dict[str, Any]:
    """The worst of all batch sizes; `parity` says whether all held."""
    try:
        check_parity(parities, allowed, "")
        held = True
    except ParityError:
        held = False
    return {
        "parity": held,
        "max_abs_logit_diff": _finite(max(parity.max_abs_logit_diff for parity in parities)),
        "relative_logit_diff": _finite(max(parity.relative_logit_diff for parity in parities)),
        "logit_spread": _finite(parities[0].logit_spread),
        "argmax_disagreements": max(len(parity.disagreements) for parity in parities),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None  # JSON has no infinity


def _scores(logits_NK: np.ndarray, reference_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    log_probabilities_NK = logits_NK - logsumexp(logits_NK.astype(np.float64), axis=1, keepdims=True)
    return {
        "test_error": float((logits_NK.argmax(axis=1) != labels_N).mean()),
        "test_error_pytorch": float((reference_NK.argmax(axis=1) != labels_N).mean()),
        "negative_log_likelihood": float(-log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean()),
    }


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as beside, beside.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_parity(folder: Path, parities: Sequence[Parity], weights: Weights) -> None:
    """parity.csv, a row for each batch size, and disagreements.csv, a row for each image."""
    header = [
        "batch_size",
        "max_abs_logit_diff",
        "relative_logit_diff",
        "logit_spread",
        "argmax_disagreements",
    ]
    rows = [
        [*(getattr(parity, name) for name in header[:-1]), len(parity.disagreements)] for parity in parities
    ]
    _write_csv(folder / "parity.csv", header, rows)
    names = weights.info.class_names
    found = [
        asdict(one) | {"pytorch_class": names[one.pytorch_class], "onnx_class": names[one.onnx_class]}
        for parity in parities
        for one in parity.disagreements
    ]
    columns = [column.name for column in fields(Disagreement)]
    _write_csv(folder / "disagreements.csv", columns, [list(one.values()) for one in found])


def _write_classes(folder: Path, logits_NK: np.ndarray, labels_N: np.ndarray, weights: Weights) -> None:
    """classes.csv with precision and recall of each class, confusion.csv and confusion.png."""
    names, predicted_N = weights.info.class_names, logits_NK.argmax(axis=1)
    precision_K, recall_K, _, images_K = precision_recall_fscore_support(
        labels_N, predicted_N, labels=range(len(names)), zero_division=0
    )
    rows = zip(names, precision_K.tolist(), recall_K.tolist(), images_K.tolist(), strict=True)
    _write_csv(folder / "classes.csv", ["class", "precision", "recall", "images"], rows)
    counts_KK = confusion_matrix(labels_N, predicted_N, labels=range(len(names)))
    table = [[name, *row] for name, row in zip(names, counts_KK.tolist(), strict=True)]
    _write_csv(folder / "confusion.csv", ["true \\ predicted", *names], table)
    draw_confusion(folder / "confusion.png", counts_KK, names, _title(folder, weights))


def _draw(
    folder: Path,
    dataset: DataSet,
    logits_NK: np.ndarray,
    history: Sequence[dict[str, float]],
    weights: Weights,
) -> None:
    title = _title(folder, weights)
    draw_training(folder / "training.png", history, weights.info.best_epoch, title)
    probabilities_NK = np.exp(logits_NK - logsumexp(logits_NK, axis=1, keepdims=True))
    draw_mistakes(
        folder / "mistakes.png",
        dataset.test_images_NHWC,
        dataset.test_labels_N,
        probabilities_NK,
        weights.info.class_names,
        f"{title}: most confident mistakes",
    )


def _title(folder: Path, weights: Weights) -> str:
    network = weights.info.network
    return f"{folder.name}: {weights.info.dataset}, {network.depth} layers, p_L = {network.p_L:g}"


def _latency(
    reference: Reference, artifact: Artifact, images_NHWC: np.ndarray, config: EvaluateConfig
) -> dict[str, Any]:
    calls: dict[str, Callable[[np.ndarray], Any]] = {"pytorch_eager": reference, "onnxruntime": artifact.run}
    return measure_latency(calls, images_NHWC, config.latency_batch_sizes, config.latency_repeats)
