"""What a file says of itself, against the weights that it was made of.

Written anew from the weights' description, so that a mistake of export is not on both sides.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdpipe.deploy.confidence import read_temperature
from sdpipe.deploy.files_of_run import WEIGHTS
from sdpipe.errors import DataError, ModelError
from sdpipe.files import read_json
from sdpipe.runtime.artifact import ENSEMBLE
from sdpipe.runtime.metadata import Metadata
from sdpipe.training.weights import ModelInfo


def claim_faults(found: Metadata, info: ModelInfo, weights_path: Path) -> list[str]:
    """Entries of a file's metadata that are not as its weights say, in words; nothing, if all are.

    weights_path: where `info` is from; the temperature is in calibration.json beside the run's weights, or in
    prune.json beside those of a pruned network. Raises DataError if that cannot be read. The texts for people
    and sdpipe's version do not follow from the weights.
    """
    network = info.network
    expected: dict[str, Any] = {
        "class_names": list(info.class_names),
        "image_size": list(info.image_size),
        "channels": network.in_channels,
        "crop_fraction": info.crop_fraction,
        "data_set": info.dataset,
        "data_digest": info.dataset_digest,
        "depth": network.depth,
        "rule": network.rule,
        "p_L": network.p_L,
        "survival_probs": list(network.survival_probs),
        # The ensemble's are its second input.
        "scales": [1.0] * network.num_blocks if found.variant == ENSEMBLE else list(info.scales),
        "best_epoch": info.best_epoch,
        "fingerprint": info.fingerprint,
    }
    faults = [
        f"its {name} is {_short(getattr(found, name))}, and {_short(value)} in {weights_path.name}"
        for name, value in expected.items()
        if getattr(found, name) != value
    ]
    temperature, source = _temperature(weights_path)
    if found.temperature != temperature:
        faults.append(f"its temperature is {found.temperature:.6g}, and {temperature:.6g} in {source.name}")
    return faults


def check_pruned_claims(pruned: ModelInfo, info: ModelInfo, weights_path: Path) -> None:
    """Raise ModelError unless the weights of a pruned network say what those of its run do.

    pruned: of weights_path. Only the scales may differ: prune wrote both the file and the weights that it is
    held to, so that the two would agree on what both have wrong.
    """
    found, expected = _without_scales(pruned), _without_scales(info)
    for name, value in expected.items():
        if found[name] != value:
            raise ModelError(
                f"{weights_path}: its {name} is {_short(found[name])}, and {_short(value)} in {WEIGHTS}"
            )


def _without_scales(info: ModelInfo) -> dict[str, Any]:
    facts = asdict(replace(info, scales=()))
    return {**facts.pop("network"), **facts}


def _temperature(weights_path: Path) -> tuple[float, Path]:
    """That of a network's probabilities, and the file that says so."""
    if weights_path.name == WEIGHTS:
        source = weights_path.with_name("calibration.json")
        return read_temperature(source), source
    source = weights_path.with_name("prune.json")
    sizes = read_json(source, ("sizes",))["sizes"]
    try:
        (size,) = [size for size in sizes if size["name"] == weights_path.stem]
        return float(size["recalibrated"]["temperature"]), source
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: expected the temperature of {weights_path.stem}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
