"""Processes that decode pictures for a training, and their end."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, machine, train_alone, train_config
from picture_files import (
    AUGMENTED,
    RESIZE,
    SIZE,
    files_of,
    make_pictures,
    open_images,
)
from session_runs import in_mounts

from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import DataError, LoadingError
from sdpipe.runtime.image import decode
from sdpipe.training import inputs
from sdpipe.training.interruption import Interruption
from sdpipe.training.session import train_run
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_any_number_of_workers_gives_the_same_pixels(pictures: DataSet) -> None:
    """0, 1 and 2 processes, cropped in two epochs and uncropped: the same bytes in the order asked for."""
    wanted = [np.array([5, 3, 80]), np.array([7]), np.array([1, 2, 3, 4])]
    found = {
        workers: [
            (images.numpy().tobytes(), labels.tolist())
            for epoch in (0, 1, None)
            for images, labels in open_images(pictures, workers).batches(wanted, epoch)
        ]
        for workers in (0, 1, 2)
    }
    assert found[0] == found[1] == found[2]
    first, second, uncropped = (found[0][at : at + 3] for at in (0, 3, 6))
    assert first != second, "another epoch, other crops"
    assert first != uncropped
    files = files_of(pictures)
    as_predicted = decode(files.path(7), 3, (SIZE, SIZE), SIZE / RESIZE)
    assert uncropped[1] == (as_predicted.tobytes(), [pictures.train_labels_N[7]])


def test_workers_decode_while_the_device_computes(pictures: DataSet) -> None:
    """Behind other work of three times as long, half the wait for a batch and less than without a worker."""
    wanted = [np.tile(np.arange(80), 4)] * 8

    def median_wait_s(workers: int, other_work_s: float) -> float:
        waits, batches = [], open_images(pictures, workers).batches(wanted, 0)
        for _ in wanted:
            started = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - started)
            time.sleep(other_work_s)
        return float(np.median(waits[2:]))

    decoding_s = median_wait_s(0, other_work_s=0)
    assert median_wait_s(1, other_work_s=3 * decoding_s) < decoding_s / 2


def test_abandoned_batches_are_not_seen_again(pictures: DataSet) -> None:
    """After a validation that was broken off, the next epoch begins with its own first batch."""
    images = open_images(pictures, 2)
    everything = [np.array([number]) for number in range(60)]
    next(images.batches(everything))
    again = [labels.tolist() for _, labels in images.batches(everything[:5])]
    assert again == [[label] for label in pictures.train_labels_N[:5].tolist()]


def test_a_training_on_files_resumes_to_the_same_weights(pictures: DataSet, tmp_path: Path) -> None:
    """With all augmentations, stopped at each third step; one worker more changes nothing either."""
    config = train_config(**AUGMENTED, epochs=2, milestones=[])
    whole = train_alone(config, pictures, tmp_path / "whole")
    trainer = Trainer(config, pictures, CPU, World(0, 1, 0), workers=1)
    for epoch in range(2):
        while trainer.epoch == epoch:
            for number, _ in enumerate(trainer.steps()):
                if number == 2:
                    saved = trainer.checkpoint()
                    trainer = Trainer(config, pictures, CPU, World(0, 1, 0), workers=0)
                    trainer.restore(saved)
                    break
            else:
                trainer.validate()
    assert trainer.progress.history == whole.progress.history
    assert all(torch.equal(tensor, trainer.best_state[name]) for name, tensor in whole.state.items())
    assert whole.progress.best.validation_error < 0.5, "three colours, where guessing misses two thirds"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named_and_the_training_is_saved(tmp_path: Path, workers: int) -> None:
    dataset = make_pictures(tmp_path)
    config = train_config(**AUGMENTED, epochs=1, milestones=[], batch_size=8)
    trainer = Trainer(config, dataset, CPU, World(0, 1, 0), workers=workers)
    number = trainer.batches.indices(0, 4)[3]
    path = files_of(dataset).path(number)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(LoadingError, match=f"{path}: not a picture"):
        for _ in trainer.steps():
            pass
    assert trainer.num_steps == 4
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match=rf"{path}: 3 bytes, and \d+ when it was listed"):
        files_of(dataset).read(number)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file"):
        files_of(dataset).read(number)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_a_decoder_that_cannot_be_started_is_one_line(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As the kernel refuses it where memory or processes are short."""

    def fork() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(LoadingError, match="no process can be started to decode pictures"):
        next(open_images(pictures, 1).batches([np.array([0])]))


SMALL_SHM = """
mount -t tmpfs -o size=64k none /dev/shm
status=0; timeout 40 $TRAIN 3 2 pictures || status=$?
echo "exit $status"
"""


@pytest.mark.slow
def test_a_full_dev_shm_is_one_line(project: Path, mlflow_store: Path) -> None:
    """As in a container with too little of it, where the training would wait for ever."""
    make_pictures(project)
    out = in_mounts(SMALL_SHM, project)
    assert "exit 1\n" in out
    assert out.count("error:") == 1
    assert re.search("error: no memory for a batch of [0-9]+ pictures; they wait in /dev/shm", out)


def shared_mappings() -> int:
    """Blocks of /dev/shm that this process holds for tensors."""
    return Path("/proc/self/maps").read_text().count("/torch_")


def test_statistics_do_not_hold_all_batches_in_dev_shm(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 pictures one by one, of which few wait; 5,000 would take hundreds of megabytes there."""
    monkeypatch.setattr(inputs, "_STATISTICS_BATCH", 1)
    most = 0
    images = open_images(pictures, 1)
    batches = images.batches

    def counted(wanted: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal most
        for batch in batches(wanted):
            most = max(most, shared_mappings())
            yield batch

    monkeypatch.setattr(images, "batches", counted)
    inputs.fit_to(train_config(**AUGMENTED), pictures, np.arange(72), images)
    assert 1 <= most <= 8


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nsecond line"),
            "by signal: Killed. )",
        ),
        (RuntimeError("Pin memory thread exited unexpectedly"), "(Pin memory thread exited unexpectedly)"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer)"),
        (EOFError(), "(EOFError)"),
        (RuntimeError("an operator of ours failed"), None),
    ],
)
def test_each_word_of_a_dead_worker_is_understood(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str | None
) -> None:
    """Which of them comes depends on where its batch was; the second only with a CUDA device."""
    images = open_images(pictures, 0)

    def broken(_loader: object) -> Iterator[torch.Tensor]:
        raise error
        yield

    monkeypatch.setattr(type(images._loader), "__iter__", broken)
    with pytest.raises(type(error) if told is None else LoadingError) as raised:
        next(images.batches([np.arange(4)]))
    assert told is None or "a process that decodes pictures has died" in str(raised.value)
    assert (told or "of ours failed") in str(raised.value)


def start(project: Path, fault: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "session_worker.py"), "40", "0", fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def checkpoints(project: Path) -> list[Path]:
    return list(project.glob(".sdpipe/runs/*/step-*"))


@pytest.mark.parametrize("asked", [True, False])
def test_decoders_that_end_before_the_first_step_are_no_failure_where_all_were_asked_to(
    pictures: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Mean and deviation are taken of pictures that they decode; a signal goes to them, too."""
    interruption = Interruption(lambda: None)
    interruption.number = signal.SIGTERM if asked else None

    def dying(*_arguments: object) -> None:
        raise LoadingError("a process that decodes pictures has died")

    monkeypatch.setattr("sdpipe.training.trainer.fit_to", dying)
    with pytest.raises(SystemExit if asked else LoadingError) as ended:
        train_alone(train_config(**AUGMENTED), pictures, tmp_path, interruption=interruption)
    assert not asked or ended.value.code == 143


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(each, marks=pytest.mark.long) for each in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_nothing_is_lost_when_workers_end(project: Path, mlflow_store: Path, number: signal.Signals) -> None:
    """A worker that is killed: one line, exit 1. SIGTERM or Ctrl-C to all processes: as to the parent alone.

    Either way the last step is saved, no process stays, and a new start ends in the same bytes.
    """
    make_pictures(project)
    process = start(project, "pictures")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    assert not checkpoints(project), "none is due until it ends"
    workers = children(process.pid)
    assert len(workers) >= 2, "two decode"
    if number == signal.SIGKILL:
        os.kill(workers[0], number)
    else:
        os.killpg(process.pid, number)
    sent = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert process.returncode == 1
        assert "error: a process that decodes pictures has died (DataLoader worker" in errors
    else:
        assert process.returncode == 128 + number
        assert "continues from here" in out
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker stayed"
        time.sleep(0.1)
    assert not list(project.glob("pymp-*")), "a folder for their sockets stayed"
    (saved,) = checkpoints(project)
    process = start(project, "pictures")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"continuing after step {int(saved.name.split('-')[1])}," in out
    assert not list(project.glob("pymp-*"))
    continued = (project / "out" / "weights.safetensors").read_bytes()
    config = train_config(**AUGMENTED, epochs=40, milestones=[])
    train_run("plain", config, machine(), open_dataset(Path("data")), "code", Path("out"))
    assert (project / "out" / "weights.safetensors").read_bytes() == continued
