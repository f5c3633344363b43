"""`sdpipe benchmark`, what it measures with, and the variants in `sdpipe inspect`."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, export_to, make_weights, random_images
from safetensors import safe_open
from safetensors.torch import save_file

from sdpipe.cli import main
from sdpipe.deploy.timing.contenders import matching_weights
from sdpipe.deploy.timing.eager import eager_contender
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.runtime.benchmark import (
    WARMUP,
    Contender,
    Start,
    onnx_contender,
    start_process,
    summary,
    time_contenders,
)
from sdpipe.runtime.cores import num_cores
from sdpipe.runtime.turns import play_rounds
from sdpipe.runtime.variants import COLUMNS
from sdpipe.training.weights import Weights, save_weights

CORES = len(os.sched_getaffinity(0))
FINGERPRINT = "0123456789abcdef"  # of make_weights


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes run this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_percentiles_and_throughput_by_hand() -> None:
    """0 to 100 ms: the p-th percentile is p ms; 101 calls of 2 images took 5.05 s together."""
    found = summary(np.arange(101) / 1000, 2)
    assert found == pytest.approx(
        {"n": 101, "p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "images_per_s": 202 / 5.05}
    )


def control_groups(folder: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self/cgroup of one line, and a mount with these files."""
    (folder / "cgroup").write_text(line)
    for name, text in files.items():
        (folder / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mount" / name).write_text(text)
    return folder / "cgroup", folder / "mount"


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/\n", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "275000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "900000 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/only/on/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        ("5:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ("5:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 3),
        ("5:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "1000\n", "cpu/a/cpu.cfs_period_us": "1000\n"}, 1),
        ("5:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1000\n", "cpu/cpu.cfs_period_us": "1000\n"}, 4),
    ],
)
def test_cores_by_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], expected: int
) -> None:
    """The smaller of 4 cores and the quota over the period, of any group above the process, rounded down."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2, 3})
    assert num_cores(*control_groups(tmp_path, line, files)) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert num_cores(tmp_path / "none", tmp_path) == CORES


def contender(name: str, log: list[str], fail_at: int = -1) -> Contender:
    def run(images_NHWC: np.ndarray) -> None:
        assert (images_NHWC.shape, images_NHWC.dtype) == ((2, 5, 5, 1), np.uint8)
        log.append(name)
        if len(log) == fail_at:
            raise KeyboardInterrupt

    return Contender(file=name, engine="onnxruntime", image_shape=(5, 5, 1), run=run)


def test_contenders_take_turns() -> None:
    """Round after round, each beginning with another one; the warm-up does not count."""
    log: list[str] = []
    timings: list[dict[str, Any]] = []
    contenders = [contender(name, log) for name in "abc"]
    time_contenders(contenders, batch_size=2, threads=1, numbers=range(WARMUP + 3), timings=timings)
    assert "".join(log) == "abcbcacabcbaacbbac"
    assert [(row["file"], row["n"], row["batch_size"]) for row in timings] == [
        ("a", 3, 2), ("b", 3, 2), ("c", 3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("fail_at", "counted"), [(2 * WARMUP + 4, 1), (2 * WARMUP - 1, None)])
def test_an_interruption_leaves_the_whole_rounds(fail_at: int, counted: int | None) -> None:
    """Ctrl-C in the second counted round leaves one of each; in the warm-up it leaves nothing."""
    log: list[str] = []
    timings: list[dict[str, Any]] = []
    contenders = [contender(name, log, fail_at) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        time_contenders(contenders, batch_size=2, threads=1, numbers=range(20), timings=timings)
    assert [row["n"] for row in timings] == ([] if counted is None else [counted] * 2)


def test_rounds_keep_the_contenders_in_place() -> None:
    """Whoever was first in a round, its seconds stand under its own name."""
    turns = {"a": lambda: 1.0, "b": lambda: 2.0}
    assert list(play_rounds(turns, range(3))) == [{"a": 1.0, "b": 2.0}] * 3


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights and ONNX file of a network without its blocks 4 and 7."""
    folder, weights = tmp_path_factory.mktemp("pruned"), make_weights(removed=(4, 7))
    save_weights(folder / "keep-7.safetensors", weights)
    return folder / "keep-7.safetensors", export_to(folder / "keep-7.onnx", weights)


@pytest.fixture
def deployed(project: Path, model_path: Path, pruned: tuple[Path, Path]) -> Path:
    """models/ as deploy leaves it, with a variant and the ensemble's file."""
    (project / "models" / "variants").mkdir(parents=True)
    shutil.copy(model_path, "models/model.onnx")
    shutil.copy(pruned[1], "models/variants/keep-7.onnx")
    Path("models/variants/ensemble.onnx").write_bytes(b"another input")
    return project


def add_run(name: str, weights: Weights) -> Path:
    folder = Path("models") / name
    folder.mkdir(parents=True)
    save_weights(folder / "weights.safetensors", weights)
    return folder / "weights.safetensors"


def test_the_command_measures_all_that_is_deployed(deployed: Path, weights: Weights) -> None:
    """Table and JSON have every file, PyTorch on matching weights only, and finite positive figures."""
    add_run("other", replace(weights, info=replace(weights.info, fingerprint="f" * 16)))
    eager = add_run("stochastic", weights)
    Path("models/damaged").mkdir()
    Path("models/damaged/weights.safetensors").write_bytes(b"x")
    result = call(
        "benchmark", "--threads", 1, "--batch-sizes", "3,1,3", "--repeats", 4, "--json", "new/b.json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(Path("new/b.json").read_text())
    assert set(found) == {
        "date", "hardware", "device", "versions", "repeats", "models", "timings", "failures", "complete",
    }  # fmt: skip
    assert found["complete"] is True
    assert {"onnxruntime", "torch", "numpy", "sdpipe"} <= set(found["versions"])
    files = ["models/model.onnx", "models/variants/keep-7.onnx"]
    assert [row["file"] for row in found["models"]] == [None, *files]
    assert [row["bytes"] for row in found["models"]] == [None, *(Path(file).stat().st_size for file in files)]
    timed = [(row["file"], row["engine"]) for row in found["timings"] if row["batch_size"] == 3]
    assert [row for row in timed if row[1] == "pytorch"] == [(str(eager), "pytorch")]
    assert [row for row in timed if row[1] == "onnxruntime"] == [(file, "onnxruntime") for file in files]
    for row in found["timings"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] < float("inf")
        assert (row["threads"], row["n"]) == (1, 4)
        assert row["images_per_s"] > 0
    assert [row["batch_size"] for row in found["timings"]] == [1] * len(timed) + [3] * len(timed)
    lines = result.stdout.splitlines()
    assert found["hardware"] in lines[0]
    assert sum("onnxruntime" in line for line in lines[1:]) == 4
    assert len({len(line) for line in lines[-2 * len(timed) :]}) == 1  # aligned


def test_without_weights_there_is_no_pytorch(deployed: Path) -> None:
    code = (
        "import sys\n"
        "from sdpipe.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    options = ["benchmark", "models/model.onnx", "--threads", "1", "--batch-sizes", "1", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--markdown"], capture_output=True, text=True, check=True
    )
    assert "pytorch" not in done.stdout
    assert "| models/model.onnx | onnxruntime | 1 | 1 |" in done.stdout
    assert not {"torch", "mlflow", "onnx", "pydantic"} & set(done.stderr.split())


def test_weights_match_by_run_and_scales(
    tmp_path: Path, weights: Weights, model_path: Path, pruned: tuple[Path, Path]
) -> None:
    """A pruned file's weights are those without the same blocks, whatever else the run has."""
    save_weights(tmp_path / "whole.safetensors", weights)
    candidates = [tmp_path / "gone.safetensors", pruned[0], tmp_path / "whole.safetensors"]
    whole = open_artifact(model_path, "cpu").metadata
    assert matching_weights(whole, candidates) == candidates[2]
    assert matching_weights(open_artifact(pruned[1], "cpu").metadata, candidates) == pruned[0]
    assert matching_weights(replace(whole, fingerprint="e" * 16), candidates) is None


def test_eager_computes_the_file_without_the_removed_branches(pruned: tuple[Path, Path]) -> None:
    """Its logits are the ONNX file's, and the branches of removed blocks are never called."""
    images_NHWC = random_images(6)
    calls: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _ins, _out: calls.append(type(module).__name__)
    )
    try:
        logits_NK = eager_contender(pruned[0]).run(images_NHWC)
    finally:
        hook.remove()
    expected_NK, _ = open_artifact(pruned[1], "cpu").run(images_NHWC)
    np.testing.assert_allclose(logits_NK, expected_NK, rtol=1e-4, atol=1e-4)
    assert calls.count("Conv2d") == 1 + 2 * (9 - 2)


def test_ctrl_c_prints_what_is_measured_so_far(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 130, and tables and JSON of the rounds that were over, which say that they are not complete."""
    real, calls = time.perf_counter, 0

    def perf_counter() -> float:
        nonlocal calls
        calls += 1
        if calls == 60:  # 16 for the start-ups, and 2 for each call: in a round that counts
            signal.raise_signal(signal.SIGINT)
        return real()

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    options = ["--threads", 1, "--batch-sizes", "1,64", "--json", "b.json"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        result = call("benchmark", "models/model.onnx", *options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["interrupted"]
    found = json.loads(Path("b.json").read_text())
    assert found["complete"] is False
    assert {row["batch_size"] for row in found["timings"]} == {1}
    assert all(0 < row["n"] < 50 for row in found["timings"])
    assert result.stdout.splitlines()[1] == "interrupted: what was measured until then"
    assert "onnxruntime" in result.stdout.splitlines()[-1 - (len(found["timings"]) - 1)]


def test_a_fresh_process_has_its_own_peak(model_path: Path) -> None:
    """Its memory is not this process's, which has PyTorch in it; opening a file takes more than importing."""
    alone, opened = (start_process(path, batch_size=64, device="cpu") for path in (None, model_path))
    assert 10e6 < alone.peak_bytes < opened.peak_bytes < 250e6
    assert 0 < alone.seconds < 60


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-sizes", "0"], "expected numbers from 1 to 4096"),
        (["--batch-sizes", "1,,2"], "expected numbers from 1 to 4096"),
        (["--batch-sizes", "5000"], "got '5000'"),
        (["--threads", "two"], f"expected numbers from 1 to {num_cores()}"),
        (["--threads", str(num_cores() + 1)], "the cores that this process may use"),
        (["--repeats", "0"], "1<=x<=1000000"),
    ],
)
def test_wrong_options_are_called_wrong(options: list[str], words: str) -> None:
    result = call("benchmark", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_bad_files_fail_alone(deployed: Path, model_path: Path) -> None:
    """One line each, with exit 1, and the good one is still measured."""
    ensemble = onnx.load(model_path)
    for entry in ensemble.metadata_props:
        if entry.key == "sdpipe.variant":
            entry.value = '"ensemble"'
    onnx.save(ensemble, "e.onnx")
    result = call(
        "benchmark", "gone.onnx", "e.onnx", "models/variants/ensemble.onnx", "models/model.onnx",
        "--threads", 1, "--batch-sizes", 1, "--repeats", 1,
    )  # fmt: skip
    assert result.exit_code == 1
    errors = result.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == [
        "gone.onnx", "e.onnx", "models/variants/ensemble.onnx",
    ]  # fmt: skip
    assert all(line.startswith("error: ") for line in errors)
    assert "models/model.onnx  onnxruntime" in result.stdout


@pytest.mark.parametrize("batch_sizes", ["2", "1,2"])
def test_a_file_that_opens_and_does_not_run_fails_alone(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, batch_sizes: str
) -> None:
    """In the fresh processes already; what stands before and behind it is measured, shown and written."""
    shutil.copy("models/model.onnx", "odd.onnx")

    def start(path: Path | None, *, batch_size: int, device: str) -> Start:
        if path == Path("odd.onnx") and batch_size == 2:
            raise ModelError("odd.onnx: a process that opens it fails: no memory")
        return start_process(path, batch_size=batch_size, device=device)

    monkeypatch.setattr("sdpipe.runtime.benchmark.start_process", start)
    files = ["models/model.onnx", "odd.onnx", "models/variants/keep-7.onnx"]
    options = ["--threads", 1, "--batch-sizes", batch_sizes, "--repeats", 1, "--json", "b.json"]
    result = call("benchmark", *files, *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line == "error: odd.onnx: a process that opens it fails: no memory"
    found = json.loads(Path("b.json").read_text())
    assert [f"error: {failure}" for failure in found["failures"]] == [line]
    assert [row["file"] for row in found["models"]] == [None, files[0], files[2]]
    assert {row["file"] for row in found["timings"]} == {files[0], files[2]}
    assert "models/variants/keep-7.onnx  onnxruntime" in result.stdout


@pytest.mark.parametrize("num_engines", [1, 2])
def test_an_engine_that_does_not_run_fails_alone(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, num_engines: int
) -> None:
    """In this process: named, and the others, if any, are timed without it; at that batch size only."""

    def fail(images_NHWC: np.ndarray) -> None:
        if len(images_NHWC) == 2:
            raise ModelError("models/model.onnx: no memory")

    def engines(artifact: Artifact, _threads: int) -> Contender | None:
        return onnx_contender(artifact) if num_engines == 2 else None

    broken = Contender(file="models/model.onnx", engine="broken", image_shape=(9, 9, 1), run=fail)
    monkeypatch.setattr("sdpipe.runtime.benchmark.onnx_contender", lambda _artifact: broken)
    monkeypatch.setattr("sdpipe.deploy.timing.contenders.openvino_contender", engines)
    options = ["--threads", 1, "--batch-sizes", "1,2,3", "--repeats", 1, "--json", "b.json"]
    result = call("benchmark", "models/model.onnx", *options)
    assert result.exit_code == 1
    assert result.stderr == "error: models/model.onnx: no memory\n"
    timed = [(row["engine"], row["batch_size"]) for row in json.loads(Path("b.json").read_text())["timings"]]
    others = [("onnxruntime", 1), ("onnxruntime", 2), ("onnxruntime", 3)] if num_engines == 2 else []
    assert sorted(timed) == [("broken", 1), ("broken", 3), *others]


def test_what_is_measured_outlives_damaged_weights(deployed: Path, weights: Weights) -> None:
    """Weights that say of which file they are, and lack tensors: one line, and the start-ups are shown."""
    path = add_run("stochastic", weights)
    with safe_open(path, "pt") as whole:
        name = next(iter(whole.keys()))
        save_file({name: whole.get_tensor(name)}, path, whole.metadata())
    options = ["--threads", 1, "--batch-sizes", 1, "--repeats", 1, "--json", "b.json"]
    result = call("benchmark", "models/model.onnx", *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {path}")
    found = json.loads(Path("b.json").read_text())
    assert [row["file"] for row in found["models"]] == [None, "models/model.onnx"]
    assert found["complete"] is False
    assert "models/model.onnx" in result.stdout


def test_nothing_deployed_is_one_line(project: Path) -> None:
    result = call("benchmark")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: models/model.onnx: no such model file")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def write_variants(path: Path, **changes: str) -> None:
    """Three variants; the changes are to the last one's cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = ["keep-7", "pruned/keep-7.onnx", FINGERPRINT, "0.1", "9000", "", "", "12", "true"]
    rows = [
        ["fp32", "model.onnx", FINGERPRINT, "0.0525", "12345", "1.25", "40.04", "0", "True"],
        ["int8", "model.int8.onnx", FINGERPRINT, "0.06", "4000", "0.5", "20", "3", "True"],
        [changes.get(name, cell) for name, cell in zip(COLUMNS, last, strict=True)],
    ]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


def test_inspect_shows_the_variants_side_by_side(deployed: Path) -> None:
    """Beside the file, in variants/ and from there, with a star at the file in question."""
    write_variants(Path("models/variants/variants.csv"))
    text = call("inspect", "models/model.onnx").stdout
    table = text.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["variant", "fp32", "int8", "keep-7"]
    assert table[1].split() == ["fp32", "*", "5.25%", "12", "1.25", "40.0", "0", "True"]
    assert "*" not in table[2] + table[3]
    facts = json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert facts["variants"][2] == {
        "variant": "keep-7", "path": "pruned/keep-7.onnx", "fingerprint": FINGERPRINT, "test_error": 0.1,
        "bytes": 9000, "batch_1_ms": None, "batch_64_ms": None, "disagreements_with_fp32": 12, "parity": True,
    }  # fmt: skip
    Path("models/variants/variants.csv").rename("models/variants.csv")
    assert "int8" in call("inspect", "models/variants/keep-7.onnx").stdout


def test_a_table_of_another_training_is_not_shown(deployed: Path) -> None:
    """As models/variants.csv stands above models/<run>/, which has none until it was evaluated."""
    write_variants(Path("models/variants.csv"))
    run = Path("models/constant/model.onnx")
    run.parent.mkdir()
    model = onnx.load("models/model.onnx")
    for entry in model.metadata_props:
        entry.value = json.dumps("another") if entry.key == "sdpipe.fingerprint" else entry.value
    onnx.save(model, run)
    assert "variants" in json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert "variants" not in json.loads(call("inspect", str(run), "--json").stdout)


def test_without_variants_inspect_is_as_before(deployed: Path) -> None:
    facts = json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert "variants" not in facts


@pytest.mark.parametrize("cell", ["many", "nan", "-inf"])
def test_a_damaged_table_of_variants_is_one_line(deployed: Path, cell: str) -> None:
    write_variants(Path("models/variants.csv"), bytes=cell)
    result = call("inspect", "models/model.onnx")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "variants.csv: expected rows of variant, path" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_table_of_variants_without_end_is_not_read_whole(deployed: Path) -> None:
    """It may come with a model from anywhere; 2**30 zeros stand on no disk, but would in memory."""
    table = Path("models/variants.csv")
    with table.open("wb") as stream:
        stream.truncate(2**30)
    started = time.monotonic()
    result = call("inspect", "models/model.onnx")
    assert time.monotonic() - started < 2
    assert result.exit_code == 1
    assert result.stderr == f"error: {table.resolve()}: over 1,048,576 characters, no table of variants\n"
