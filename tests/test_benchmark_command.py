"""`sdpipe benchmark`, and the contenders in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, export_to, make_weights, random_images
from safetensors import safe_open
from safetensors.torch import save_file

from sdpipe.cli import main
from sdpipe.deploy.timing.eager import eager_contender
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.runtime.benchmark import Contender, Start, onnx_contender, start_process
from sdpipe.runtime.cores import num_cores
from sdpipe.training.weights import Weights, save_weights

CORES = len(os.sched_getaffinity(0))
FINGERPRINT = "0123456789abcdef"  # of make_weights


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes run this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_file_that_cannot_be_written_is_said_before_the_measuring(deployed: Path) -> None:
    result = call("benchmark", "--json", "/proc/x.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("directory: '/proc/x.json'\n")


def test_nothing_deployed_is_one_line(project: Path) -> None:
    result = call("benchmark")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: models/model.onnx: no such model file")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
