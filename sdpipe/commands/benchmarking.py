"""The command `benchmark`. It needs the base install only; what else is installed is measured beside."""

import platform
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdpipe.commands.options import MAX_BATCH, whole_numbers
from sdpipe.commands.printing import aligned, markdown_table
from sdpipe.errors import ModelError, SdpipeError

if TYPE_CHECKING:
    from sdpipe.runtime.benchmark import Contender

_Table = Callable[[list[str], list[list[str]]], list[str]]


def _numbers(_context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """`1,64` as [1, 64], in order and each once."""
    if value is None:
        return None
    from sdpipe.runtime.cores import num_cores

    numbers = whole_numbers(value)
    limit = MAX_BATCH if parameter.name == "batch_sizes" else num_cores()
    if numbers is None or numbers[0] < 1 or numbers[-1] > limit:
        whose = "" if parameter.name == "batch_sizes" else ", the cores that this process may use"
        raise click.BadParameter(f"expected numbers from 1 to {limit}{whose}, such as 1,2; got {value!r}")
    return numbers


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path), metavar="[MODEL]...")
@click.option("--batch-sizes", default="1,64", show_default=True, callback=_numbers, help="Images of a call.")
@click.option(
    "--threads", callback=_numbers, help="Threads of each. Default: 1, and as many as `predict` takes."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1, max=1_000_000),
    default=50,
    show_default=True,
    help="Timed calls of each.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file for all figures, with hardware and versions.",
)
@click.option("--markdown", is_flag=True, help="Print the tables in Markdown.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def benchmark(
    models: tuple[Path, ...],
    batch_sizes: list[int],
    threads: list[int] | None,
    repeats: int,
    json_path: Path | None,
    markdown: bool,
    device: str,
) -> None:
    """Time each MODEL, and PyTorch and OpenVINO beside it where they are installed.

    Latency (percentiles of the calls, in ms) and throughput, all contenders by turns in one process; start-up
    and peak memory in fresh processes. Default: models/model.onnx and what is in models/variants/. PyTorch
    runs the weights in models/ that a file was made of. Ctrl-C prints what is measured so far.
    """
    from sdpipe.commands.writable import check_can_be_written
    from sdpipe.files import write_json
    from sdpipe.runtime.cores import num_threads

    interrupted = complete = False
    if json_path is not None:  # now, not after all the measuring
        check_can_be_written(json_path)
    results: dict[str, Any] = {"models": [], "timings": [], "failures": []}
    try:
        chosen = [
            path for path in dict.fromkeys(models or _default_models()) if _opens(path, device, results)
        ]
        results = {**_head(repeats, device), **results}
        _measure(chosen, batch_sizes, threads or sorted({1, num_threads()}), repeats, device, results)
        complete = True
    except SdpipeError as error:
        _fail(error, results)
    except KeyboardInterrupt:
        interrupted = True
    results["complete"] = complete
    if results["models"] or results["timings"]:
        click.echo("\n".join(report(results, markdown_table if markdown else aligned)))
    if json_path is not None:
        write_json(json_path, results)
    if interrupted:
        raise KeyboardInterrupt
    if results["failures"]:
        raise SystemExit(1)


def _default_models() -> tuple[Path, ...]:
    """The deployed file and its variants; the ensemble's takes another input and is left out."""
    variants = sorted(Path("models/variants").glob("*.onnx"))
    return (Path("models/model.onnx"), *(path for path in variants if path.name != "ensemble.onnx"))


def _opens(path: Path, device: str, results: dict[str, Any]) -> bool:
    from sdpipe.deploy.timing.contenders import open_for_benchmark

    try:
        open_for_benchmark(path, device, 1)
    except ModelError as error:
        _fail(error, results)
        return False
    return True


def _fail(error: SdpipeError, results: dict[str, Any]) -> None:
    """One contender less; the rest is still measured."""
    results["failures"].append(str(error))
    click.echo(f"error: {error}", err=True)


def _head(repeats: int, device: str) -> dict[str, Any]:
    """Where, when and with what."""
    from importlib.util import find_spec

    import numpy as np
    import onnxruntime

    from sdpipe.provenance import processor_name
    from sdpipe.runtime.cores import num_cores
    from sdpipe.version import __version__

    versions = {"sdpipe": __version__, "python": platform.python_version(), "numpy": np.__version__}
    versions["onnxruntime"] = onnxruntime.__version__
    if find_spec("openvino") is not None:
        from importlib.metadata import version

        versions["openvino"] = version("openvino")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{processor_name()}, {num_cores()} cores, {platform.machine()}",
        "device": device,
        "versions": versions,
        "repeats": repeats,
    }


def _measure(
    paths: list[Path],
    batch_sizes: list[int],
    threads: list[int],
    repeats: int,
    device: str,
    results: dict[str, Any],
) -> None:
    """Fill in `models` and `timings`, a piece as soon as it is measured; what fails is left out."""
    from sdpipe.runtime.benchmark import WARMUP, time_contenders

    if paths:
        paths = _measure_starts(paths, max(batch_sizes), device, results)
    if not paths:
        return
    for count in threads:
        contenders = _contenders(paths, count, device, results)
        for batch_size in batch_sizes:
            running = [one for one in contenders if _runs(one, batch_size, results)]
            if not running:
                continue
            label = f"batch {batch_size}, {count} threads, {len(running)} contenders: round"
            time_contenders(
                running,
                batch_size=batch_size,
                threads=count,
                numbers=_with_progress(range(WARMUP + repeats), label),
                timings=results["timings"],
            )


def _runs(contender: "Contender", batch_size: int, results: dict[str, Any]) -> bool:
    from sdpipe.runtime.benchmark import turn

    try:
        turn(contender, batch_size)()
    except ModelError as error:
        _fail(error, results)
        return False
    return True


def _measure_starts(paths: list[Path], batch_size: int, device: str, results: dict[str, Any]) -> list[Path]:
    """Start-up of a prediction of one image, and the peak memory of a process that predicts one batch.

    Returns the files whose processes all went well.
    """
    import numpy as np

    from sdpipe.runtime.benchmark import NUM_STARTS, Start, start_process

    starts: dict[Path | None, list[Start]] = {path: [] for path in (None, *paths)}  # None: the imports alone
    sizes = [1] * NUM_STARTS + [batch_size]
    for number in _with_progress(range(len(sizes)), "start-up: round"):
        for path in list(starts):
            try:
                starts[path].append(start_process(path, batch_size=sizes[number], device=device))
            except ModelError as error:
                _fail(error, results)
                del starts[path]
    for path, (*small, large) in starts.items():
        row = {
            "file": None if path is None else str(path),
            "bytes": None if path is None else path.stat().st_size,
            "start_s": float(np.median([start.seconds for start in small])),
            "num_starts": NUM_STARTS,
            "peak_bytes": large.peak_bytes,
            "peak_batch_size": batch_size,
        }
        results["models"].append(row)
    return [path for path in starts if path is not None]


def _contenders(paths: list[Path], threads: int, device: str, results: dict[str, Any]) -> list["Contender"]:
    """All engines on all files at a number of threads; on CUDA onnxruntime alone."""
    from sdpipe.deploy.timing.contenders import eager_contenders, open_for_benchmark, openvino_contender
    from sdpipe.runtime.benchmark import onnx_contender

    artifacts = [open_for_benchmark(path, device, threads) for path in paths]
    contenders = [onnx_contender(artifact) for artifact in artifacts]
    if any("CUDAExecutionProvider" in artifact.providers for artifact in artifacts):
        return contenders
    for artifact in artifacts:
        try:
            contender = openvino_contender(artifact, threads)
        except ModelError as error:
            _fail(error, results)
            continue
        contenders += [] if contender is None else [contender]
    eager = eager_contenders([artifact.metadata for artifact in artifacts], Path("models"), threads)
    if eager:
        import torch

        results["versions"]["torch"] = torch.__version__
    return contenders + eager


def _with_progress(numbers: range, label: str) -> Iterator[int]:
    """Numbers as they are, counted on standard error while that is a terminal."""
    for number in numbers:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{label} {number + 1} of {len(numbers)}", nl=False, err=True)
        yield number
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)


def report(results: dict[str, Any], table: _Table) -> Iterator[str]:
    """The tables for people, with where and when they were measured."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    yield f"{results['hardware']}; device {results['device']}; {versions}; {results['date']}"
    if not results["complete"]:
        yield "interrupted: what was measured until then"
    if results["models"]:
        first = results["models"][0]
        header = [
            "file",
            "KB",
            f"start-up s (n = {first['num_starts']})",
            f"peak MB (batch {first['peak_batch_size']})",
        ]
        rows = [
            [
                row["file"] or "(imports alone)",
                "" if row["bytes"] is None else f"{row['bytes'] / 1e3:,.0f}",
                f"{row['start_s']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
            for row in results["models"]
        ]
        yield from ["", *table(header, rows)]
    if results["timings"]:
        header = ["file", "engine", "threads", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "n"]
        rows = [
            [
                row["file"],
                row["engine"],
                str(row["threads"]),
                str(row["batch_size"]),
                *(f"{row[f'p{percent}_ms']:.2f}" for percent in (50, 90, 99)),
                f"{row['images_per_s']:,.0f}",
                str(row["n"]),
            ]
            for row in results["timings"]
        ]
        yield from ["", *table(header, rows)]
