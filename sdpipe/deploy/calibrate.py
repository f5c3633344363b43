"""Calibrate: the temperature of a run's probabilities, fitted on its validation part."""

from pathlib import Path

import numpy as np

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    tempered,
)
from sdpipe.deploy.config import CalibrateConfig
from sdpipe.deploy.files_of_run import WEIGHTS
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.parity import Reference
from sdpipe.errors import ModelError
from sdpipe.files import write_json
from sdpipe.training.weights import load_weights


def calibrate_run(folder: Path, dataset: DataSet, config: CalibrateConfig) -> None:
    """Write models/<run>/calibration.json: the temperature, and what it does on the validation part.

    Raises ModelError if weights.safetensors cannot be read or computes no numbers, DataError if it belongs to
    other data.
    """
    path = folder / WEIGHTS
    weights = load_weights(path)
    _, validated = open_held_out(weights.info, dataset)
    logits_NK = Reference(weights).logits(validated)
    if not np.isfinite(logits_NK).all():
        raise ModelError(f"{path}: computes logits that are not finite; a weight is damaged, or too large")
    temperature = fit_temperature(logits_NK, validated.labels_N)
    facts: dict[str, float | str | int] = {"temperature": temperature, "num_validation": len(validated)}
    for name, temp in (("uncalibrated", 1.0), ("calibrated", temperature)):
        bins = reliability(tempered(logits_NK, temp), validated.labels_N, config.num_bins)
        facts[f"validation_nll_{name}"] = negative_log_likelihood(logits_NK, validated.labels_N, temp)
        facts[f"validation_ece_{name}"] = expected_calibration_error(bins)
    write_json(folder / "calibration.json", {**facts, "fingerprint": weights.info.fingerprint})
