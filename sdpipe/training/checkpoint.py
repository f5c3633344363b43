"""Checkpoints of an unfinished training: everything that the next epoch needs, and a digest of it.

`.sdpipe/runs/<fingerprint>/epoch-0007.safetensors` holds the tensors, `epoch-0007.json` beside it the SHA-256
of that file and the history so far. The JSON is written last: a checkpoint counts only with it. Randomness
has no state (`draws.py`), so none is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdpipe.errors import ModelError
from sdpipe.files import sha256_of, write_json
from sdpipe.training.weights import load_tensors, save_tensors

_KEPT = 2  # the newest, and one to fall back on


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after `num_epochs` epochs. tensors: network, momentum and best network, by prefixed name."""

    num_epochs: int
    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then drop those older than the last two."""
    stem = f"epoch-{checkpoint.num_epochs:04d}"
    tensors_path = folder / f"{stem}.safetensors"
    save_tensors(tensors_path, checkpoint.tensors, {"num_epochs": checkpoint.num_epochs})
    manifest = {"sha256": sha256_of(tensors_path), "progress": checkpoint.progress}
    write_json(folder / f"{stem}.json", manifest)
    for old in _manifests(folder)[_KEPT:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None; and a sentence for each damaged one that was passed over."""
    damaged: list[str] = []
    for manifest_path in _manifests(folder):
        tensors_path = manifest_path.with_suffix(".safetensors")
        try:
            manifest = json.loads(manifest_path.read_text())
            if sha256_of(tensors_path) != manifest["sha256"]:
                raise ModelError("its digest is wrong")
            tensors, meta = load_tensors(tensors_path)
            return Checkpoint(
                num_epochs=meta["num_epochs"], tensors=tensors, progress=manifest["progress"]
            ), damaged
        except (ModelError, OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{tensors_path.name} is damaged and passed over: {error}")
    return None, damaged


def _manifests(folder: Path) -> list[Path]:
    return sorted(
        folder.glob("epoch-*.json"), key=lambda path: int(path.stem.partition("-")[2]), reverse=True
    )
