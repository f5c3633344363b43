"""Commands that hand a deployed model to a server. They need the base install only."""

from pathlib import Path

import click

from sdpipe.commands.options import MAX_BATCH, model_option
from sdpipe.errors import on_one_line


@click.command()
@model_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The model repository, made if missing."
)
@click.option("--name", default="sdpipe", show_default=True, help="The model's name and folder in it.")
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1, max=MAX_BATCH),
    default=64,
    show_default=True,
    help="Pictures that Triton may put into one batch.",
)
def triton(model: Path, out: Path, name: str, max_batch_size: int) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server: OUT/NAME/."""
    from sdpipe.runtime.triton import write_triton_repository

    click.echo(on_one_line(str(write_triton_repository(model, out, name, max_batch_size))))
