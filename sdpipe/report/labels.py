"""What settings are called, in words and in the names of files."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
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
    bases = {key: _base_label(runs[0]) for key, runs in by_key.items()}
    labels = {}
    for key, base in bases.items():
        common = frozenset.intersection(*(other for other in by_key if bases[other] == base))
        apart = [f"{name} {_short(name, value)}" for name, value in sorted(key - common, key=str)]
        labels[key] = ", ".join([base, *_dropout(by_key[key]), *apart])
    return labels


def _short(name: str, value: Any) -> str:
    if name == "dataset_digest":
        return str(value)[:12]
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _base_label(run: Run) -> str:
    net = "plain net, " if run.params["skip"] == "plain" else ""
    augmented = "" if run.is_augmented else ", no augmentation"
    return f"{data_name(run)}{augmented}, {net}{run.params['depth']} layers"


def _dropout(runs: Iterable[Run]) -> list[str]:
    """That of the constant depth which is compared with. It is no base: there it would hide what differs."""
    least = min(run.params["dropout"] for run in runs)
    return [f"dropout {exact(least)}"] if least else []


def data_name(run: Run) -> str:
    """The data set, and what its pictures are where a folder holds those of a known one."""
    dataset = str(run.params["dataset"])
    return dataset if run.pictures == dataset else f"{dataset} ({run.pictures} classes)"
