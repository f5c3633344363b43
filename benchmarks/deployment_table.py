"""`python -m benchmarks.deployment_table FILE.json`: the Markdown table, as it stands in docs/deployed.md."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.table import print_tables, spread_words

BATCHES = ("batch_1", "batch_64")
ENGINES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO", "pytorch": "PyTorch eager"}


def markdown(results: Mapping[str, Any]) -> str:
    """The table under a sentence with hardware, date and n; without a newline at the end."""
    engines = [name for name in ENGINES if any(name in row["engines"] for row in _rows(results))]
    header = ["run", "file", "blocks", "test error", "KB"]
    header += [f"{ENGINES[name]}, ms at 1 / 64" for name in engines]
    header.append("throughput over fp32 at batch 64 (quartiles)")
    lines = [*_words(results), "", _line(header), _line(["---", "---", *["---:"] * (len(header) - 2)])]
    for run in results["runs"]:
        for row in run["rows"]:
            lines.append(_line(_cells(run, row, engines)))
    return "\n".join(lines)


def _rows(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (row for run in results["runs"] for row in run["rows"])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _words(results: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    for run in results["runs"]:
        yield (
            f"`{Path(run['folder']).name}`: {run['data_set']}, {run['depth']} layers, p_L {run['p_L']:g}, "
            f"{run['num_test']:,} test images."
        )
    yield (
        f"Medians, all by turns, n = {results['rounds']}, {_threads(results['threads'])} "
        f"({results['hardware']}; {versions}; {results['date']}); throughput in onnxruntime, by rounds, over "
        "the same run's fp32 file; PyTorch runs the un-quantised weights that a file was made of, without "
        "the blocks that it lacks:"
    )


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _cells(run: Mapping[str, Any], row: Mapping[str, Any], engines: list[str]) -> list[str]:
    blocks = f"{row['num_blocks']} of {run['num_blocks']}"
    cells = [Path(run["folder"]).name, row["variant"], blocks, f"{row['test_error']:.2%}"]
    cells.append(f"{row['bytes'] / 1e3:,.0f}")
    for name in engines:
        found = row["engines"].get(name)
        cells.append(
            "" if found is None else " / ".join(f"{found[batch]['ms']['median']:.3g}" for batch in BATCHES)
        )
    figures = row["engines"]["onnxruntime"][BATCHES[-1]]["throughput_ratio"]
    itself = row is run["rows"][0]
    return [*cells, "1" if itself else spread_words(figures, 2)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", metavar="FILE.json", type=click.Path(path_type=Path))
def main(path: Path) -> None:
    """Print the Markdown table of a measurement that `python -m benchmarks.deployment` wrote."""
    print_tables(path, markdown, "benchmarks.deployment")


if __name__ == "__main__":
    main()
