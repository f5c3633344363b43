"""`python -m benchmarks.deployment`: the files of runs, and their table."""

import ctypes
import json
import mmap
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import export_to, make_dataset, make_weights

from benchmarks.deployment import deployed_files
from benchmarks.deployment import main as measure
from benchmarks.deployment_table import main as print_table
from benchmarks.deployment_table import markdown
from sdpipe.data.store import DataSet
from sdpipe.files import read_json
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.signal_stack import kept_signal_stack
from sdpipe.training.weights import Weights, save_weights

ROOT = Path(__file__).parents[1]


def make_run(folder: Path, dataset: DataSet, p_L: float) -> Path:
    """A run's folder with the whole network and one without its blocks 4 and 7."""
    for name, removed in (("", ()), ("pruned/keep-7", (4, 7))):
        weights = make_weights(p_L=p_L, removed=removed)
        weights = replace(weights, info=replace(weights.info, dataset_digest=dataset.digest))
        path = folder / name if name else folder / "weights"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path.with_suffix(".safetensors"), weights)
        export_to(path.with_suffix(".onnx") if name else folder / "model.onnx", weights)
    return folder


def test_the_files_of_a_run(tmp_path: Path) -> None:
    """The whole network first, then int8, then the pruned ones, the largest first; nothing else."""
    sizes = {
        "model.onnx": 9, "model.int8.onnx": 3, "model.fp16.onnx": 5, "ensemble.onnx": 9,
        "pruned/keep-2.onnx": 4, "pruned/keep-7.onnx": 6, "pruned/keep-7.safetensors": 6,
        "pruned-int8/keep-7.int8.onnx": 2,
    }  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert [str(path.relative_to(tmp_path)) for path in deployed_files(tmp_path)] == [
        "model.onnx", "model.int8.onnx", "pruned/keep-7.onnx", "pruned/keep-2.onnx",
        "pruned-int8/keep-7.int8.onnx",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_the_command_measures_runs_side_by_side(project: Path) -> None:
    """Errors are onnxruntime's on the test part, PyTorch runs a file's own weights, the table has all."""
    dataset = make_dataset(project / "data" / "animals")
    make_run(Path("models/stochastic"), dataset, 0.5)
    make_run(Path("models/constant"), dataset, 1.0)
    shutil.copy("models/stochastic/model.onnx", "models/stochastic/model.int8.onnx")
    options = [
        "models/stochastic",
        "models/constant",
        "--out",
        "new/d.json",
        "--rounds",
        "3",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(measure, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads(Path("new/d.json").read_text())
    stochastic, constant = results["runs"]
    files = ["model.onnx", "model.int8.onnx", "pruned/keep-7.onnx"]
    assert [row["file"] for row in stochastic["rows"]] == files
    assert [row["num_blocks"] for row in constant["rows"]] == [9, 7]
    for run in results["runs"]:
        for row in run["rows"]:
            path = Path(run["folder"]) / row["file"]
            logits_NK, _ = open_artifact(path, "cpu").run(np.asarray(dataset.test_images_NHWC))
            wrong_N = logits_NK.argmax(axis=1) != dataset.test_labels_N
            assert row["test_error"] == wrong_N.mean()
            assert row["bytes"] == path.stat().st_size
            assert {"onnxruntime", "pytorch"} <= set(row["engines"])
            for figures in (found for engine in row["engines"].values() for found in engine.values()):
                assert (figures["ms"]["n"], figures["throughput_ratio"]["n"]) == (3, 3)
                assert figures["ms"]["quartile_1"] > 0
        itself = run["rows"][0]["engines"]["onnxruntime"]["batch_64"]["throughput_ratio"]
        assert (itself["quartile_1"], itself["of_sums"]) == (1, 1)
    # The same weights in the int8 row are the same contender.
    assert (
        stochastic["rows"][0]["engines"]["pytorch"]["batch_1"]["ms"]
        == (stochastic["rows"][1]["engines"]["pytorch"]["batch_1"]["ms"])
    )
    table = markdown(results)
    assert done.stdout == table + "\n"
    for word in (
        results["hardware"],
        results["date"],
        "n = 3",
        "| constant | fp32 | 7 of 9 |",
        "30 test images",
    ):
        assert word in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    again = CliRunner().invoke(print_table, ["new/d.json"], catch_exceptions=False)
    assert again.stdout == table + "\n"


def test_other_data_are_refused(project: Path, weights: Weights) -> None:
    """A test error on other images would say nothing of the run."""
    make_dataset(project / "data" / "animals")
    folder = Path("models/other")
    folder.mkdir(parents=True)
    export_to(folder / "model.onnx", weights)
    for path, expected in (
        ("models/other", "trained on the data dddd"),
        ("models/gone", "no such model file"),
    ):
        done = CliRunner().invoke(measure, [path, "--out", "d.json"])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_foreign_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    done = CliRunner().invoke(print_table, [str(tmp_path / "other.json")])
    assert done.exit_code == 1
    assert "expected a file of benchmarks.deployment" in done.stderr


def test_the_signal_stack_is_put_back() -> None:
    """OpenVINO leaves a freed one set; a signal behind it would be a segmentation fault."""
    before = signal_stack()
    other = mmap.mmap(-1, 2**16)
    stack = (ctypes.c_size_t * 3)(ctypes.addressof(ctypes.c_char.from_buffer(other)), 0, len(other))
    with kept_signal_stack():
        assert ctypes.CDLL(None).sigaltstack(stack, None) == 0
        assert signal_stack() == (stack[0], 2**16)
    assert signal_stack() == before


def signal_stack() -> tuple[int, int]:
    """Address and size of this thread's."""
    found = (ctypes.c_size_t * 3)()  # stack_t: address, flags, size
    assert ctypes.CDLL(None).sigaltstack(None, found) == 0
    return found[0], found[2]


def test_the_documents_have_the_table_of_the_committed_measurement() -> None:
    """Nothing in it was typed by hand, and what they say of it is so; the README has one run's rows."""
    results = read_json(ROOT / "benchmarks" / "deployment.json")
    assert markdown(results) in (ROOT / "docs" / "deployed.md").read_text()
    assert markdown({**results, "runs": results["runs"][:1]}) in (ROOT / "README.md").read_text()
    for run in results["runs"]:
        rows = {row["variant"]: row for row in run["rows"]}
        gains = {
            name: row["engines"]["onnxruntime"]["batch_64"]["throughput_ratio"]["median"]
            for name, row in rows.items()
        }
        assert gains["int8"] >= 2.265
        assert gains["keep-17"] >= 1.55
        assert gains["keep-17.int8"] >= 3.4
        more = {name: row["test_error"] - rows["fp32"]["test_error"] for name, row in rows.items()}
        assert more["int8"] <= 0.0011
        if "stochastic" in run["folder"]:
            assert more["keep-17"] <= 0.0075
        else:
            assert more["keep-17"] >= 0.13
