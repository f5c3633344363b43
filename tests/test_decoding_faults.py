"""Pictures that cannot be decoded, and processes that cannot decode them."""

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, train_config
from picture_files import AUGMENTED, files_of, make_pictures, open_images
from session_runs import in_mounts

from sdpipe.data.pictures import PictureFiles
from sdpipe.data.store import DataSet
from sdpipe.errors import DataError, LoadingError
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


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


def fork_but(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses the next process where memory or processes are short."""
    fork = os.fork

    def refused() -> int:
        if len(multiprocessing.active_children()) == allowed:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", refused)


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_decoder_that_cannot_be_started_is_one_line(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """The one that was started goes: it would be waited for at the end."""
    gc.collect()  # images of other tests end their own
    deadline = time.monotonic() + 10
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
    fork_but(allowed, monkeypatch)
    told = "^no process can be started to decode pictures .Resource temporarily unavailable."
    with pytest.raises(LoadingError, match=told):
        next(open_images(pictures, 2).batches([np.array([0])]))
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()


def test_what_fails_within_a_process_that_decodes_is_a_bug(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes as what it is."""

    def fail(*_arguments: object) -> None:
        raise OSError(errno.EBADF, "ours")

    monkeypatch.setattr(PictureFiles, "read", fail)
    with pytest.raises(OSError, match="ours"):
        next(open_images(pictures, 1).batches([np.arange(4)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_for_which_memory_is_short_is_named(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PictureFiles, "read", fail)
    with pytest.raises(LoadingError, match=f"^{files_of(pictures).path(5)}: not enough memory to cut it$"):
        next(open_images(pictures, workers).batches([np.array([5])]))


def test_a_process_whose_training_is_gone_does_not_begin() -> None:
    """Killed before the other asked to be told of it, it leaves one that nothing would end."""
    code = "from sdpipe.training.decoding import _start_worker\n_start_worker(None, None, 1)\nprint('began')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_process_that_dies_is_noticed_at_the_next_batch(pictures: DataSet) -> None:
    """And at any later one; no signal disturbs the step that is under way."""
    images = open_images(pictures, 2)
    batches = images.batches([np.arange(8)] * 99)
    next(batches)
    os.kill(max(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
    told = "^a process that decodes pictures has died; memory may have been short"
    with pytest.raises(LoadingError, match=told):
        list(batches)
    with pytest.raises(LoadingError, match=told):
        next(images.batches([np.arange(8)]))


SMALL_SHM = """
mount -t tmpfs -o size=64k none /dev/shm
status=0; timeout 40 $TRAIN 3 2 pictures || status=$?
echo "exit $status"
"""


@pytest.mark.slow
def test_pictures_need_no_room_in_dev_shm(project: Path, mlflow_store: Path) -> None:
    """Of which a container has little."""
    make_pictures(project)
    assert "exit 0\n" in in_mounts(SMALL_SHM, project)
