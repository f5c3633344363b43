"""The whole pipeline as a new user runs it, from scratch; and what is deployed, once more from scratch."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, export_to
from ruamel.yaml import YAML
from test_evaluate import FAULTS, TOLERANCE, fold_with
from torch.nn import Module

from sdpipe.data.store import open_dataset
from sdpipe.deploy.proof.parity import Reference, compare_logits, onnx_logits, parity_faults
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.compute import choose_compute
from sdpipe.training.weights import load_weights

pytestmark = pytest.mark.slow
RUNS = ("stochastic", "constant")


@dataclass(frozen=True, kw_only=True)
class Project:
    """A copy of this project in which `dvc repro` was run."""

    folder: Path
    seconds: float


def locked(folder: Path) -> dict[str, str]:
    """Output path -> digest, from dvc.lock."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def environment() -> dict[str, str]:
    hidden = ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def call(folder: Path, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, env=environment(), check=check, capture_output=True, text=True)


def copy_project(folder: Path) -> Path:
    """What git would clone, uncommitted changes included, as a repository of its own."""
    names = call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout.split(
        "\0"
    )
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    call(folder, "git", "init", "-q")
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "copy")
    return folder


def reproduce(folder: Path, *targets: str) -> Project:
    started = time.perf_counter()
    done = call(copy_project(folder), "dvc", "repro", *targets, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Project(folder=folder, seconds=time.perf_counter() - started)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return reproduce(tmp_path_factory.mktemp("first"))


def read(project: Project, run: str, name: str) -> dict[str, float]:
    return json.loads((project.folder / "models" / run / name).read_text())


def test_from_a_fresh_clone_to_a_deployed_file(first: Project) -> None:
    """Both trainings, 20 layers, at most 2 % error on the digits; 20 files proved, in under 4.5 minutes.

    A processor without bf16 trains in fp32, and has 15 minutes; so has one thread, beside other tests.
    """
    is_slow = choose_compute("auto", "auto").precision == "fp32" or os.environ.get("OMP_NUM_THREADS") == "1"
    assert first.seconds < (900 if is_slow else 270)
    for run in RUNS:
        metrics = read(first, run, "metrics.json")
        assert (
            metrics["test_error"]
            == metrics["test_error_pytorch"]
            == read(first, run, "train.json")["test_error"]
        )
        assert metrics["test_error"] <= 0.02
        assert metrics["parity"] is True
        assert open_artifact(first.folder / "models" / run / "model.onnx", "cpu").metadata.depth == 20
    deployed = (first.folder / "models" / "model.onnx").read_bytes()
    assert deployed == (first.folder / "models" / "stochastic" / "model.onnx").read_bytes()


def test_a_second_repro_runs_nothing(first: Project) -> None:
    started = time.perf_counter()
    done = call(first.folder, "dvc", "repro")
    assert time.perf_counter() - started < 10
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout


def test_dvc_reads_every_file_of_metrics(first: Project) -> None:
    """An entry named error would be a failure to it."""
    done = call(first.folder, "dvc", "metrics", "show")
    assert done.stderr == ""
    assert all(f"models/{run}/{name}.json" in done.stdout for run in RUNS for name in ("train", "quantize"))


def test_git_sees_no_output(first: Project) -> None:
    """Only the lock may differ from what was committed."""
    changed = call(first.folder, "git", "status", "--porcelain", "-uall").stdout.splitlines()
    assert {line[3:] for line in changed} <= {"dvc.lock"}


def test_a_second_time_from_scratch_gives_the_same_bytes(
    first: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In another folder, with another cache: data, weights, history, ONNX and figures; all but the times.

    The card shows times, and the sums are of the card, too. The committed dvc.lock is of another run already;
    where that was on another kind of processor, what is deployed is made here again.
    """
    timed = re.compile(r"timing\.|latency\.|variants\.csv|README|SHA256SUMS")
    ours = locked(first.folder)
    assert len([path for path in ours if timed.search(path)]) == 11
    deployed = {"models/stochastic/weights.safetensors", "models/stochastic/model.onnx"}
    assert deployed <= ours.keys()

    def differing(theirs: dict[str, str]) -> list[str]:
        return [path for path in theirs if theirs[path] != ours[path] and not timed.search(path)]

    committed = locked(ROOT)
    assert committed.keys() == ours.keys()
    if differing(committed):
        second = reproduce(tmp_path_factory.mktemp("second"), "deploy")
        assert not (second.folder / "models" / "constant").exists()
        theirs = locked(second.folder)
        made = {path: digest for path, digest in theirs.items() if (second.folder / path).exists()}
        assert deployed <= made.keys()
        assert differing(made) == []


def test_one_changed_run_retrains_that_run_only(first: Project) -> None:
    params = first.folder / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("constant: {p_L: 1.0}", "constant: {p_L: 0.9}"))
    planned = call(first.folder, "dvc", "repro", "--dry").stdout
    assert re.findall(r"Running stage '(train@\w+)'", planned) == ["train@constant"]
    params.write_text(text.replace("max_test_error: 0.02", "max_test_error: 0.05"))
    planned = call(first.folder, "dvc", "repro", "--dry").stdout
    assert re.findall(r"Running stage '([\w@]+)'", planned) == ["check", "deploy"]
    params.write_text(text)


def test_a_wrong_key_is_said_before_anything_runs(first: Project) -> None:
    params = first.folder / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("latency_repeats:", "latency_repeat:").replace("seed: 0", "seed: 1"))
    done = call(first.folder, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert re.findall(r"Running stage '([\w@]+)'", done.stdout) == ["check"]
    assert "evaluate.latency_repeat: key not permitted" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    params.write_text(text)
    call(first.folder, "dvc", "repro")


def assert_not_deployed(project: Project, params_text: str, says: str) -> None:
    """With these params `dvc repro` fails and says why on one line; then all is as before."""
    params, model = project.folder / "params.yaml", project.folder / "models" / "model.onnx"
    before, deployed = params.read_text(), model.read_bytes()
    assert params_text != before
    params.write_text(params_text)
    done = call(project.folder, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr
    assert model.read_bytes() == deployed
    params.write_text(before)
    call(project.folder, "dvc", "repro")


def test_a_run_that_fails_its_gate_leaves_the_deployed_file(first: Project) -> None:
    """DVC removes outputs before a stage runs, unless they persist."""
    text = (first.folder / "params.yaml").read_text()
    text = text.replace("max_test_error: 0.02", "max_test_error: 1.0e-9")
    assert_not_deployed(first, text, "is not deployed")


def test_a_training_that_diverges_is_never_deployed(first: Project) -> None:
    text = (first.folder / "params.yaml").read_text()
    text = text.replace("  learning_rate: 0.1\n", "  learning_rate: 1.0e+30\n")
    says = r"error: epoch 1, step \d+ of 20: loss .* at learning rate 1e\+30, on training images \["
    assert_not_deployed(first, text, says)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught_on_trained_weights(
    first: Project,
    tmp_path: Path,
    fault: str,
    run: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On what was really trained, at the committed tolerance. Constant depth has no p_l to fold wrongly."""
    weights = load_weights(first.folder / "models" / run / "weights.safetensors")
    images = open_dataset(first.folder / "data" / "digits").test_images_NHWC
    reference = Reference(weights).logits(images)
    plant: Callable[[Module], None] = FAULTS[fault]
    fold_with(weights, plant, monkeypatch)
    faulty = onnx_logits(
        open_artifact(export_to(tmp_path / "model.onnx", weights), "cpu"), np.array(images), 256
    )
    parity = compare_logits(reference, faulty, batch_size=256, threads=1, max_relative_logit_diff=TOLERANCE)
    faults = parity_faults([parity], TOLERANCE)
    if run == "constant" and fault.startswith("p_l"):
        assert not faults
    else:
        assert faults
        print(f"{fault}: {parity.relative_logit_diff:.2g} of the spread")
