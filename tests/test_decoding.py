"""Processes that decode pictures for a training, and their end."""

import os
import signal
import subprocess
import sys
import time
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

from sdpipe.data.pictures import ChooseBox, PictureFiles
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import LoadingError
from sdpipe.runtime.image import decode
from sdpipe.training.decoding import CHUNK
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


@pytest.mark.slow
def test_workers_decode_while_the_device_computes(pictures: DataSet) -> None:
    """Behind other work of three times as long, half the wait for a batch and less than without a worker."""
    wanted = [np.tile(np.arange(80), 4)] * 8

    def median_wait_s(workers: int, other_work_s: float) -> float:
        images = open_images(pictures, workers, batch_size=320)
        waits, batches = [], images.batches(wanted, 0)
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
    given_up = images.batches(everything)
    next(given_up)
    again = [labels.tolist() for _, labels in images.batches(everything[:5])]
    assert again == [[label] for label in pictures.train_labels_N[:5].tolist()]
    with pytest.raises(AssertionError, match="given up"):
        next(given_up)


@pytest.mark.slow
def test_a_slot_is_not_used_again_while_it_is_written(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of a batch that was given up comes late; the next has all slots in turn."""
    read = PictureFiles.read

    def slow(files: PictureFiles, number: int, choose_box: ChooseBox | None = None) -> np.ndarray:
        time.sleep(1 if number == 89 else 0)
        return read(files, number, choose_box)

    monkeypatch.setattr(PictureFiles, "read", slow)
    images = open_images(pictures, 2, batch_size=1)  # four slots
    given_up = images.batches([np.array([number]) for number in (0, 89, 88, 87)])
    next(given_up)
    time.sleep(0.3)  # 89 has been begun
    del given_up
    batches = images.batches([np.array([number]) for number in range(1, 7)])
    found = [next(batches)[0].numpy().tobytes()]
    time.sleep(1.5)  # 89 has ended
    found += [pixels.numpy().tobytes() for pixels, _ in batches]
    assert found == [files_of(pictures).read(number).tobytes() for number in range(1, 7)]


@pytest.mark.parametrize("batch_size", [1, 40, 200])
def test_batches_of_any_size_pass_through_the_slots(pictures: DataSet, batch_size: int) -> None:
    """Of more pictures than all slots hold, and of none, whatever the processes finish first."""
    rng = np.random.default_rng(0)
    sizes = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 200, 3)
    wanted = [rng.integers(0, 80, size=size) for size in sizes]
    images = open_images(pictures, 2, batch_size=batch_size)
    for numbers, (found, labels) in zip(wanted, images.batches(wanted, 0), strict=True):
        expected = list(open_images(pictures, 0).batches([numbers], 0))
        assert torch.equal(found, expected[0][0])
        assert labels.tolist() == pictures.train_labels_N[numbers].tolist()


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


def start(project: Path, fault: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "session_worker.py"), "40", "0", fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
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


def all_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a worker stayed"
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_end_with_a_training_that_is_killed(project: Path, mlflow_store: Path) -> None:
    """Nothing tells them so: they hold the pipe by which they are asked, too."""
    make_pictures(project)
    process = start(project, "pictures")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=60)
    all_end(workers)


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
        assert "error: a process that decodes pictures has died" in errors
    else:
        assert process.returncode == 128 + number
        assert "continues from here" in out
    all_end(workers)
    (saved,) = checkpoints(project)
    process = start(project, "pictures")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"continuing after step {int(saved.name.split('-')[1])}," in out
    continued = (project / "out" / "weights.safetensors").read_bytes()
    config = train_config(**AUGMENTED, epochs=40, milestones=[])
    train_run("plain", config, machine(), open_dataset(Path("data")), "code", Path("out"))
    assert (project / "out" / "weights.safetensors").read_bytes() == continued
