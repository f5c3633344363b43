"""`python -m benchmarks.table [FILE.json]`: a measurement's Markdown tables, as they stand in the README."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sdpipe.errors import DataError, errors_on_one_line
from sdpipe.files import read_json

MEASURED_PATH = Path(__file__).resolve().parent / "training.json"
STEP_TARGET = 1.03  # time over the share of what is active, in time
EPOCH_TARGET = 1.05  # an epoch over its bare steps

STEP_ROWS = {
    "constant": "constant depth",
    "stochastic": "stochastic depth, ours: inactive branches are not computed",
    "sample": "stochastic depth, ours, drawn for each image",
    "torchvision": "`torchvision.ops.StochasticDepth`, mode batch",
    "timm": "`timm.layers.DropPath`, for each image",
}
EPOCH_ROWS = {
    "bare_stochastic": "bare step, stochastic depth",
    "loop_stochastic": "our loop, stochastic depth",
    "bare_constant": "bare step, constant depth",
    "loop_constant": "our loop, constant depth",
    "plain": "plain PyTorch script, constant depth, fp32",
}


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables, each under a sentence with hardware, date and n; without a newline at the end."""
    return "\n".join([*_step_table(results), "", *_epoch_table(results)])


def spread_words(spread: Mapping[str, Any], digits: int, factor: float = 1) -> str:
    """Median and quartiles, such as `0.76 (0.75 to 0.78)`, each times a factor."""
    median, low, high = (
        f"{spread[name] * factor:.{digits}f}" for name in ("median", "quartile_1", "quartile_3")
    )
    return f"{median} ({low} to {high})"


def ratio_cells(ratio: Mapping[str, Any]) -> str:
    """Two cells: the spread of the ratios, and the ratio of the sums; 1 for what was divided by itself."""
    itself = ratio["quartile_1"] == ratio["quartile_3"] == ratio["of_sums"] == 1
    return "1 | 1" if itself else f"{spread_words(ratio, 3)} | {ratio['of_sums']:.3f}"


def _step_table(results: Mapping[str, Any]) -> list[str]:
    settings, rows, active = results["settings"], results["steps"]["rows"], results["steps"]["active"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"One training step (forward, backward, update) at depth {settings['depth']}, p_L "
        f"{settings['p_L']:g}, {settings['batch_size']} images of 32 x 32 x 3, in turns, "
        f"n = {active['ratio_to_share']['n']} ({results['hardware']}; {results['compute']}; {versions}; "
        f"{results['date']}):",
        "",
        "| step | ms, median (quartiles) | over constant depth, median (quartiles) | over it, of sums |",
        "|---|---|---|---|",
    ]
    for name, label in STEP_ROWS.items():
        step_ms = spread_words(rows[name]["step_s"], 1, 1000)
        lines.append(f"| {label} | {step_ms} | {ratio_cells(rows[name]['ratio'])} |")
    return [*lines, "", _share_words(active)]


def _share_words(active: Mapping[str, Any]) -> str:
    to_share, to_time_share = active["ratio_to_share"], active["ratio_to_time_share"]
    groups_ms = ", ".join(f"{1000 * group_s:.0f}" for group_s in active["groups_s"].values())
    return (
        f"In those rounds {active['mean_blocks']:.1f} of {active['num_blocks']} blocks were active on "
        f"average, with {active['mean_share']:.3f} of all multiply-adds; our step took "
        f"{spread_words(to_share, 3)} times that share of constant depth's time, of sums "
        f"{to_share['of_sums']:.3f}. Multiply-adds are not time: measured alone in the same rounds, the "
        f"groups' branches take {groups_ms} ms, and a step without any takes "
        f"{1000 * active['no_branch_s']:.0f} ms (medians). By these times the share is "
        f"{active['mean_time_share']:.3f}, and our step took {spread_words(to_time_share, 3)} times that, of "
        f"sums {to_time_share['of_sums']:.3f} (target: at most {STEP_TARGET})."
    )


def _epoch_table(results: Mapping[str, Any]) -> list[str]:
    settings, rows = results["settings"], results["epochs"]["rows"]
    lines = [
        f"An epoch of {settings['epoch_steps']} steps at depth {settings['epoch_depth']}, p_L "
        f"{settings['p_L']:g}, {settings['batch_size']} images of 32 x 32 x 3, in turns of "
        f"{settings['chunk']} steps, n = {rows['plain']['ratio']['n']} ({results['hardware']}; "
        f"{results['date']}):",
        "",
        "| training | images/s, median (quartiles) | time over bare steps, median (quartiles) "
        "| over them, of sums | with checkpoints |",
        "|---|---|---|---|---|",
    ]
    for name, label in EPOCH_ROWS.items():
        row = rows[name]
        saved = f"{row['ratio_with_checkpoints']['of_sums']:.3f}" if "ratio_with_checkpoints" in row else ""
        images = spread_words(row["images_per_s"], 0)
        lines.append(f"| {label} | {images} | {ratio_cells(row['ratio'])} | {saved} |")
    return [*lines, "", _epoch_words(settings, results["epochs"])]


def _epoch_words(settings: Mapping[str, Any], epochs: Mapping[str, Any]) -> str:
    saving, validation, rows = epochs["checkpoint"], epochs["validation"], epochs["rows"]
    written = rows["loop_stochastic"]["num_checkpoints"], rows["loop_constant"]["num_checkpoints"]
    to_loop = {kind: spread_words(found, 2) for kind, found in epochs["plain_to_loop"].items()}
    return (
        "A bare step is the training step on one batch in memory; the loop makes its batches, shifted and "
        f"flipped (target: at most {EPOCH_TARGET}). The script is a DataLoader with {settings['workers']} "
        f"workers over PIL images; it takes {to_loop['constant']} times as long as our loop at constant "
        f"depth, {to_loop['stochastic']} times as long as with stochastic depth. A checkpoint takes "
        f"{spread_words(saving['seconds'], 1, 1000)} ms (n = {saving['seconds']['n']}), "
        f"{saving['share']:.2%} of the time at one every {saving['every_s']:g} s; the loops wrote "
        f"{written[0]} and {written[1]} in their turns. Validating {validation['num_images']:,} images takes "
        f"{spread_words(validation['seconds'], 2)} s (n = {validation['seconds']['n']}) and is not in the "
        "table."
    )


def print_tables(path: Path, markdown: Callable[[Mapping[str, Any]], str], written_by: str) -> None:
    """Print what `markdown` makes of a measurement's file; a file of something else is one plain line."""
    with errors_on_one_line():
        results = read_json(path)
        try:
            tables = markdown(results)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: expected a file of {written_by}: {error}") from error
        click.echo(tables)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", metavar="[FILE.json]", default=MEASURED_PATH, type=click.Path(path_type=Path))
def main(path: Path) -> None:
    """Print the Markdown tables of a measurement that `python -m benchmarks.training` wrote.

    Without FILE.json it is the committed one, benchmarks/training.json.
    """
    print_tables(path, markdown, "benchmarks.training")


if __name__ == "__main__":
    main()
