"""How commands are told which deployed model."""

from pathlib import Path
from typing import Any

import click

from sdpipe.errors import on_one_line

DEFAULT_MODEL = "models/model.onnx"


def _existing(_context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    if not value.is_file():
        raise click.BadParameter(
            f"no such file: {on_one_line(str(value))}. `make repro` makes {DEFAULT_MODEL}."
        )
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
