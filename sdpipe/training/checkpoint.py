"""Checkpoints of a training: everything that the next step needs, and digests of it.

`.sdpipe/runs/<fingerprint>/step-0000001234/` holds `tensors.safetensors`, `state.json` and `SHA256SUMS` (as
sha256sum writes and checks it). The folder is written beside, synced and renamed, so it is there as a whole
or not at all. Randomness has no state (`draws.py`), so none is kept. A training that is stopped in a
validation leaves `step-0000001234-unvalidated/`: behind the validation the same step has another state.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sdpipe.errors import ModelError, TrainingError
from sdpipe.files import replacing_folder, sync_folder, write_synced
from sdpipe.training.setting import Setting

_TENSORS, _STATE, _SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
_NAME = re.compile(r"step-(\d{10})(-unvalidated)?")
_KEPT = 2  # the newest, and one to fall back on
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What the system says of a file that is no more, or is something else by now."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after `num_steps` optimizer steps.

    is_unvalidated: whether the validation that is due behind this step is still lacking.
    tensors: by prefixed name; state: everything else, JSON-able.
    """

    num_steps: int
    is_unvalidated: bool = False
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one training. All but reading is for the process that holds the run's lock."""

    def __init__(self, folder: Path, fingerprint: str, setting: Setting | None = None) -> None:
        """fingerprint: of the training; a checkpoint of another one is not used. setting: what it stands for,
        written with each checkpoint, so that people can be told how another training differs.
        """
        self.folder = folder
        self.fingerprint = fingerprint
        self.setting = setting

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop those older than the last two. What is there already stays.

        Raises OSError, with the older ones as they were.
        """
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        path = self.folder / _name(checkpoint.num_steps, checkpoint.is_unvalidated)
        if _is_folder(path):  # the same place in the same training is the same state
            return
        _put_aside(path)
        state = {
            "fingerprint": self.fingerprint,
            "setting": None if self.setting is None else asdict(self.setting),
            "num_steps": checkpoint.num_steps,
            "is_unvalidated": checkpoint.is_unvalidated,
            "state": checkpoint.state,
        }
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        contents = {_TENSORS: save(plain), _STATE: json.dumps(state, allow_nan=False).encode()}
        with replacing_folder(path) as beside:
            for name, content in contents.items():
                write_synced(beside / name, content)
            write_synced(beside / _SUMS, _sums(contents).encode())
        for old in self.paths()[_KEPT:]:
            remove_folder(old)

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, or None; and a sentence for each damaged one that was passed over.

        A damaged one is renamed to `damaged-step-...`, and what a killed process left half-done is removed.
        Raises TrainingError where one cannot be read, as on a network disk that does not answer: it may be
        whole, and the training would go back behind it for nothing.
        """
        for left in self.folder.glob(".step-*.tmp"):
            _remove(left)
        found, damaged = self.read_newest()
        for path in damaged:
            _put_aside(path)
        return found, list(damaged.values())

    def read_newest(self) -> tuple[Checkpoint | None, dict[Path, str]]:
        """As `load_newest`, and nothing is touched; the sentences by path."""
        damaged: dict[Path, str] = {}
        for path in self._named():
            if path.is_symlink():  # what it leads to is not this training's to move or remove later
                damaged[path] = f"checkpoint {path} is a link and passed over"
                continue
            try:
                return self._read(path), damaged
            except (ModelError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _GONE:
                    raise TrainingError(
                        f"checkpoint {path} cannot be read, and may be whole ({error}); to continue from the "
                        "one before, move it out of its folder"
                    ) from error
                damaged[path] = f"checkpoint {path} is damaged and passed over: {error}"
        return None, damaged

    def peek(self) -> tuple[int, Setting] | None:
        """Steps and setting of the newest checkpoint, unchecked and without its tensors, if it has them."""
        with suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            state = json.loads((self.paths()[0] / _STATE).read_bytes())
            return int(state["num_steps"]), Setting(**state["setting"])
        return None

    def paths(self) -> list[Path]:
        """The folders of the checkpoints, the newest first."""
        return [path for path in self._named() if not path.is_symlink()]

    def _named(self) -> list[Path]:
        """Folders and links that have a checkpoint's name, the newest first."""
        found = self.folder.iterdir() if self.folder.exists() else []
        named = [path for path in found if _NAME.fullmatch(path.name)]
        return sorted((path for path in named if path.is_dir() or path.is_symlink()), key=_place)[::-1]

    def _read(self, path: Path) -> Checkpoint:
        """Raises ModelError or OSError unless every byte is as it was written."""
        contents = {name: (path / name).read_bytes() for name in (_TENSORS, _STATE)}
        if (path / _SUMS).read_bytes() != _sums(contents).encode():
            raise ModelError(f"its files are not those that {_SUMS} names")
        state = json.loads(contents[_STATE])
        if (held := _name(state["num_steps"], state["is_unvalidated"])) != path.name:
            raise ModelError(f"it holds {held}")
        if state["fingerprint"] != self.fingerprint:
            raise ModelError(f"it is of training {state['fingerprint']}, not {self.fingerprint}")
        try:
            tensors = load(contents[_TENSORS])
        except SafetensorError as error:
            raise ModelError(str(error)) from error
        return Checkpoint(
            num_steps=state["num_steps"],
            is_unvalidated=state["is_unvalidated"],
            tensors=tensors,
            state=state["state"],
        )


def _name(num_steps: int, is_unvalidated: bool) -> str:
    return f"step-{num_steps:010d}{'-unvalidated' if is_unvalidated else ''}"


def _place(path: Path) -> tuple[str, bool]:
    """Sorts as the training goes: by step, and a validation comes behind its step."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[1], match[2] is None


def _sums(contents: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())


def remove_folder(path: Path) -> None:
    """Remove a checkpoint at once from view, then from disk."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    _remove(hidden)  # left by a process that was killed here
    path.rename(hidden)
    _remove(hidden)


def _put_aside(path: Path) -> None:
    """Make room for a checkpoint; nothing that had its name is thrown away, but what was put aside before."""
    if os.path.lexists(path):
        aside = path.with_name(f"damaged-{path.name}")
        _remove(aside)
        path.rename(aside)


def _remove(path: Path) -> None:
    """Whatever stands there, if anything does."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
