"""The command about families of smaller networks. It needs the training packages."""

import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import click

from sdpipe.commands.options import MAX_BATCH, whole_numbers
from sdpipe.commands.printing import aligned
from sdpipe.errors import DataError, ModelError, SdpipeError, tell, training_packages


def _counts(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int]:
    if value is None:
        return []
    numbers = whole_numbers(value)
    if numbers is None:
        raise click.BadParameter(f"expected numbers of blocks like 17,14, got {value!r}")
    return numbers[::-1]


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, got {value}")
    return value


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[MODELS/RUN]...")
@click.option("--keep", callback=_counts, metavar="N,...", help="First make networks of so many blocks, too.")
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    help="Pick the file of lowest validation error that takes at most so long for a batch.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0, max=1),
    callback=_finite,
    help="Pick the fastest file with at most this validation error, as a fraction.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1, max=MAX_BATCH),
    default=1,
    show_default=True,
    help="Images of the batch whose latency counts.",
)
@click.option(
    "--copy-to", type=click.Path(path_type=Path, dir_okay=False), help="Copy the picked file to here."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="models",
    show_default=True,
    help="The folder for pareto.csv and pareto.png.",
)
def prune(
    folders: tuple[Path, ...],
    keep: list[int],
    latency_ms: float | None,
    max_error: float | None,
    batch_size: int,
    copy_to: Path | None,
    out: Path,
) -> None:
    """Compare each run's networks of fewer blocks, and pick one. Default: all of models/.

    Errors and times are measured now. Picking goes by the validation part, prints the path on standard
    output and the table on standard error.
    """
    if latency_ms is not None and max_error is not None:
        raise click.UsageError("Give --latency-ms or --max-error, not both.")
    is_picking = latency_ms is not None or max_error is not None
    if copy_to is not None and not is_picking:
        raise click.UsageError("--copy-to needs --latency-ms or --max-error.")
    from sdpipe.commands.writable import check_can_be_written

    with training_packages("prune"):
        from sdpipe.deploy.pruning.family import pick_by_error, pick_by_latency
    runs = _runs(folders)
    for path in (
        out / "pareto.csv",
        out / "pareto.png",
        *([copy_to] if copy_to else []),
    ):  # now, not after all the measuring
        check_can_be_written(path)
    further = _planned(runs, keep, are_named=bool(folders))
    variants = _measured(runs, further, _parities(runs, are_named=bool(folders)), batch_size, out)
    click.echo(_table(variants, batch_size), err=is_picking)
    if not is_picking:
        return
    if latency_ms is not None:
        picked = pick_by_latency(variants, latency_ms, batch_size)
    else:
        assert max_error is not None
        picked = pick_by_error(variants, max_error, batch_size)
    click.echo(picked.path)
    if copy_to is not None:
        _copy(picked.path, copy_to)


def _runs(folders: tuple[Path, ...]) -> list[Path]:
    """Those that were given, each once, or all of models/. Raises SdpipeError if one is no run's folder."""
    if not folders:
        found = sorted(path.parent for path in Path("models").glob("*/weights.safetensors"))
        if not found:
            raise SdpipeError("models/: no finished run; `make repro` trains them")
        return _of_present_data(_exported(found))
    for folder in folders:
        if not (folder / "weights.safetensors").is_file():
            raise SdpipeError(
                f"{folder}: no weights.safetensors there; expected a run's folder such as models/stochastic"
            )
    return _each_once(folders)


def _exported(runs: list[Path]) -> list[Path]:
    """Those with a deployable file: of a sweep that was stopped, or trained alone, some have none yet."""
    lacking = [run for run in runs if not (run / "model.onnx").exists()]
    for run in lacking:
        tell(f"note: {run}: left out, it has no model.onnx yet")
    if len(lacking) == len(runs):
        raise SdpipeError("models/: no run has a model.onnx; `dvc repro` makes it")
    return [run for run in runs if run not in lacking]


def _of_present_data(runs: list[Path]) -> list[Path]:
    """Those of the data that data/ holds, if there are any: older ones may stand in models/, too."""
    from sdpipe.data.store import open_dataset
    from sdpipe.training.weights import load_info

    @cache
    def digest_of(dataset: str) -> str | None:
        try:
            return open_dataset(Path("data") / dataset).digest
        except DataError:
            return None

    infos = {run: load_info(run / "weights.safetensors") for run in runs}
    present = [run for run, info in infos.items() if info.dataset_digest == digest_of(info.dataset)]
    if not present:
        return runs
    for run in runs:
        if run not in present:
            tell(f"note: {run}: left out, data/{infos[run].dataset} is not what it was trained on")
    return present


def _planned(runs: list[Path], keep: list[int], *, are_named: bool) -> list[Any]:
    """The sizes to be made, of each run, all checked before the first is made.

    Raises DataError if the runs are of different data or what stands in pruned/ cannot be taken further,
    ModelError if a run has no such size; of one that was not asked for a note says so, if another has.
    """
    from sdpipe.deploy.pruning.family import check_same_data
    from sdpipe.deploy.pruning.further import plan_further

    check_same_data(runs)
    planned: list[Any] = []
    refused: list[ModelError] = []
    for run in runs if keep else ():
        try:
            planned.append(plan_further(run, keep))
        except ModelError as error:
            if are_named:
                raise
            refused.append(error)
    if refused and not planned:
        raise refused[0]
    for reason in refused:
        tell(f"note: {reason}; its files are compared as they are")
    return planned


def _parities(runs: list[Path], *, are_named: bool) -> dict[str, bool]:
    """SHA-256 -> whether its parity held, of the files that evaluate looked at.

    Raises DataError if a run's metrics.json cannot be read; of one that was not asked for, a note says so.
    """
    from sdpipe.deploy.pruning.family import read_parities

    found: dict[str, bool] = {}
    for run in runs:
        try:
            found |= read_parities(run)
        except DataError as error:
            if are_named:
                raise
            tell(f"note: {error}; whether the parity of its files held is not known")
    return found


def _measured(
    runs: list[Path], further: list[Any], parities: dict[str, bool], batch_size: int, out: Path
) -> list[Any]:
    """Make what was planned, measure, and write pareto.csv and pareto.png."""
    from sdpipe.data.store import open_dataset
    from sdpipe.deploy.pruning.family import measure, write_table
    from sdpipe.deploy.pruning.further import prune_further
    from sdpipe.deploy.pruning.pareto import draw_pareto
    from sdpipe.training.weights import load_info

    info = load_info(runs[0] / "weights.safetensors")
    dataset = open_dataset(Path("data") / info.dataset)
    for each in further:
        prune_further(each, dataset)
    variants = measure(runs, parities, dataset, batch_size)
    write_table(out / "pareto.csv", variants)
    title = f"{info.dataset}, {info.network.depth} layers: blocks removed after training"
    draw_pareto(out / "pareto.png", variants, batch_size, title)
    return variants


def _each_once(folders: tuple[Path, ...]) -> list[Path]:
    """Whatever the paths by which a folder is given."""
    found: dict[str, Path] = {}
    for folder in folders:
        found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())


def _table(variants: list[Any], batch_size: int) -> str:
    """For people: errors in per cent, speed-up over the run's full fp32 file at batch 64."""
    sizes = list(variants[0].latency_ms)
    header = [
        "run", "variant", "blocks", "validation", "test error",
        *(f"ms at {size}" for size in sizes),
        "speed-up", "bytes", f"front at {batch_size}", "parity",
    ]  # fmt: skip
    rows = [
        [
            one.run,
            one.variant,
            f"{one.blocks} of {one.num_blocks}",
            f"{one.validation_error:.2%}",
            f"{one.test_error:.2%}",
            *(f"{one.latency_ms[size]:.2f}" for size in sizes),
            f"{one.speedup:.2f}",
            f"{one.num_bytes:,}",
            "yes" if one.on_front else "",
            {True: "held", False: "failed", None: ""}[one.parity],
        ]
        for one in variants
    ]
    return "\n".join(aligned(header, rows, num_words=2))


def _copy(source: Path, target: Path) -> None:
    from sdpipe.files import replacing

    with replacing(target) as beside:
        beside.write_bytes(source.read_bytes())
