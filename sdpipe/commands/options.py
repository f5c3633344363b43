"""What commands share in their options: which deployed model, and numbers."""

import re
from pathlib import Path
from typing import Any

import click

from sdpipe.errors import on_one_line

DEFAULT_MODEL = "models/model.onnx"
MAX_BATCH = 4096  # images; what they and a network's hidden images take is memory
MAX_MEMBERS = 1000  # sub-networks; each is run on every image
MAX_SEEDS = 1000
MAX_SEED = 2**32 - 1  # as for a training's


def whole_numbers(text: str) -> list[int] | None:
    """`64,1` as [1, 64], in order and each once; None if anything else stands in it, or over nine digits."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        return None
    return sorted({int(part) for part in parts})


def _existing(_context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    if not value.is_file():
        found = "not a file" if value.exists() else "no such file"
        raise click.BadParameter(f"{found}: {on_one_line(str(value))}. `make repro` makes {DEFAULT_MODEL}.")
    return value


_SETTINGS: dict[str, Any] = {
    "type": click.Path(path_type=Path),
    "default": DEFAULT_MODEL,
    "envvar": "SDPIPE_MODEL",
    "callback": _existing,
}

model_option = click.option(
    "--model",
    help=f"The ONNX file. Default: {DEFAULT_MODEL}, or the environment variable SDPIPE_MODEL.",
    **_SETTINGS,
)

model_argument = click.argument("model", **_SETTINGS)

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)

batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1, max=MAX_BATCH),
    default=64,
    show_default=True,
    help="Images at a time.",
)

verify_option = click.option(
    "--verify", is_flag=True, help="Compare MODEL with the SHA256SUMS in its folder, or the one above, first."
)
