"""Images of a training that are decoded from files, by worker processes beside the training.

PyTorch's DataLoader holds the processes and brings batches in order. What a crop draws is a function of
(seed, epoch, sample), so any number of processes gives the same pixels.
"""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import current_process
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.data.pictures import ChooseBox, PictureFiles
from sdpipe.errors import DataError, LoadingError
from sdpipe.runtime.cores import num_cores
from sdpipe.runtime.memory import give_memory_back
from sdpipe.training.compute import Compute
from sdpipe.training.config import RandomScaleCrop, RandomSizeCrop
from sdpipe.training.draws import Draws

_SHORT = (errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EMFILE)
_DEATHS = ("DataLoader worker", "Pin memory thread exited")
"""How the DataLoader begins to tell of a process's death; the second, where its batch was being pinned."""
_TOO_MANY_FILES = "Too many open files. "
"""How it tells that it cannot take a batch for want of file descriptors."""
_OF_A_WORKER = "Caught "
"""How it begins to tell of an error within a worker, which is a bug."""
_UNSENT = "no picture can be sent to the training"
_LONGEST_TMPDIR = 75
"""Bytes: a socket's path may have 107 (unix(7)), and `/pymp-xxxxxxxx/listener-xxxxxxxx` is 32 of them."""
Crop = RandomSizeCrop | RandomScaleCrop | None
Key = tuple[int, int | None]
"""A picture's number, and the epoch of its random crop."""


def count_workers() -> int:
    """One process for each core that this training may use; several processes of a training share them."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class FileImages:
    """Images that are decoded each time they are asked for."""

    def __init__(
        self,
        files: PictureFiles,
        labels_N: np.ndarray,
        compute: Compute,
        *,
        crop: Crop,
        seed: int,
        workers: int | None,
    ) -> None:
        """workers: processes; None: one a core, 0: decode in this one."""
        workers = count_workers() if workers is None else workers
        self.num_pixels = files.size_HW[0] * files.size_HW[1]
        self.num_at_once = 1
        self._compute = compute
        self._labels_N = torch.from_numpy(labels_N).to(compute.device)
        self._keys = _Keys()
        self._loader = _Loader(
            _Decoder(files, crop, Draws(seed)),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=compute.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
        )

    def batches(
        self, wanted: Iterable[np.ndarray], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images` says. Raises LoadingError if a picture cannot be read or a process has died."""
        numbers = list(wanted)
        self._keys.wanted = ([(int(number), epoch) for number in each] for each in numbers)
        with _faults_on_one_line(), _death_noticed_when_waiting():
            loaded = iter(self._loader)
        for each in numbers:
            with _faults_on_one_line():
                images_NHWC = next(loaded)
            if isinstance(images_NHWC, _Unreadable):
                raise LoadingError(str(images_NHWC))
            indices = self._compute.upload(torch.from_numpy(each))
            yield (
                images_NHWC.to(self._compute.device, non_blocking=True),  # pinned already
                self._labels_N[indices],
            )


class _Loader(DataLoader["np.ndarray | _Unreadable"]):
    """PyTorch's, whose processes may be refused by the system when only some of them are there."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super()._get_iterator()
        _make_folder_for_sockets()
        return _Workers(self)


def _make_folder_for_sockets() -> None:
    """One of this process, which removes it behind its workers; one that is killed would leave its own.

    multiprocessing's own removal ends in a traceback where the folder has gone.
    """
    config = current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is not None:
        return
    try:
        config["tempdir"] = folder = tempfile.mkdtemp(prefix="pymp-")
    except OSError as error:
        raise LoadingError(f"{_UNSENT}: {error}") from error
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-100)


class _Workers(_MultiProcessingDataLoaderIter):
    def __del__(self) -> None:
        if hasattr(self, "_workers_status"):  # made to the end; else it fails, and Python prints a traceback
            super().__del__()


class _Keys:
    """What the DataLoader asks for batch by batch."""

    wanted: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.wanted)


class _Unreadable(str):
    """Why a picture cannot be read, in place of its pixels; exceptions would come as tracebacks."""

    __slots__ = ()


class _Decoder(Dataset[np.ndarray | _Unreadable]):
    def __init__(self, files: PictureFiles, crop: Crop, draws: Draws) -> None:
        self._files = files
        self._crop = crop
        self._draws = draws

    def __getitem__(self, key: Key) -> np.ndarray | _Unreadable:
        number, epoch = key
        try:
            return self._files.read(number, None if epoch is None else self._choose_box(number, epoch))
        except DataError as error:
            return _Unreadable(error)
        except MemoryError:
            return _Unreadable(f"{self._files.path(number)}: not enough memory to cut it")

    def _choose_box(self, number: int, epoch: int) -> ChooseBox | None:
        generator, size_HW = self._draws.crop(epoch, number), self._files.size_HW
        match self._crop:
            case RandomSizeCrop(area=area, aspect=aspect):
                return partial(
                    random_size_box, size_HW=size_HW, area=area, aspect=aspect, generator=generator
                )
            case RandomScaleCrop(shorter_side=shorter_side):
                return partial(
                    random_scale_box, size_HW=size_HW, shorter_side=shorter_side, generator=generator
                )
        return None


def _stack(images: list[np.ndarray | _Unreadable]) -> Tensor | _Unreadable:
    """A batch, in a worker already in the memory that it shares with the training.

    Moved there by the thread that sends it, a batch that finds no room would never arrive, nor would a word.
    """
    for image in images:
        if isinstance(image, _Unreadable):
            return image
    try:
        batch_NHWC = torch.from_numpy(np.stack(images))
        if get_worker_info() is not None:
            batch_NHWC.share_memory_()  # type: ignore[no-untyped-call]
        return batch_NHWC
    except (MemoryError, RuntimeError) as error:
        return _Unreadable(
            f"no memory for a batch of {len(images)} pictures; they wait in /dev/shm, which a container may "
            f"have too little of; fewer machine.workers need less ({_first_line(error)})"
        )


def _start_worker(_worker: int) -> None:
    """Ctrl-C and the terminal's end are the parent's, which finishes its step and ends the workers.

    The parent keeps its memory for tensors; a worker has pictures.
    """
    give_memory_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler came along
    Queue._on_queue_feeder_error = _tell_instead  # type: ignore[attr-defined]


def _tell_instead(results: "Queue[Any]", error: Exception, unsent: tuple[int, object] | bytes) -> None:
    """Tell why a batch cannot be sent, in its place: it would be waited for for ever, behind a traceback.

    Called in the thread that sends it, which first makes a socket, through which memory is shared.
    """
    if not isinstance(unsent, tuple):
        os._exit(1)  # nothing can be told, either; that a worker has died is noticed
    reason = str(error)
    if reason == "AF_UNIX path too long":
        folder = tempfile.gettempdir()
        reason = (
            f"TMPDIR, {folder}, is of {len(os.fsencode(folder))} bytes, and the sockets that stand there let "
            f"it have {_LONGEST_TMPDIR}"
        )
    results.put((unsent[0], _Unreadable(f"{_UNSENT}: {reason}")))


@contextmanager
def _death_noticed_when_waiting() -> Iterator[None]:
    """Take back the handler by which the DataLoader raises wherever this process is, as in half an update.

    It also looks after its processes whenever it waits for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@contextmanager
def _faults_on_one_line() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if str(error).startswith(_TOO_MANY_FILES):
            raise LoadingError(
                "too many files are open for pictures to come from the processes that decode them; a higher "
                "`ulimit -n` lets them, fewer machine.workers need less"
            ) from error
        if isinstance(error, RuntimeError) and not str(error).startswith(_DEATHS):
            raise
        raise LoadingError(
            f"a process that decodes pictures has died ({_first_line(error)}); memory may have been "
            "short, also in /dev/shm; fewer machine.workers need less"
        ) from error
    except OSError as error:  # of fork(), or of the queues between the processes
        if str(error).startswith(_OF_A_WORKER):
            raise
        if error.errno in _SHORT:
            raise LoadingError(
                f"no process can be started to decode pictures ({error.strerror}); memory, /dev/shm, the "
                "number of processes or of open files is short; fewer machine.workers need less"
            ) from error
        raise LoadingError(
            f"no picture comes from the processes that decode them ({error}); their sockets stand in "
            f"{tempfile.gettempdir()}, from where they may have been removed"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
