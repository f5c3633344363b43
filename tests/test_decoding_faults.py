"""The channel by which decoded pictures come to a training, and what stands in its way."""

import errno
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from picture_files import make_pictures, open_images
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sdpipe.data.pictures import PictureFiles
from sdpipe.data.store import DataSet
from sdpipe.errors import LoadingError
from sdpipe.runtime.cores import num_cores
from sdpipe.training import decoding_worker
from sdpipe.training.decoding import FileImages


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder where sockets stand is made anew; a process has one."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is no longer than it must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def open_soon(dataset: DataSet, workers: int = 1) -> FileImages:
    """What is waited for in vain ends after 20 s."""
    images = open_images(dataset, workers)
    images._loader.timeout = 20
    return images


@contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """What waits for ever fails."""

    def end(*_arguments: object) -> NoReturn:
        raise TimeoutError(f"not ended in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("length", [75, 76])
def test_temporary_files_may_have_any_folder_or_one_line_says_why_not(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, short: Path, length: int
) -> None:
    """unix(7) lets a socket's path have 107 bytes; the training waited for ever."""
    folder = short / ("x" * (length - len(f"{short}/")))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    batches = open_soon(pictures).batches([np.arange(4)])
    if length == 75:
        next(batches)
        return
    told = f"^no picture can be sent to the training: TMPDIR, {folder}, is of 76 bytes, .* let it have 75$"
    with pytest.raises(LoadingError, match=told):
        next(batches)


def test_processes_that_decode_have_no_folder_of_their_own(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    """It would stay where they are killed, as at the end of a training that is stopped."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    images = open_soon(pictures, 2)
    list(images.batches([np.arange(4)] * 4))
    (folder,) = short.iterdir()
    assert len(list(folder.iterdir())) == 2


def test_a_folder_for_temporary_files_that_is_gone_is_one_line(
    pictures: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a scheduler has cleaned up; a process that has too many files open says it in the same way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(LoadingError, match=r"^no picture can be sent to the training: .*No such file.*/gone"):
        next(open_soon(pictures).batches([np.arange(4)]))


def test_sockets_that_are_removed_in_mid_run_are_one_line(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    """As by what cleans up a folder for temporary files by age; the last step is saved for a LoadingError."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    batches = open_soon(pictures).batches([np.arange(4)] * 9)
    next(batches)
    for folder in short.iterdir():
        shutil.rmtree(folder)
    with pytest.raises(LoadingError, match=f"^no picture comes from .*No such file.*stand in {short}, from"):
        list(batches)


def test_too_many_open_files_in_mid_run_are_one_line(pictures: DataSet) -> None:
    batches = open_soon(pictures).batches([np.arange(4)] * 9)
    next(batches)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        with pytest.raises(LoadingError, match="^too many files are open"):
            list(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_second_process_that_cannot_be_started_is_one_line(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own end of the first one fails, of which Python would tell with a traceback."""
    told: list[object] = []
    fork = os.fork

    def fork_once() -> int:
        if multiprocessing.active_children():
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(os, "fork", fork_once)
    try:
        next(open_images(pictures, 2).batches([np.arange(4)]))
    except LoadingError as error:
        line = str(error)
    gc.collect()
    (started,) = multiprocessing.active_children()
    started.kill()
    started.join()
    assert line.startswith("no process can be started to decode pictures (Resource temporarily unavailable)")
    assert not told


def test_a_parent_without_a_thread_is_one_line(pictures: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a traceback when PyTorch ends its processes, for which it needs threads, too."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def refuse(_self: object) -> None:
        raise RuntimeError("can't start new thread")

    images = open_soon(pictures)
    batches = images.batches([np.arange(4)] * 9)
    next(batches)
    with monkeypatch.context() as without:
        without.setattr(_MultiProcessingDataLoaderIter, "__next__", refuse)
        without.setattr(_MultiProcessingDataLoaderIter, "__del__", refuse)
        with pytest.raises(LoadingError, match=r"^no process can be started .* \(can't start new thread\); "):
            next(batches)
        del images, batches
        gc.collect()
    for left in multiprocessing.active_children():
        left.kill()
        left.join()
    assert not told


def test_a_batch_is_not_sent_through_a_socket_that_nobody_serves(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process cannot start the thread for it; the first is slow, so its batch is awaited first."""
    start, read = threading.Thread.start, PictureFiles.read

    def start_or_not(thread: threading.Thread) -> None:
        if getattr(thread, "_target", None) == resource_sharer._resource_sharer._serve:  # type: ignore[attr-defined]
            worker = get_worker_info()
            if worker is not None and worker.id == 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    def read_slowly(files: PictureFiles, number: int, *choose_box: Any) -> np.ndarray:
        time.sleep(number == 0)
        return read(files, number, *choose_box)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    monkeypatch.setattr(PictureFiles, "read", read_slowly)
    batches = open_images(pictures, 2).batches([np.array([number]) for number in range(9)])
    with (
        ended_after(20),
        pytest.raises(LoadingError, match="^no picture can be sent .* can't start new thread$"),
    ):
        list(batches)


def test_a_process_that_cannot_send_ends_without_a_traceback(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_results: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(decoding_worker, "_start_thread", refuse)
    images = open_images(pictures, 1)
    images._loader.timeout = 1  # after which PyTorch looks for its processes, else every 5 s
    with pytest.raises(LoadingError, match="^a process that decodes pictures has died"):
        next(images.batches([np.arange(4)]))
    assert capfd.readouterr().err == ""


def test_a_parent_that_was_killed_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """Other errors of the thread that shares memory are told."""
    for error in (ConnectionResetError(), EOFError()):
        decoding_worker._pass_over_lost_parent(type(error), error, None)
    assert capsys.readouterr().err == ""
    decoding_worker._pass_over_lost_parent(ValueError, ValueError("ours"), None)
    assert capsys.readouterr().err == "ValueError: ours\n"


def test_more_processes_than_cores_are_no_warning(pictures: DataSet) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_soon(pictures, workers=num_cores() + 1)
        next(images.batches([np.arange(4)]))


def test_what_fails_within_a_process_that_decodes_is_no_fault_of_the_channel(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a bug, and comes with its traceback."""

    def fail(*_arguments: object) -> None:
        raise OSError(errno.EBADF, "ours")

    monkeypatch.setattr(PictureFiles, "read", fail)
    with pytest.raises(OSError, match="Caught OSError in DataLoader worker process 0"):
        next(open_soon(pictures).batches([np.arange(4)]))
