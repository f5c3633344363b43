"""Evaluate: prove the ONNX file against PyTorch over the whole test set, then say how good it is."""

import csv
from collections.abc import Callable, Sequence
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

    Writes metrics.json, latency.json, the figures and their data. Raises ParityError after writing them if
    the two differ, ModelError if one cannot be read or they do not belong together.
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
    _write_disagreements(folder / "disagreements.csv", parities, weights)
    metrics = {
        **_parity_metrics(parities, config.max_relative_logit_diff),
        **_scores(logits_NK, reference_NK, labels_N, weights.info.class_names),
        "num_test": len(labels_N),
        "model_sha256": sha256_of(artifact.path),
        "fingerprint": weights.info.fingerprint,
    }
    write_json(folder / "metrics.json", metrics)
    _write_confusion(folder, logits_NK, labels_N, weights)
    _draw(folder, dataset, logits_NK, history, weights)
    write_json(folder / "latency.json", _latency(reference, artifact, images_NHWC, config))
    check_parity(parities, config.max_relative_logit_diff, str(artifact.path))


def _parity_metrics(parities: Sequence[Parity], allowed: float) -> dict[str, Any]:
    """The worst of all batch sizes, and each; `parity` says whether all held."""
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
        "by_batch_size": {
            f"batch_{parity.batch_size}": {
                "max_abs_logit_diff": _finite(parity.max_abs_logit_diff),
                "relative_logit_diff": _finite(parity.relative_logit_diff),
                "argmax_disagreements": len(parity.disagreements),
            }
            for parity in parities
        },
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None  # JSON has no infinity


def _scores(
    logits_NK: np.ndarray, reference_NK: np.ndarray, labels_N: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    predicted_N = logits_NK.argmax(axis=1)
    log_probabilities_NK = logits_NK - logsumexp(logits_NK.astype(np.float64), axis=1, keepdims=True)
    precision_K, recall_K, _, support_K = precision_recall_fscore_support(
        labels_N, predicted_N, labels=range(len(class_names)), zero_division=0
    )
    return {
        "test_error": float((predicted_N != labels_N).mean()),
        "test_error_pytorch": float((reference_NK.argmax(axis=1) != labels_N).mean()),
        "negative_log_likelihood": float(-log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean()),
        "classes": {
            name: {
                "precision": float(precision_K[k]),
                "recall": float(recall_K[k]),
                "images": int(support_K[k]),
            }
            for k, name in enumerate(class_names)
        },
    }


def _write_disagreements(path: Path, parities: Sequence[Parity], weights: Weights) -> None:
    names = [column.name for column in fields(Disagreement)]
    class_names = weights.info.class_names
    with replacing(path) as beside, beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for parity in parities:
            for found in parity.disagreements:
                named = {key: class_names[getattr(found, key)] for key in ("pytorch_class", "onnx_class")}
                writer.writerow(asdict(found) | named)


def _write_confusion(folder: Path, logits_NK: np.ndarray, labels_N: np.ndarray, weights: Weights) -> None:
    class_names = weights.info.class_names
    counts_KK = confusion_matrix(labels_N, logits_NK.argmax(axis=1), labels=range(len(class_names)))
    with replacing(folder / "confusion.csv") as beside, beside.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["true \\ predicted", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, counts_KK.tolist(), strict=True))
    draw_confusion(folder / "confusion.png", counts_KK, class_names, _title(folder, weights))


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
