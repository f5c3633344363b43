"""What settings are called, in words and in the names of files."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdpipe.report.runs import Run

Key = frozenset[tuple[str, Any]]
"""What the runs of a setting share, flat."""


def exact(value: float) -> str:
    """In as few digits as tell it from all others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def slug(text: str) -> str:
    """Lower-case letters, digits, dots and single hyphens; long ones end in a hash."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def labels_of(by_key: Mapping[Key, Sequence[Run]]) -> dict[Key, str]:
    """Data, layers, and whatever else tells settings of the same data and layers apart."""
    base = {key: _base_label(runs) for key, runs in by_key.items()}
    labels = {}
    for key, label in base.items():
        alike = [other for other in by_key if base[other] == label]
        common = frozenset.intersection(*alike)
        apart = ", ".join(f"{name} {_short(name, value)}" for name, value in sorted(key - common, key=str))
        labels[key] = f"{label}, {apart}" if apart else label
    return labels


def _short(name: str, value: Any) -> str:
    if name == "dataset_digest":
        return str(value)[:12]
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _base_label(runs: Sequence[Run]) -> str:
    params = runs[0].params
    least = min(run.params["dropout"] for run in runs)  # that of the constant depth compared with
    net = "plain net, " if params["skip"] == "plain" else ""
    augmented = "" if params["shift_px"] or params["flip"] else ", no augmentation"
    dropout = f", dropout {exact(least)}" if least else ""
    return f"{data_name(runs[0])}{augmented}, {net}{params['depth']} layers{dropout}"


def data_name(run: Run) -> str:
    """The data set, and what its pictures are where a folder holds those of a known one."""
    dataset = str(run.params["dataset"])
    return dataset if run.pictures == dataset else f"{dataset} ({run.pictures} classes)"
