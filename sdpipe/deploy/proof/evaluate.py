"""Evaluate: prove the ONNX files of a run over the whole test set, then say how good each is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import error_fraction
from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.files_of_run import FLOAT32, INT8, WEIGHTS, files_of_run
from sdpipe.deploy.held_out import check_data
from sdpipe.deploy.proof.claims import check_pruned_claims
from sdpipe.deploy.proof.ensemble import prove_ensemble
from sdpipe.deploy.proof.figures import draw_mistakes, draw_training
from sdpipe.deploy.proof.parity import Disagreement, Parity, Reference
from sdpipe.deploy.proof.scores import score, tempered, write_classes, write_reliability
from sdpipe.deploy.proof.variants import Proof, prove
from sdpipe.deploy.timing.latency import measure_latency
from sdpipe.errors import DataError, ParityError
from sdpipe.files import sha256_of, write_csv, write_json
from sdpipe.provenance import hardware, processor_name
from sdpipe.runtime.artifact import ENSEMBLE, open_artifact
from sdpipe.runtime.cores import num_threads
from sdpipe.runtime.variants import COLUMNS, NAME
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
    images_NHWC, labels_N = dataset.test_images_NHWC, dataset.test_labels_N
    proofs = _prove_all(folder, weights, images_NHWC, config)
    drawn, ensemble, ensemble_faults = prove_ensemble(folder, weights, images_NHWC, config)
    main, *others = proofs.values()
    temperature, logits_NK = main.artifact.metadata.temperature, main.logits_NK
    title = _title(folder, weights)
    _write_parity(folder, list(proofs.values()), drawn, weights)
    write_classes(folder, logits_NK, labels_N, weights.info.class_names, title)
    write_reliability(folder, logits_NK, labels_N, temperature, num_bins, title)
    draw_training(folder / "training.png", history, weights.info.best_epoch, title)
    draw_mistakes(
        folder / "mistakes.png",
        images_NHWC,
        labels_N,
        tempered(logits_NK, temperature),
        weights.info.class_names,
        f"{title}: most confident mistakes",
    )
    uncalibrated = score(logits_NK, labels_N, 1.0, num_bins)
    metrics = {
        **main.figures,
        **score(logits_NK, labels_N, temperature, num_bins),
        "test_error_pytorch": error_fraction(main.reference_NK, labels_N),
        "negative_log_likelihood_uncalibrated": uncalibrated["negative_log_likelihood"],
        "expected_calibration_error_uncalibrated": uncalibrated["expected_calibration_error"],
        "num_test": len(labels_N),
        "model_sha256": sha256_of(main.artifact.path),
        "fingerprint": weights.info.fingerprint,
        "variants": {
            **{proof.variant.name: _figures_of(proof, main, folder, labels_N, num_bins) for proof in others},
            ENSEMBLE: ensemble,
        },
    }
    write_json(folder / "metrics.json", metrics)
    threads = num_threads()
    latency = _latency(Reference(weights), proofs.values(), images_NHWC, config, threads)
    measured_on = hardware(processor_name(), num_threads=threads)
    write_json(folder / "latency.json", {"hardware": measured_on, **latency})
    _write_variants(folder, main, metrics, latency)
    _report([*proofs.values()])
    _check(proofs.values(), {folder / ensemble["file"]: ensemble_faults})


def _check_history(path: Path, history: Sequence[Mapping[str, float]], best_epoch: float) -> None:
    """Before anything is computed: the picture of the training marks the epoch that was kept."""
    needed = {"epoch", "learning_rate", "train_loss", "validation_error"}
    if any(not row.keys() >= needed for row in history):
        raise DataError(f"{path}: expected columns {', '.join(sorted(needed))}")
    if best_epoch not in [row["epoch"] for row in history]:
        raise DataError(f"{path}: expected a row of epoch {best_epoch:g}, whose weights were kept")


def _prove_all(
    folder: Path, weights: Weights, images_NHWC: np.ndarray, config: EvaluateConfig
) -> dict[Path, Proof]:
    proofs: dict[Path, Proof] = {}
    of_stages = [one for one in files_of_run(folder) if one.kind != ENSEMBLE and not one.is_extra]
    for variant in tqdm(of_stages, desc="files proved", unit="file", disable=None):
        own = load_weights(variant.weights)
        if not variant.is_whole:
            check_pruned_claims(own.info, weights.info, variant.weights)
        proofs[variant.path] = prove(variant, own, proofs, images_NHWC, config)
    return proofs


def _report(proofs: Sequence[Proof]) -> None:
    """Say which rounded files do not hold; `deploy` leaves them out, and the stage goes on."""
    for proof in proofs:
        if proof.faults and proof.variant.kind != FLOAT32:
            print(f"{proof.variant.path}: not to be deployed, parity fails: {'; '.join(proof.faults[:4])}")


def _check(proofs: Iterable[Proof], others: Mapping[Path, Sequence[str]]) -> None:
    """Raise ParityError unless all that must compute what PyTorch computes does."""
    faults: dict[Path, Sequence[str]] = {
        proof.variant.path: proof.faults for proof in proofs if proof.variant.kind == FLOAT32
    }
    faults |= others
    wrong = [f"{path}: parity fails: " + "; ".join(found[:8]) for path, found in faults.items() if found]
    if wrong:
        raise ParityError("; ".join(wrong))


def _figures_of(
    proof: Proof, main: Proof, folder: Path, labels_N: np.ndarray, num_bins: int
) -> dict[str, Any]:
    """A variant beside model.onnx."""
    path = proof.artifact.path
    scores, of_fp32 = (
        score(each.logits_NK, labels_N, each.artifact.metadata.temperature, num_bins)
        for each in (proof, main)
    )
    error, fp32_error = scores["test_error"], of_fp32["test_error"]
    fp32_N, its_N = main.logits_NK.argmax(axis=1), proof.logits_NK.argmax(axis=1)
    return {
        "file": str(path.relative_to(folder)),
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        **scores,
        "error_increase": None if error is None or fp32_error is None else error - fp32_error,
        "disagreements_with_fp32": int((fp32_N != its_N).sum()),
        **proof.figures,
    }


def _write_parity(folder: Path, proofs: Sequence[Proof], drawn: Sequence[Parity], weights: Weights) -> None:
    """parity.csv, a row for each comparison; disagreements.csv, one for each image; layers.csv, for int8.

    drawn: of the ensemble, with b_l = p_l and then with drawn b_l.
    """
    compared = [(proof.variant.name, proof.variant.kind, proof.parities) for proof in proofs]
    for number, parity in enumerate(drawn):
        compared.append((f"{ENSEMBLE}.draw-{number}" if number else ENSEMBLE, FLOAT32, [parity]))
    columns = [
        "batch_size", "threads", "max_abs_logit_diff", "relative_logit_diff", "allowed_relative_diff",
        "logit_spread",
    ]  # fmt: skip
    rows = [
        [variant, *(getattr(parity, name) for name in columns), len(parity.disagreements)]
        for variant, _, parities in compared
        for parity in parities
    ]
    write_csv(folder / "parity.csv", ["variant", *columns, "argmax_disagreements"], rows)
    names = weights.info.class_names
    found = [
        {"variant": variant}
        | asdict(one)
        | {"pytorch_class": names[one.pytorch_class], "onnx_class": names[one.onnx_class]}
        for variant, kind, parities in compared
        if kind != INT8  # it rounds on purpose; metrics.json counts them
        for parity in parities
        for one in parity.disagreements
    ]
    header = ["variant", *(column.name for column in fields(Disagreement))]
    write_csv(folder / "disagreements.csv", header, [list(one.values()) for one in found])
    measured = [[proof.variant.name, *asdict(layer).values()] for proof in proofs for layer in proof.layers]
    write_csv(folder / "layers.csv", ["variant", "layer", "sqnr_db", "clipped", "range_ratio"], measured)


def _title(folder: Path, weights: Weights) -> str:
    network = weights.info.network
    return f"{folder.name}: {weights.info.dataset}, {network.depth} layers, p_L = {network.p_L:g}"


def _latency(
    reference: Reference, proofs: Any, images_NHWC: np.ndarray, config: EvaluateConfig, threads: int
) -> dict[str, Any]:
    """PyTorch eager, model.onnx as `onnxruntime`, and the other variants by their names; threads: of each."""
    calls: dict[str, Callable[[np.ndarray], Any]] = {"pytorch_eager": reference}
    for proof in proofs:
        name = "onnxruntime" if proof.variant.name == "fp32" else proof.variant.name
        calls[name] = open_artifact(proof.variant.path, device="cpu", threads=threads).run
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_latency(calls, images_NHWC, config.latency_batch_sizes, config.latency_repeats)
    finally:
        torch.set_num_threads(before)


def _write_variants(
    folder: Path, main: Proof, metrics: Mapping[str, Any], latency: Mapping[str, Any]
) -> None:
    """variants.csv: error, size and time of each file; the times are measured, so no stage decides by it."""
    path = main.artifact.path
    fp32 = {**metrics, "file": path.name, "bytes": path.stat().st_size, "disagreements_with_fp32": 0}
    rows = []
    for name, figures in {"fp32": fp32, **metrics["variants"]}.items():
        timed = "onnxruntime" if name == "fp32" else name
        times = {f"{batch}_ms": call[timed]["median_ms"] for batch, call in latency.items() if timed in call}
        facts = {"variant": name, "path": figures["file"], "fingerprint": metrics["fingerprint"]}
        row = {**facts, **figures, **times}
        rows.append([row.get(column) for column in COLUMNS])
    write_csv(folder / NAME, COLUMNS, rows)
