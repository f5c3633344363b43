"""Images of a training that are decoded from files, by processes beside the training.

A batch is decoded in chunks, each by a process that is free, into memory that all of them share; the training
takes them in order. What a crop draws is a function of (seed, epoch, sample), so any number of processes
gives the same pixels.

N: images of a batch or a chunk, H, W, C: height, width, channels.
"""

import math
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.data.pictures import ChooseBox, PictureFiles
from sdpipe.errors import DataError, LoadingError
from sdpipe.runtime.cores import num_cores
from sdpipe.runtime.memory import give_memory_back
from sdpipe.training.compute import Compute
from sdpipe.training.config import RandomScaleCrop, RandomSizeCrop
from sdpipe.training.draws import Draws
from sdpipe.training.interruption import end_with_parent

CHUNK = 16  # pictures that a process is given at once
_BATCHES_AHEAD = 2  # decoded while the device computes; at least as much as the processes are busy with
Crop = RandomSizeCrop | RandomScaleCrop | None


def count_workers() -> int:
    """One process for each core that this training may use; several processes of a training share them."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class FileImages:
    """Images that are decoded each time they are asked for."""

    num_at_once = 1

    def __init__(
        self,
        files: PictureFiles,
        labels_N: np.ndarray,
        compute: Compute,
        *,
        crop: Crop,
        seed: int,
        batch_size: int,
        workers: int | None,
    ) -> None:
        """batch_size: of this process, of which two are decoded ahead. workers: None: one a core, 0: none."""
        workers = count_workers() if workers is None else workers
        self.num_pixels = files.size_HW[0] * files.size_HW[1]
        self._image_shape_HWC = (*files.size_HW, files.channels)
        self._compute = compute
        self._labels_N = torch.from_numpy(labels_N).to(compute.device)
        self._decoder = _Decoder(files, crop, Draws(seed))
        self._processes: _Processes | None = None
        if workers:
            num_slots = max(-(-_BATCHES_AHEAD * batch_size // CHUNK), 2 * workers)
            self._processes = _Processes(self._decoder, workers, (num_slots, CHUNK, *self._image_shape_HWC))

    def batches(
        self, wanted: Iterable[np.ndarray], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images` says. Raises LoadingError if a picture cannot be read or a process has died.

        Who asks anew while earlier batches are left has given those up.
        """
        batches = list(wanted)
        is_cuda = self._compute.device.type == "cuda"
        chunks = (batch[at : at + CHUNK] for batch in batches for at in range(0, len(batch), CHUNK))
        with _faults_on_one_line(), closing(self._decoded(chunks, epoch)) as decoded:
            for batch in batches:
                images_NHWC = torch.empty(
                    (len(batch), *self._image_shape_HWC), dtype=torch.uint8, pin_memory=is_cuda
                )
                for at in range(0, len(batch), CHUNK):
                    images_NHWC[at : at + CHUNK] = torch.from_numpy(next(decoded))
                indices = self._compute.upload(torch.from_numpy(batch))
                yield self._compute.upload(images_NHWC), self._labels_N[indices]

    def _decoded(self, chunks: Iterable[np.ndarray], epoch: int | None) -> Generator[np.ndarray, None, None]:
        """The pixels of each chunk, until the next is asked for."""
        if self._processes is not None:
            yield from self._processes.decoded(chunks, epoch)
            return
        images_NHWC = np.empty((CHUNK, *self._image_shape_HWC), dtype=np.uint8)
        for numbers in chunks:
            self._decoder.decode(numbers, epoch, images_NHWC)
            yield images_NHWC[: len(numbers)]


class _Decoder:
    def __init__(self, files: PictureFiles, crop: Crop, draws: Draws) -> None:
        self._files = files
        self._crop = crop
        self._draws = draws

    def decode(self, numbers: np.ndarray, epoch: int | None, images_NHWC: np.ndarray) -> None:
        """Pictures by number, into the first places. epoch: of their random crops; None: evaluation's."""
        for at, number in enumerate(numbers.tolist()):
            try:
                images_NHWC[at] = self._files.read(
                    number, None if epoch is None else self._choose_box(number, epoch)
                )
            except MemoryError as error:
                raise DataError(f"{self._files.path(number)}: not enough memory to cut it") from error

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


_Waiting = deque[tuple[int, int, Future[None]]]
"""Chunks that were given to the processes, in order: the slot of each, its pictures, its end."""


class _Processes:
    """They decode chunks into slots of memory that they share with this process, started with the first."""

    def __init__(self, decoder: _Decoder, num: int, shape: tuple[int, ...]) -> None:
        """shape: of the slots, (number of them, N, H, W, C)."""
        self._num = num
        self._decoder = decoder
        # Anonymous, and theirs by fork: it needs no room in /dev/shm and has no name that could stay.
        memory = mmap.mmap(-1, math.prod(shape))
        self._slots = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(len(self._slots)):
            self._free.put(slot)
        self._waiting: _Waiting = deque()
        self._pool: ProcessPoolExecutor | None = None

    def decoded(self, chunks: Iterable[np.ndarray], epoch: int | None) -> Iterator[np.ndarray]:
        """The pixels of each chunk of numbers, until the next is asked for. Decodes as many ahead as fit."""
        self._give_up(self._waiting)
        waiting: _Waiting = deque()
        self._waiting = waiting
        try:
            for numbers in chunks:
                if self._free.empty() and waiting:
                    yield from self._first(waiting)
                slot = self._free.get()  # else one that was given up and is still decoded
                waiting.append((slot, len(numbers), self._submit(slot, numbers, epoch)))
            while waiting:
                yield from self._first(waiting)
        finally:
            self._give_up(waiting)

    def _first(self, waiting: _Waiting) -> Iterator[np.ndarray]:
        slot, num, end = waiting[0]
        end.result()
        yield self._slots[slot, :num]
        assert waiting is self._waiting, "asked for what was given up"
        waiting.popleft()
        self._free.put(slot)

    def _give_up(self, waiting: _Waiting) -> None:
        """A slot is free when nobody writes to it any more."""
        while waiting:
            slot, _num, end = waiting.popleft()
            end.cancel()
            end.add_done_callback(lambda _end, slot=slot: self._free.put(slot))  # type: ignore[misc]

    def _submit(self, slot: int, numbers: np.ndarray, epoch: int | None) -> Future[None]:
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self._num,
                    multiprocessing.get_context("fork"),
                    _start_worker,
                    (self._decoder, self._slots, os.getpid()),
                )
            return self._pool.submit(_decode, slot, numbers, epoch)
        except OSError as error:
            for child in multiprocessing.active_children():  # those that were started wait for ever
                child.kill()
            raise LoadingError(
                f"no process can be started to decode pictures ({error.strerror}); memory, /dev/shm, the "
                "number of processes or of open files is short; fewer machine.workers need less"
            ) from error


class _Worker:
    """What a process that decodes has of the training's."""

    decoder: _Decoder
    slots: np.ndarray


def _start_worker(decoder: _Decoder, slots: np.ndarray, parent: int) -> None:
    """Ctrl-C and the terminal's end are the parent's, which finishes its step and ends the workers.

    The parent keeps its memory for tensors; a worker has pictures.
    """
    give_memory_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler came along
    end_with_parent()
    if os.getppid() != parent:  # it was killed before that, and nothing would end this process
        os._exit(1)
    _Worker.decoder, _Worker.slots = decoder, slots


def _decode(slot: int, numbers: np.ndarray, epoch: int | None) -> None:
    """In a process that decodes."""
    _Worker.decoder.decode(numbers, epoch, _Worker.slots[slot])


@contextmanager
def _faults_on_one_line() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise LoadingError(str(error)) from error
    except BrokenProcessPool as error:
        raise LoadingError(
            "a process that decodes pictures has died; memory may have been short; fewer machine.workers "
            "need less"
        ) from error
