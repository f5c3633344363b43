"""`python -m benchmarks.deployment models/RUN... --out FILE.json`: a run's ONNX files, side by side.

Each file in onnxruntime and OpenVINO, and PyTorch eager on the weights that it was made of; all files of all
runs by turns, on the CPU. `python -m benchmarks.deployment_table FILE.json` prints the table again.
"""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.deployment_table import markdown
from benchmarks.timing import ratio, spread, take_turns
from sdpipe.data.store import open_dataset
from sdpipe.deploy.confidence import error_fraction
from sdpipe.deploy.files_of_run import FLOAT32, INT8, files_of_run
from sdpipe.deploy.proof.parity import onnx_logits
from sdpipe.deploy.timing.contenders import matching_weights, open_for_benchmark, openvino_contender
from sdpipe.deploy.timing.eager import eager_contender
from sdpipe.errors import DataError, errors_on_one_line
from sdpipe.files import write_json
from sdpipe.provenance import processor_name
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.benchmark import WARMUP, Contender, onnx_contender, turn
from sdpipe.runtime.cores import num_cores, num_threads

BATCH_SIZES = (1, 64)
_ERROR_BATCH = 64  # images at a time of the test set


def deployed_files(folder: Path) -> list[Path]:
    """A run's files for the CPU: model.onnx, its int8 form, then the pruned ones, the largest first."""
    found = [one for one in files_of_run(folder) if one.kind in (FLOAT32, INT8) and not one.is_extra]
    pruned = [one.path for one in found if not one.is_whole]
    by_size = sorted(pruned, key=lambda path: (-path.stat().st_size, path.name))
    return [*(one.path for one in found if one.is_whole), *by_size]


def measure(folders: list[Path], *, threads: int, rounds: int, data: Path) -> dict[str, Any]:
    """Error, latency and throughput of all files of all runs. Raises SdpipeError.

    data: the folder of the data sets.
    """
    torch.set_num_threads(threads)
    artifacts = {
        folder: [open_for_benchmark(path, "cpu", threads) for path in deployed_files(folder)]
        for folder in folders
    }
    runs = [_describe(folder, opened, data) for folder, opened in artifacts.items()]
    contenders: dict[str, Contender] = {}
    for run, opened in zip(runs, artifacts.values(), strict=True):
        for row, artifact in zip(run["rows"], opened, strict=True):
            row["contenders"] = _add_contenders(contenders, artifact, Path(run["folder"]), threads)
    times_s = {
        size: take_turns(
            {name: turn(contender, size) for name, contender in contenders.items()},
            rounds=rounds,
            warmup=WARMUP,
            label=f"batch {size}",
        )
        for size in BATCH_SIZES
    }
    for run in runs:
        reference = run["rows"][0]["contenders"]["onnxruntime"]
        for row in run["rows"]:
            row["engines"] = {
                engine: {f"batch_{size}": _figures(times_s[size], name, reference) for size in BATCH_SIZES}
                for engine, name in row.pop("contenders").items()
            }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{processor_name()}, {num_cores()} cores, {platform.machine()}",
        "versions": _versions({contender.engine for contender in contenders.values()}),
        "threads": threads,
        "rounds": rounds,
        "runs": runs,
    }


def _figures(times_s: dict[str, np.ndarray], name: str, reference: str) -> dict[str, Any]:
    """Milliseconds a call, and the throughput over that of the run's fp32 file in onnxruntime, by rounds."""
    return {
        "ms": spread(times_s[name] * 1000),
        "throughput_ratio": ratio(times_s[reference], times_s[name]),
    }


def _versions(engines: set[str]) -> dict[str, str]:
    packages = {"onnxruntime": "onnxruntime-gpu", "openvino": "openvino", "pytorch": "torch"}
    return {package: version(package) for engine, package in packages.items() if engine in engines}


def _describe(folder: Path, opened: list[Artifact], data: Path) -> dict[str, Any]:
    """A run, and its files with what is not timed of them."""
    metadata = opened[0].metadata
    dataset = open_dataset(data / metadata.data_set)
    if dataset.digest != metadata.data_digest:
        raise DataError(
            f"{folder}: trained on the data {metadata.data_digest[:16]}, {data / metadata.data_set} is "
            f"{dataset.digest[:16]}"
        )
    rows = []
    for artifact in opened:
        logits_NK = onnx_logits(artifact, dataset.test_images_NHWC, _ERROR_BATCH)
        row = {
            "file": str(artifact.path.relative_to(folder)),
            "variant": artifact.metadata.variant,
            "num_blocks": sum(scale != 0 for scale in artifact.metadata.scales),
            "bytes": artifact.path.stat().st_size,
            "test_error": error_fraction(logits_NK, dataset.test_labels_N),
        }
        rows.append(row)
    facts = {"data_set": metadata.data_set, "depth": metadata.depth, "p_L": metadata.p_L}
    return {
        "folder": str(folder),
        **facts,
        "num_blocks": len(metadata.scales),
        "num_test": len(dataset.test_labels_N),
        "rows": rows,
    }


def _add_contenders(
    contenders: dict[str, Contender], artifact: Artifact, folder: Path, threads: int
) -> dict[str, str]:
    """Add a file's contenders under a name each; the names by engine. Files of the same weights share one."""
    found = [onnx_contender(artifact)]
    if (in_openvino := openvino_contender(artifact, threads)) is not None:
        found.append(in_openvino)
    candidates = [one.weights for one in files_of_run(folder) if one.kind == FLOAT32]
    weights = matching_weights(artifact.metadata, candidates)
    names = {contender.engine: f"{contender.engine} {contender.file}" for contender in found}
    contenders.update(zip(names.values(), found, strict=True))
    if weights is not None:
        names["pytorch"] = f"pytorch {weights}"
        if names["pytorch"] not in contenders:
            contenders[names["pytorch"]] = eager_contender(weights)
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODELS/RUN...")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON file to write."
)
@click.option("--rounds", type=click.IntRange(min=1), default=40, help="Timed calls of each.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each. Default: all cores it may use.")
@click.option("--data", type=click.Path(path_type=Path), default="data", help="The folder of the data sets.")
def main(folders: tuple[Path, ...], out: Path, rounds: int, threads: int | None, data: Path) -> None:
    """Measure the runs' files, print the table, and write OUT."""
    with errors_on_one_line():
        out.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the measuring
        unique = list(dict.fromkeys(folders))
        results = measure(unique, threads=threads or num_threads(), rounds=rounds, data=data)
        write_json(out, results)
        click.echo(markdown(results))


if __name__ == "__main__":
    main()
