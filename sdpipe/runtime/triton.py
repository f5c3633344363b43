"""A model repository for NVIDIA's Triton Inference Server, from the ONNX file alone.

The layout and config.pbtxt: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/
model_repository.md and model_configuration.md. The config's schema is protobuf's text form of ModelConfig in
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto; the tests parse it.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import ENSEMBLE, INPUT, OUTPUTS, open_artifact
from sdpipe.runtime.metadata import Metadata

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "1/model.onnx"
_OURS = "# written by sdpipe triton"  # the first line of our config.pbtxt
_WRITTEN = {CONFIG, LABELS, MODEL}
MAX_DELAY_US = 1000
"""How long Triton may wait for more requests to make a batch of them, in microseconds."""


def write_triton_repository(model_path: Path, out: Path, name: str, max_batch_size: int) -> Path:
    """Write OUT/<name>/ with config.pbtxt, labels.txt and 1/model.onnx; returns it.

    A folder that this wrote before is replaced. Raises ModelError if the model cannot be opened, is the
    sub-network ensemble or has labels that Triton cannot take, if the name is none for a folder, or if
    OUT/<name> is something else or holds more, such as another version.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ModelError(f"{name!r}: expected letters, digits, -, _ and . in a model's name")
    metadata = open_artifact(model_path, "cpu").metadata
    if metadata.variant == ENSEMBLE:
        raise ModelError(f"{model_path}: is the sub-network ensemble, which has two inputs; serve its model")
    labels = metadata.class_names
    if unfit := [label for label in labels if label.splitlines() != [label]]:
        raise ModelError(
            f"{model_path}: label {unfit[0]!r}: expected one line, as {LABELS} has for each label"
        )
    folder = out / name
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise ModelError(
            f"{folder}: exists and was not written by `sdpipe triton`; choose another --out or --name"
        )
    if more := sorted(
        {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - _WRITTEN
    ):
        raise ModelError(
            f"{folder}: also holds {more[0]}, which would be lost; choose another --out or --name"
        )
    out.mkdir(parents=True, exist_ok=True)
    with _beside(folder) as beside:
        (beside / MODEL).parent.mkdir()
        shutil.copyfile(model_path, beside / MODEL)
        (beside / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        (beside / CONFIG).write_text(_config(name, metadata, max_batch_size), encoding="utf-8")
        beside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        beside.replace(folder)
    return folder


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new hidden folder beside one, which no other process writes meanwhile; none is left behind."""
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS has no locks of folders: there what was left stays
            fcntl.flock(parent, fcntl.LOCK_EX)
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a process that was killed
                shutil.rmtree(left)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    finally:
        os.close(parent)


def _is_ours(folder: Path) -> bool:
    config = folder / CONFIG
    return config.is_file() and config.read_text(errors="replace").startswith(_OURS)


def _config(name: str, metadata: Metadata, max_batch_size: int) -> str:
    dims = [*metadata.image_size, metadata.channels]
    preferred = [size for size in (8, 16, 32, 64, 128) if size <= max_batch_size]
    batching = f"preferred_batch_size: {preferred}\n  " if preferred else ""
    # With max_batch_size over 0 the dims leave the batch out, and Triton puts it in front.
    return f"""{_OURS}
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch_size}
input [
  {{ name: "{INPUT}", data_type: TYPE_UINT8, dims: {dims} }}
]
output [
  {{ name: "{OUTPUTS[0]}", data_type: TYPE_FP32, dims: {[len(metadata.class_names)]} }},
  {{
    name: "{OUTPUTS[1]}", data_type: TYPE_FP32, dims: {[len(metadata.class_names)]}
    label_filename: "{LABELS}"
  }}
]
dynamic_batching {{
  {batching}max_queue_delay_microseconds: {MAX_DELAY_US}
}}
instance_group [
  {{ count: 1, kind: KIND_AUTO }}
]
version_policy: {{ latest: {{ num_versions: 1 }} }}
"""
