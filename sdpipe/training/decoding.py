"""Images of a training that are decoded from files, by worker processes beside the training.

PyTorch's DataLoader holds the processes and brings batches in order. What a crop draws is a function of
(seed, epoch, sample), so any number of processes gives the same pixels.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import current_process
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.data.pictures import ChooseBox, PictureFiles
from sdpipe.errors import DataError, LoadingError
from sdpipe.runtime.cores import num_cores
from sdpipe.training.compute import Compute
from sdpipe.training.config import RandomScaleCrop, RandomSizeCrop
from sdpipe.training.decoding_faults import faults_on_one_line, first_line
from sdpipe.training.decoding_worker import UNSENT, Unreadable, start_worker
from sdpipe.training.draws import Draws

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
            worker_init_fn=start_worker,
        )

    def batches(
        self, wanted: Iterable[np.ndarray], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images` says. Raises LoadingError if a picture cannot be read or a process has died."""
        numbers = list(wanted)
        self._keys.wanted = ([(int(number), epoch) for number in each] for each in numbers)
        with faults_on_one_line(), _death_noticed_when_waiting():
            loaded = iter(self._loader)
        for each in numbers:
            with faults_on_one_line():
                images_NHWC = next(loaded)
            if isinstance(images_NHWC, Unreadable):
                raise LoadingError(str(images_NHWC))
            indices = self._compute.upload(torch.from_numpy(each))
            yield (
                images_NHWC.to(self._compute.device, non_blocking=True),  # pinned already
                self._labels_N[indices],
            )


class _Loader(DataLoader["np.ndarray | Unreadable"]):
    """PyTorch's, whose processes may be refused by the system when only some of them are there."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super()._get_iterator()
        _make_folder_for_sockets()
        return _Workers(self)

    def check_worker_number_rationality(self) -> None:
        """Warn of nothing: how many are fast is measured in docs/training.md, and said there."""


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
        raise LoadingError(f"{UNSENT}: {error}") from error
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-100)


class _Workers(_MultiProcessingDataLoaderIter):
    def __del__(self) -> None:
        # Made to the end, and threads can be started; else it fails, and Python prints a traceback.
        if hasattr(self, "_workers_status"):
            with suppress(RuntimeError):
                super().__del__()


class _Keys:
    """What the DataLoader asks for batch by batch."""

    wanted: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.wanted)


class _Decoder(Dataset[np.ndarray | Unreadable]):
    def __init__(self, files: PictureFiles, crop: Crop, draws: Draws) -> None:
        self._files = files
        self._crop = crop
        self._draws = draws

    def __getitem__(self, key: Key) -> np.ndarray | Unreadable:
        number, epoch = key
        try:
            return self._files.read(number, None if epoch is None else self._choose_box(number, epoch))
        except DataError as error:
            return Unreadable(error)
        except MemoryError:
            return Unreadable(f"{self._files.path(number)}: not enough memory to cut it")

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


def _stack(images: list[np.ndarray | Unreadable]) -> Tensor | Unreadable:
    """A batch, in a worker already in the memory that it shares with the training.

    Moved there by the thread that sends it, a batch that finds no room would never arrive, nor would a word.
    """
    for image in images:
        if isinstance(image, Unreadable):
            return image
    try:
        batch_NHWC = torch.from_numpy(np.stack(images))
        if get_worker_info() is not None:
            batch_NHWC.share_memory_()  # type: ignore[no-untyped-call]
        return batch_NHWC
    except (MemoryError, RuntimeError) as error:
        return Unreadable(
            f"no memory for a batch of {len(images)} pictures; they wait in /dev/shm, which a container may "
            f"have too little of; fewer machine.workers need less ({first_line(error)})"
        )


@contextmanager
def _death_noticed_when_waiting() -> Iterator[None]:
    """Take back the handler by which the DataLoader raises wherever this process is, as in half an update.

    It also looks after its processes whenever it waits for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)
