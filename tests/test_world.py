"""Two processes over gloo train what one trains, send less for inactive blocks, and die together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, make_dataset, train_alone
from picture_files import make_pictures
from world_variants import VARIANTS, config_of, dataset_of

from sdpipe.training.evaluation import error_and_loss
from sdpipe.training.images import ArrayImages
from sdpipe.training.trainer import Trainer
from sdpipe.training.weights import load_tensors
from sdpipe.training.world import World

pytestmark = pytest.mark.slow
Trained = tuple[str, Path, list[dict[str, Any]]]
"""A variant, the folder of its files, and what each process wrote."""


def start(
    task: str, folder: Path, *, processes: int = 2, restarts: int = 0, **environment: str
) -> "subprocess.Popen[str]":
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts)),
        *("--nproc-per-node", str(processes), str(ROOT / "tests" / "world_worker.py"), task, str(folder)),
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def results(task: str, folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    process = start(task, folder, processes=processes)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=pytest.mark.long) if each == "recompute" else each for each in VARIANTS],
)
def equal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("equal")
    return request.param, folder, results(f"equal-{request.param}", folder)


def test_both_ranks_have_the_same_weights_at_every_step(equal: Trained) -> None:
    """Parameters, momentum and BatchNorm's statistics, to the bit, and the same history."""
    variant, _, (first, second) = equal
    num_steps = 2 * (72 // 16 if variant == "pictures" else 96 // 16)
    assert len(first["digests"]) == num_steps
    assert len(set(first["digests"])) == num_steps
    assert first == second


def test_each_process_computes_active_branches_alone(equal: Trained) -> None:
    """Once in a step for each part of the mini-batch; twice where they are recomputed to save memory."""
    variant, _, (measured, _) = equal
    assert measured["forwards"] == (2 if variant == "recompute" else 1)


def test_two_processes_follow_the_curve_of_one(equal: Trained, tmp_path: Path) -> None:
    """One process with the same batch in two parts; only the order of additions differs."""
    variant, folder, ranks = equal
    alone = train_alone(config_of(variant), dataset_of(variant, tmp_path / "data"), tmp_path / "alone")
    history = ranks[0]["history"]
    for record, theirs in zip(alone.progress.history, history, strict=True):
        assert theirs["train_loss"] == pytest.approx(record.train_loss, rel=1e-4)
        assert theirs["validation_loss"] == pytest.approx(record.validation_loss, rel=1e-3)
        assert theirs["blocks_active"] == record.blocks_active
        assert theirs["mean_abs_grad"] == pytest.approx(record.mean_abs_grad, rel=1e-3)
    weights, _ = load_tensors(folder / "weights.safetensors")
    assert weights.keys() == alone.state.keys()
    for name, tensor in alone.state.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_blocks_drawn_for_each_image_are_noted_as_trained(tmp_path: Path) -> None:
    """Two processes have a part each, as one has two: the same draws, and the same mean in the history."""
    ranks = results("equal-sample-whole", tmp_path)
    alone = train_alone(config_of("sample"), dataset_of("sample", tmp_path / "data"), tmp_path / "alone")
    expected = [record.blocks_active for record in alone.progress.history]
    assert [record["blocks_active"] for record in ranks[0]["history"]] == expected


def test_each_image_is_counted_once(equal: Trained, tmp_path: Path) -> None:
    """The errors of two processes are those that one finds with the same weights."""
    variant, folder, (measured, _) = equal
    dataset = dataset_of(variant, tmp_path / "data")
    trainer = Trainer(config_of(variant), dataset, CPU, World(0, 1, 0))
    state, _ = load_tensors(folder / "weights.safetensors")
    trainer.network.load_state_dict(state)
    best = min(reversed(measured["history"]), key=lambda record: record["validation_error"])
    alone = error_and_loss(
        trainer.network, trainer.images, trainer.validation_indices, trainer.normalise, World(0, 1, 0)
    )
    assert alone is not None
    assert alone[0] == best["validation_error"]
    assert alone[1] == pytest.approx(best["validation_loss"], rel=1e-5)
    test = ArrayImages(dataset.test_images_NHWC, dataset.test_labels_N, CPU)
    tested = error_and_loss(
        trainer.network, test, np.arange(len(dataset.test_labels_N)), trainer.normalise, World(0, 1, 0)
    )
    assert tested is not None
    assert tested[0] == measured["test_error"]


@pytest.mark.long
def test_any_number_of_processes_can_train(tmp_path: Path) -> None:
    """Three share 16 images as 5, 5 and 6, each in two parts."""
    ranks = results("equal-arrays", tmp_path, processes=3)
    assert ranks[0] == ranks[1] == ranks[2]


def test_bytes_fall_with_the_share_of_inactive_blocks(tmp_path: Path) -> None:
    """27 equal blocks; all that a process sends counts, BatchNorm's statistics and control included."""
    for measured in results("bytes", tmp_path):
        (constant, all_active), (stochastic, active_share) = measured["constant"], measured["stochastic"]
        assert all_active == 1
        saved = 1 - stochastic / constant
        print(f"{saved:.4f} of the bytes saved, {1 - active_share:.4f} of the blocks inactive")
        assert abs(saved - (1 - active_share)) < 0.02
        assert saved > 0.2


def test_all_stop_after_the_same_step_and_one_process_continues(tmp_path: Path) -> None:
    """SIGTERM reaches one rank only. The checkpoint carries over from two processes to one."""
    assert results("stop", tmp_path) == [{"exit": 143}, {"exit": 143}]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-0000000007"
    dataset = make_dataset(tmp_path / "data")
    continued = train_alone(config_of("arrays"), dataset, tmp_path / "checkpoints")
    whole = train_alone(config_of("arrays"), dataset, tmp_path / "whole")
    for record, expected in zip(continued.progress.history, whole.progress.history, strict=True):
        assert record.train_loss == pytest.approx(expected.train_loss, rel=1e-4)


@pytest.mark.long
def test_three_processes_that_were_stopped_end_in_the_same_bytes(tmp_path: Path) -> None:
    """Of two gradients the sum is the same in any order; of three it is not."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    expected = results("continue", whole, processes=3)
    results("stop", stopped, processes=3)
    assert results("continue", stopped, processes=3) == expected
    name = "weights.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def assert_continues(folder: Path, processes: int = 2) -> None:
    process = start("run", folder, processes=processes, EPOCHS="100000")
    with all_ended(process, folder):
        assert process.stdout is not None
        assert any("continuing after step" in line for line in process.stdout)


def test_a_killed_rank_takes_the_others_down_and_a_new_start_continues(
    tmp_path: Path, mlflow_store: Path
) -> None:
    """Within 60 s; then with one process more, and at last with one alone."""
    make_dataset(tmp_path / "data")
    process = start("run", tmp_path, EPOCHS="100000")
    with all_ended(process, tmp_path):
        wait_for_checkpoint(process)
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        out, _ = process.communicate(timeout=60)
        print(f"all down after {time.monotonic() - killed:.1f} s: {out}")
        assert process.returncode != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid0").read_text()), 0)
    assert (
        "another process of this training has ended or does not answer" in out
        or "stopped; `dvc repro`" in out
    )
    assert_continues(tmp_path, processes=3)


def is_running(process: int) -> bool:
    """Not so if it is a zombie, which only its parent can take away."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pid(folder: Path, rank: int) -> int:
    return int((folder / f"pid{rank}").read_text())


@pytest.mark.long
def test_what_a_killed_launcher_started_ends_and_a_new_start_continues(
    tmp_path: Path, mlflow_store: Path
) -> None:
    """It would train on, and hold the run's lock against every new start."""
    make_dataset(tmp_path / "data")
    process = start("run", tmp_path, EPOCHS="100000")
    with all_ended(process, tmp_path):
        wait_for_checkpoint(process)
        process.kill()
        deadline = time.monotonic() + 60
        while any(is_running(pid(tmp_path, rank)) for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert_continues(tmp_path)


@pytest.mark.long
def test_when_one_process_lacks_its_images_the_last_step_is_saved(tmp_path: Path, mlflow_store: Path) -> None:
    """The decoder of rank 1 is killed; rank 0, which saves, would wait for rank 1 within a step."""
    make_pictures(tmp_path)
    process = start("run", tmp_path, EPOCHS="2000", EVERY="0", PICTURES="1")  # a line every 100
    with all_ended(process, tmp_path):
        assert process.stdout is not None
        assert any(line.startswith("epoch") for line in process.stdout)
        parent = pid(tmp_path, 1)
        (decoder, *_) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        assert not list(Path().glob(".sdpipe/runs/*/step-*"))
        os.kill(int(decoder), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a process that decodes pictures has died" in out
    assert "error: another process of this training lacks its next images" in out
    assert list(Path().glob(".sdpipe/runs/*/step-*")), out


def test_a_process_that_does_not_answer_is_one_line(tmp_path: Path, mlflow_store: Path) -> None:
    """After 10 s in a step or 20 s in a validation or a save; for users 25 s and 600 s.

    torchrun then gives it 30 s more to end.
    """
    make_dataset(tmp_path / "data")
    process = start("run", tmp_path, EPOCHS="100000", TIMEOUT_S="10", PATIENCE_S="20")
    with all_ended(process, tmp_path):
        wait_for_checkpoint(process)
        os.kill(pid(tmp_path, 1), signal.SIGSTOP)
        stopped, lines = time.monotonic(), []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("error:"):
                break
        assert time.monotonic() - stopped < 40
        os.kill(pid(tmp_path, 1), signal.SIGCONT)
        process.communicate(timeout=60)
    assert "process 0 of 2: another process of this training has ended or does not answer" in lines[-1]
    assert "Traceback" not in "".join(lines)


@contextmanager
def all_ended(process: "subprocess.Popen[str]", folder: Path) -> Iterator[None]:
    """Leave no process behind: torchrun passes SIGTERM on; what does not heed it is killed."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            for path in folder.glob("pid*"):
                os.kill(int(path.read_text()), signal.SIGKILL)
            process.communicate()


def wait_for_checkpoint(process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not list(Path().glob(".sdpipe/runs/*/step-*")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
