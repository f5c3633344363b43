"""`python -m benchmarks.recipes --out FILE.json`: what a training of each paper's recipe costs here.

A recipe's networks take steps at full size on random pixels, by turns. A training's time is that of its steps
alone; reading pictures, validations and checkpoints come on top.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.bare import BareStep
from benchmarks.settings import NUM_CHANNELS, NUM_CLASSES
from benchmarks.table import print_tables, spread_words
from benchmarks.timing import ratio, seconds, spread, take_turns
from sdpipe.errors import errors_on_one_line
from sdpipe.files import write_json
from sdpipe.provenance import hardware
from sdpipe.recipes import Recipe, load_recipes
from sdpipe.runtime.turns import Turn
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws

MEASURED_PATH = Path(__file__).resolve().parent / "recipes.json"
NAMES = (
    "cifar10",
    "dropout",
    "svhn",
    "cifar10-1202",
    "degradation",
    "figure8-right",
    "imagenet-he",
    "imagenet",
)
_P_L = (0.5, 1.0)  # of a grid's runs
_IMAGENET_CLASSES = 1000


def measure(names: tuple[str, ...], steps: int, warmup: int) -> Iterator[dict[str, Any]]:
    """After each of these recipes the rows so far, with where, when and with what they were measured.

    Raises SdpipeError.
    """
    compute = choose_compute("auto", "auto")
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += _rows(load_recipes()[name], compute, steps, warmup)
        yield {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(compute.device_name),
            "compute": compute.reason,
            "torch": torch.__version__,
            "rows": rows,
        }


def _rows(recipe: Recipe, compute: Compute, steps: int, warmup: int) -> Iterator[dict[str, Any]]:
    configs = {name: TrainConfig.model_validate({**recipe.train, **run}) for name, run in recipe.runs.items()}
    configs = {name: config for name, config in configs.items() if config.p_L in _P_L}
    turns = {name: _turn(recipe, config, compute) for name, config in configs.items()}
    taken_s = take_turns(turns, rounds=steps, warmup=warmup, label=recipe.name)
    for name, config in configs.items():
        assert recipe.num_train is not None
        num_steps = recipe.num_train // config.batch_size * config.epochs
        constant = config.model_copy(update={"p_L": 1.0, "rule": "linear_decay"})
        twin = next((other for other, its in configs.items() if its == constant and other != name), None)
        yield {
            "recipe": recipe.name,
            "run": name,
            "depth": config.depth,
            "batch_size": config.batch_size,
            "parts": config.micro_batches,
            "step_s": spread(taken_s[name]),
            "ratio": None if twin is None else ratio(taken_s[name], taken_s[twin]),
            "num_steps": num_steps,
            "training_s": float(np.mean(taken_s[name])) * num_steps,
        }


def _turn(recipe: Recipe, config: TrainConfig, compute: Compute) -> Turn:
    """A step, with blocks drawn as in the training."""
    num_classes = _IMAGENET_CLASSES if config.family == "imagenet" else NUM_CLASSES
    batch = _random_batch(config, recipe, compute.device)
    step = BareStep(config, compute, batch, num_classes=num_classes)
    probs = config.network_config(in_channels=NUM_CHANNELS, num_classes=num_classes).survival_probs
    draws, numbers = Draws(config.seed), count()

    def turn() -> float:
        active = draws.active_blocks(0, next(numbers), probs)
        return seconds(lambda: step.take(active), compute.device)

    return turn


def _random_batch(config: TrainConfig, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    assert recipe.image_px is not None
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, recipe.image_px, recipe.image_px, NUM_CHANNELS)
    images_NHWC = torch.randn(shape, generator=generator).to(device)
    labels_N = torch.randint(NUM_CLASSES, (config.batch_size,), generator=generator).to(device)
    return images_NHWC.permute(0, 3, 1, 2), labels_N


def markdown(results: Mapping[str, Any]) -> str:
    """The table under a sentence with hardware, date and n; without a newline at the end."""
    rows = results["rows"]
    lines = [
        f"Steps at full size on random pixels, a recipe's by turns, n = {rows[0]['step_s']['n']} "
        f"({results['hardware']}; {results['compute']}; torch {results['torch']}; {results['date']}):",
        "",
        "| recipe | run | layers | batch | ms a step, median (quartiles) | over constant depth, of sums "
        "| steps | hours of steps |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        parts = f" in {row['parts']} parts" if row["parts"] > 1 else ""
        over = "" if row["ratio"] is None else f"{row['ratio']['of_sums']:.2f}"
        lines.append(
            f"| `{row['recipe']}` | {row['run']} | {row['depth']} | {row['batch_size']}{parts} "
            f"| {spread_words(row['step_s'], 1, 1000)} | {over} | {row['num_steps']:,} "
            f"| {row['training_s'] / 3600:.1f} |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON file to write."
)
@click.option(
    "--recipe", "names", multiple=True, type=click.Choice(NAMES), default=NAMES, help="Which of them."
)
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Counted steps of each training.")
@click.option("--warmup", type=click.IntRange(min=0), default=5, help="Steps before, not counted.")
def main(out: Path, names: tuple[str, ...], steps: int, warmup: int) -> None:
    """Measure the steps of the papers' recipes, write OUT after each, and print their table."""
    with errors_on_one_line():
        out.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the measuring
        for results in measure(names, steps, warmup):
            write_json(out, results)
    print_tables(out, markdown, "benchmarks.recipes")


if __name__ == "__main__":
    main()
