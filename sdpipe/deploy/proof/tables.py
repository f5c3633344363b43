"""The tables about all files of a run: each comparison, each disagreement, each int8 layer, each variant."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sdpipe.deploy.files_of_run import FLOAT32, FP32, INT8
from sdpipe.deploy.proof.ensemble import EnsembleProof
from sdpipe.deploy.proof.parity import Disagreement
from sdpipe.deploy.proof.variants import Proof
from sdpipe.files import write_csv
from sdpipe.runtime.artifact import ENSEMBLE
from sdpipe.runtime.variants import COLUMNS, NAME

_OF_PARITY = (
    "batch_size", "threads", "max_abs_logit_diff", "relative_logit_diff", "allowed_relative_diff",
    "logit_spread",
)  # fmt: skip


def write_parity(
    folder: Path, proofs: Sequence[Proof], ensemble: EnsembleProof, class_names: Sequence[str]
) -> None:
    """parity.csv, a row for each comparison; disagreements.csv, one for each image; layers.csv, for int8."""
    compared = [(proof.variant.name, proof.variant.kind, proof.parities) for proof in proofs]
    for number, parity in enumerate(ensemble.parities):
        compared.append((f"{ENSEMBLE}.draw-{number}" if number else ENSEMBLE, FLOAT32, [parity]))
    rows = [
        [variant, *(getattr(parity, name) for name in _OF_PARITY), len(parity.disagreements)]
        for variant, _, parities in compared
        for parity in parities
    ]
    write_csv(folder / "parity.csv", ["variant", *_OF_PARITY, "argmax_disagreements"], rows)
    found = [
        {"variant": variant}
        | asdict(one)
        | {"pytorch_class": class_names[one.pytorch_class], "onnx_class": class_names[one.onnx_class]}
        for variant, kind, parities in compared
        if kind != INT8  # it rounds on purpose; metrics.json counts them
        for parity in parities
        for one in parity.disagreements
    ]
    header = ["variant", *(column.name for column in fields(Disagreement))]
    write_csv(folder / "disagreements.csv", header, [list(one.values()) for one in found])
    measured = [[proof.variant.name, *asdict(layer).values()] for proof in proofs for layer in proof.layers]
    write_csv(folder / "layers.csv", ["variant", "layer", "sqnr_db", "clipped", "range_ratio"], measured)


def write_variants(
    folder: Path,
    fingerprint: str,
    figures: Mapping[str, Mapping[str, Any]],
    latency: Mapping[str, Mapping[str, Any]],
) -> None:
    """variants.csv: error, size and time of each file; the times are measured, so no stage decides by it.

    figures: of each by its name, as in metrics.json; latency: of each batch size, as in latency.json.
    """
    rows = []
    for name, its in figures.items():
        timed = name_in_times(name)
        times = {f"{batch}_ms": of[timed]["median_ms"] for batch, of in latency.items() if timed in of}
        row = {"variant": name, "path": its["file"], "fingerprint": fingerprint, **its, **times}
        rows.append([row.get(column) for column in COLUMNS])
    write_csv(folder / NAME, COLUMNS, rows)


def name_in_times(variant: str) -> str:
    """That of a variant in latency.json, where model.onnx stands beside PyTorch by its engine."""
    return "onnxruntime" if variant == FP32 else variant
