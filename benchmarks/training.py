"""`python -m benchmarks.training --out FILE.json`: what a training step and an epoch cost, side by side.

On a CUDA device where there is one, else on the CPU. `python -m benchmarks.table FILE.json` prints the tables
again.
"""

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.epochs import measure_epochs
from benchmarks.settings import Settings
from benchmarks.steps import measure_steps
from benchmarks.table import markdown
from sdpipe.architecture import groups_of
from sdpipe.errors import errors_on_one_line
from sdpipe.files import write_json
from sdpipe.provenance import hardware
from sdpipe.training.compute import choose_compute

_COUNT = click.IntRange(min=1)


def measure(settings: Settings) -> dict[str, Any]:
    """Both tables, with where, when and with what they were measured. Raises SdpipeError."""
    compute = choose_compute("auto", "auto")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(compute.device_name),
        "compute": compute.reason,
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
        "settings": asdict(settings),
        "steps": measure_steps(settings, compute),
        "epochs": measure_epochs(settings, compute),
    }


def _checked_depth(_context: click.Context, _parameter: click.Parameter, value: int) -> int:
    try:
        groups_of("cifar", value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON file to write."
)
@click.option("--depth", default=110, callback=_checked_depth, help="Layers, in the step table.")
@click.option("--batch-size", type=click.IntRange(min=2), default=128, help="Images of a step.")
@click.option(
    "--p-l", "p_L", type=click.FloatRange(0, 1, min_open=True), default=0.5, help="p_L, linear decay."
)
@click.option("--steps", type=_COUNT, default=40, help="Rounds of the step table.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, help="Rounds before, not counted.")
@click.option("--epoch-depth", default=20, callback=_checked_depth, help="Layers, in the epoch table.")
@click.option("--epoch-steps", type=_COUNT, default=500, help="Steps of an epoch.")
@click.option("--chunk", type=_COUNT, default=10, help="Steps of a turn in the epoch table.")
@click.option("--repeats", type=_COUNT, default=10, help="Of a checkpoint and of a validation.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=2, help="Worker processes of the plain script."
)
def main(out: Path, **options: Any) -> None:
    """Measure training steps and epochs, print their tables, and write OUT."""
    settings = Settings(**options)
    if settings.epoch_steps % settings.chunk:
        raise click.UsageError(f"--epoch-steps: expected a multiple of --chunk {settings.chunk}")
    with errors_on_one_line():
        out.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the measuring
        results = measure(settings)
        write_json(out, results)
        click.echo(markdown(results))


if __name__ == "__main__":
    main()
