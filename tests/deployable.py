"""A finished run by hand: a real ONNX file, and figures that are easy to find again."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from conftest import export_to, make_weights

from sdpipe.deploy.config import DeployConfig
from sdpipe.deploy.release.card import write_card
from sdpipe.deploy.release.release import Deployed, judge, write_release
from sdpipe.files import write_csv
from sdpipe.runtime.variants import COLUMNS
from sdpipe.training.weights import ModelInfo, save_weights

VARIANT_FILES = {
    "int8": "model.int8.onnx",
    "fp16": "model.fp16.onnx",
    "ensemble": "ensemble.onnx",
    "keep-7": "pruned/keep-7.onnx",
    "keep-5": "pruned/keep-5.onnx",
    "keep-7.int8": "pruned-int8/keep-7.int8.onnx",
}


def deploy_config(**overrides: object) -> DeployConfig:
    values = {
        "run": "stochastic",
        "max_test_error": 0.5,
        "max_error_increase": 0.005,
        "max_pruned_error_increase": 0.02,
        "registered_model": "sdpipe",
    }
    return DeployConfig.model_validate(values | overrides)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def exported(channels: int) -> bytes:
    """An export takes seconds; one for each number of channels."""
    with tempfile.TemporaryDirectory() as folder:
        return export_to(Path(folder) / "model.onnx", make_weights(channels=channels), 1.25).read_bytes()


def write_model(path: Path, info: ModelInfo) -> None:
    """The exported network with what `info` says of class names and cropping."""
    model = onnx.load_from_string(exported(info.network.in_channels))
    for entry in model.metadata_props:
        field = entry.key.removeprefix("sdpipe.")
        if field in ("class_names", "crop_fraction"):
            entry.value = json.dumps(getattr(info, field))
    onnx.save(model, path)


def make_run(folder: Path, *, channels: int = 1, **changes: Any) -> Path:
    """models/<run>/ as the stages up to evaluate leave it, without variants. Test error 0.1.

    changes: of the weights' ModelInfo.
    """
    weights = make_weights(channels=channels)
    params = {"p_L": 0.5, "epochs": 9}
    weights = replace(weights, info=replace(weights.info, best_epoch=7, train_params=params, **changes))
    folder.mkdir(parents=True)
    save_weights(folder / "weights.safetensors", weights)
    write_model(folder / "model.onnx", weights.info)
    write(folder / "metrics.json", {
        "parity": True, "max_abs_logit_diff": 3.5e-6, "relative_logit_diff": 2.5e-7, "logit_spread": 14.0,
        "argmax_disagreements": 0, "test_error": 0.1, "test_error_pytorch": 0.1,
        "expected_calibration_error_uncalibrated": 0.091, "expected_calibration_error": 0.033,
        "negative_log_likelihood": 0.2, "num_test": 1000, "model_sha256": sha256(folder / "model.onnx"),
        "fingerprint": weights.info.fingerprint,
    })  # fmt: skip
    write(folder / "train.json", {
        "test_error": 0.1, "validation_error": 0.0625, "best_epoch": 7, "num_epochs": 9, "num_train": 1293,
        "num_validation": 144, "num_parameters": 4321, "num_blocks": 9, "expected_depth": 6.5,
        "fingerprint": weights.info.fingerprint,
    })  # fmt: skip
    write(folder / "timing.json", {
        "train_s": 77.0, "images_per_s": 1.0, "hardware": "Abacus 3000, 2 cores", "git_commit": "c0ffee",
        "git_dirty": True,
    })  # fmt: skip
    write(folder / "calibration.json", {
        "temperature": 1.25, "num_validation": 144, "validation_nll_uncalibrated": 0.3,
        "validation_ece_uncalibrated": 0.081, "validation_nll_calibrated": 0.25,
        "validation_ece_calibrated": 0.023, "fingerprint": weights.info.fingerprint,
    })  # fmt: skip
    times = {"median_ms": 1.5, "quartile_1_ms": 1.25, "quartile_3_ms": 1.75, "n": 30}
    slower = {**times, "median_ms": 42.0}
    write(folder / "latency.json", {
        "hardware": "Sundial, 1 core",
        "batch_1": {"pytorch_eager": {**times, "median_ms": 6.25}, "onnxruntime": times},
        "batch_64": {"pytorch_eager": {**times, "median_ms": 99.0}, "onnxruntime": slower},
    })  # fmt: skip
    rows = [
        f"{name},0.5,0.75,{count}" for name, count in zip(weights.info.class_names, (11, 12, 13), strict=True)
    ]
    (folder / "classes.csv").write_text("\n".join(["class,precision,recall,images", *rows]) + "\n")
    write_variants(folder, {})
    return folder


def write_variants(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of model.onnx and its variants, as evaluate leaves it."""
    of_model = {"test_error": 0.1, "bytes": 12345, "disagreements_with_fp32": 0, "parity": True}
    fingerprint = json.loads((folder / "metrics.json").read_text())["fingerprint"]
    rows = [
        {
            "variant": name,
            "path": VARIANT_FILES.get(name, "model.onnx"),
            "fingerprint": fingerprint,
            **figures,
        }
        for name, figures in {"fp32": of_model, **facts}.items()
    ]
    write_csv(folder / "variants.csv", COLUMNS, [[row.get(column) for column in COLUMNS] for row in rows])


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def change_metrics(folder: Path, **changes: Any) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    write(folder / "metrics.json", metrics | changes)


def add_variants(folder: Path, **errors: float) -> None:
    """Files of any bytes for all variants, as evaluate describes them; 0.1 is the error of model.onnx."""
    facts = {}
    for name, file in VARIANT_FILES.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        facts[name] = {
            "parity": True,
            "test_error": errors.get(name.replace("-", "_").replace(".", "_"), 0.1),
            "disagreements_with_fp32": 3,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
    change_metrics(folder, variants=facts)
    write_variants(folder, facts)


def deploy(folder: Path, models: Path, **overrides: object) -> Deployed:
    """What pipeline/deploy.py does, without MLflow."""
    config = deploy_config(**overrides)
    candidate = judge(folder, config)
    return write_release(candidate, models, write_card(candidate), config)
