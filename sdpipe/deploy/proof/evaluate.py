"""Evaluate: prove the ONNX files of a run over the whole test set, then say how good each is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import error_fraction, tempered
from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.files_of_run import FLOAT32, FP32, WEIGHTS, files_of_run
from sdpipe.deploy.held_out import check_data
from sdpipe.deploy.proof.claims import check_pruned_claims
from sdpipe.deploy.proof.ensemble import EnsembleProof, prove_ensemble
from sdpipe.deploy.proof.figures import draw_mistakes, draw_training
from sdpipe.deploy.proof.parity import Reference
from sdpipe.deploy.proof.scores import SCORES, score, write_classes, write_reliability
from sdpipe.deploy.proof.tables import name_in_times, write_parity, write_variants
from sdpipe.deploy.proof.variants import Proof, prove
from sdpipe.deploy.timing.latency import measure_latency
from sdpipe.errors import DataError, ParityError
from sdpipe.files import sha256_of, write_json
from sdpipe.provenance import hardware, processor_name
from sdpipe.runtime.artifact import ENSEMBLE, open_artifact
from sdpipe.runtime.cores import num_threads
from sdpipe.training.weights import Weights, load_weights


def evaluate_run(
    folder: Path,
    dataset: DataSet,
    history: Sequence[dict[str, float]],
    config: EvaluateConfig,
    num_bins: int,
) -> None:
    """Evaluate the files of models/<run>/, each against its own reference, on the test part.

    num_bins: of the reliability diagram. Writes metrics.json, latency.json, variants.csv, parity.csv,
    disagreements.csv, layers.csv, reliability.csv, classes.csv, confusion.csv and the figures. Raises
    ParityError after writing them if a float32 file does not hold; a float16 or int8 one that does not is
    named, and marked for `deploy`. Raises ModelError if one cannot be read or they do not belong together,
    DataError if the run was trained on other data or its history lacks the best epoch.
    """
    weights = load_weights(folder / WEIGHTS)
    check_data(weights.info, dataset)
    _check_history(folder / "history.csv", history, weights.info.best_epoch)
    images_NHWC = dataset.test_images_NHWC
    proofs = _prove_all(folder, weights, images_NHWC, config)
    ensemble = prove_ensemble(folder, weights, images_NHWC, config)
    write_parity(folder, proofs, ensemble, weights.info.class_names)
    _draw(folder, weights, proofs[0], dataset, history, num_bins)
    figures = _figures(folder, proofs, dataset.test_labels_N, num_bins)
    figures[ENSEMBLE] = ensemble.figures
    write_json(folder / "metrics.json", _metrics(proofs[0], figures, dataset.test_labels_N, num_bins))
    threads = num_threads()
    latency = _latency(Reference(weights), proofs, images_NHWC, config, threads)
    measured_on = hardware(processor_name(), num_threads=threads)
    write_json(folder / "latency.json", {"hardware": measured_on, **latency})
    write_variants(folder, weights.info.fingerprint, figures, latency)
    _report(proofs)
    _check(proofs, ensemble)


def _check_history(path: Path, history: Sequence[Mapping[str, float]], best_epoch: float) -> None:
    """Before anything is computed: the picture of the training marks the epoch that was kept."""
    needed = {"epoch", "learning_rate", "train_loss", "validation_error"}
    if any(not row.keys() >= needed for row in history):
        raise DataError(f"{path}: expected columns {', '.join(sorted(needed))}")
    if best_epoch not in [row["epoch"] for row in history]:
        raise DataError(f"{path}: expected a row of epoch {best_epoch:g}, whose weights were kept")


def _prove_all(
    folder: Path, weights: Weights, images_NHWC: np.ndarray, config: EvaluateConfig
) -> list[Proof]:
    """Of all but the ensemble, which is proved in a way of its own; model.onnx stands first."""
    proofs: dict[Path, Proof] = {}
    of_stages = [one for one in files_of_run(folder) if one.kind != ENSEMBLE and not one.is_extra]
    for variant in tqdm(of_stages, desc="files proved", unit="file", disable=None):
        own = load_weights(variant.weights)
        if not variant.is_whole:
            check_pruned_claims(own.info, weights.info, variant.weights)
        proofs[variant.path] = prove(variant, own, proofs, images_NHWC, config)
    return list(proofs.values())


def _draw(
    folder: Path,
    weights: Weights,
    main: Proof,
    dataset: DataSet,
    history: Sequence[dict[str, float]],
    num_bins: int,
) -> None:
    """The pictures of the training and of model.onnx, and the tables that they show."""
    info, labels_N = weights.info, dataset.test_labels_N
    title = f"{folder.name}: {info.dataset}, {info.network.depth} layers, p_L = {info.network.p_L:g}"
    temperature, logits_NK = main.artifact.metadata.temperature, main.logits_NK
    write_classes(folder, logits_NK, labels_N, info.class_names, title)
    write_reliability(folder, logits_NK, labels_N, temperature, num_bins, title)
    draw_training(folder / "training.png", history, info.best_epoch, title)
    draw_mistakes(
        folder / "mistakes.png",
        dataset.test_images_NHWC,
        labels_N,
        tempered(logits_NK, temperature),
        info.class_names,
        f"{title}: most confident mistakes",
    )


def _figures(
    folder: Path, proofs: Sequence[Proof], labels_N: np.ndarray, num_bins: int
) -> dict[str, dict[str, Any]]:
    """Of each file, by its variant, beside the first, model.onnx."""
    scores = [
        score(proof.logits_NK, labels_N, proof.artifact.metadata.temperature, num_bins) for proof in proofs
    ]
    fp32_error, fp32_N = scores[0]["test_error"], proofs[0].logits_NK.argmax(axis=1)
    figures: dict[str, dict[str, Any]] = {}
    for proof, its in zip(proofs, scores, strict=True):
        path, error = proof.artifact.path, its["test_error"]
        figures[proof.variant.name] = {
            "file": str(path.relative_to(folder)),
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
            **its,
            "error_increase": None if error is None or fp32_error is None else error - fp32_error,
            "disagreements_with_fp32": int((fp32_N != proof.logits_NK.argmax(axis=1)).sum()),
            **proof.figures,
        }
    return figures


def _metrics(
    main: Proof, figures: Mapping[str, Mapping[str, Any]], labels_N: np.ndarray, num_bins: int
) -> dict[str, Any]:
    """metrics.json: of model.onnx, also without its temperature and in PyTorch; the others by their names."""
    uncalibrated = score(main.logits_NK, labels_N, 1.0, num_bins)
    return {
        **main.figures,
        **{name: figures[FP32][name] for name in SCORES},
        "test_error_pytorch": error_fraction(main.reference_NK, labels_N),
        "negative_log_likelihood_uncalibrated": uncalibrated["negative_log_likelihood"],
        "expected_calibration_error_uncalibrated": uncalibrated["expected_calibration_error"],
        "num_test": len(labels_N),
        "model_sha256": figures[FP32]["sha256"],
        "fingerprint": main.artifact.metadata.fingerprint,
        "variants": {name: its for name, its in figures.items() if name != FP32},
    }


def _latency(
    reference: Reference,
    proofs: Sequence[Proof],
    images_NHWC: np.ndarray,
    config: EvaluateConfig,
    threads: int,
) -> dict[str, Any]:
    """PyTorch eager, model.onnx as `onnxruntime`, and the other variants by their names; threads: of each."""
    calls: dict[str, Callable[[np.ndarray], Any]] = {"pytorch_eager": reference}
    for proof in proofs:
        opened = open_artifact(proof.variant.path, device="cpu", threads=threads)
        calls[name_in_times(proof.variant.name)] = opened.run
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_latency(calls, images_NHWC, config.latency_batch_sizes, config.latency_repeats)
    finally:
        torch.set_num_threads(before)


def _report(proofs: Sequence[Proof]) -> None:
    """Say which rounded files do not hold; `deploy` leaves them out, and the stage goes on."""
    for proof in proofs:
        if proof.faults and proof.variant.kind != FLOAT32:
            print(f"{proof.variant.path}: not to be deployed, parity fails: {'; '.join(proof.faults[:4])}")


def _check(proofs: Sequence[Proof], ensemble: EnsembleProof) -> None:
    """Raise ParityError unless all that must compute what PyTorch computes does."""
    faults = {proof.variant.path: proof.faults for proof in proofs if proof.variant.kind == FLOAT32}
    faults[ensemble.path] = ensemble.faults
    wrong = [f"{path}: parity fails: " + "; ".join(found[:8]) for path, found in faults.items() if found]
    if wrong:
        raise ParityError("; ".join(wrong))
