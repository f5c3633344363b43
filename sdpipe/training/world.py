"""The processes of one training: none but this, or those that torchrun started.

A mini-batch is cut into parts, and each process computes its share of them. PyTorch's
DistributedDataParallel averages the gradients. It is put around the stem, each branch and the head, not
around the network: an inactive block then takes part in nothing, so its gradients are not communicated. Which
blocks are active is a function of (seed, epoch, step) (`draws.py`) and the same everywhere without a message.
"""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sdpipe.errors import ConfigError, TrainingError, tell
from sdpipe.network import ResNet
from sdpipe.training.compute import cuda_device
from sdpipe.training.interruption import end_with_parent, ending_signals

_TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MAX_PORT = 65535
TIMEOUT_S = 25  # a process that is silent for so long within a step is taken for dead
_TELL_S = 15
PATIENCE_S = 600  # where one may rightly take longer: at the start, in a validation, while the leader saves
_LOST = ("gloo", "NCCL", "pair closure", "Connection closed", "Connection reset", "Broken pipe", "imed out")
"""In messages of an exchange that failed; not all of them name the library. imed out: Timed out, timed out"""


class World:
    """This process among the others. Use `joined_world()`."""

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        group: dist.ProcessGroup | None = None,
        questions: dist.ProcessGroup | None = None,
        notice: AbstractContextManager[None] | None = None,
    ) -> None:
        """group: all processes; questions: the same for messages between the hosts, waited for TIMEOUT_S.

        In the default group they wait for PATIENCE_S. notice: what says so when it takes long.
        """
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self._group = group
        self._questions = questions
        self._notice = notice or nullcontext()

    @property
    def leads(self) -> bool:
        """Whether this process writes files, tracks and talks."""
        return self.rank == 0

    def share(self, num_parts: int) -> slice:
        """Which of so many equal parts are this process's; num_parts is a multiple of `size`."""
        each = num_parts // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each, whether it is true in any process. One message between the hosts; no device waits."""
        if self.size == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(counts, group=self._questions)
        return tuple(bool(count) for count in counts)

    def wait(self) -> None:
        """Wait until all processes are here, also for one that has long work of its own."""
        if self.size > 1:
            with self._notice:
                dist.all_reduce(torch.zeros(1))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message. The same bits everywhere."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, when all are here."""
        self.wait()
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)

    def take_from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Copy the leader's tensors into those of all others, when all are here."""
        self.wait()
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self._group)

    def take_object_from_leader(self, value: object) -> object:
        """The leader's value, which must be plain data."""
        if self.size == 1:
            return value
        self.wait()
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def replicate(self, network: ResNet) -> ResNet:
        """A view of the network, with the same parameters, whose backward pass averages the gradients.

        For one process it is the network itself.
        """
        if self.size == 1:
            return network
        self.wait()
        with torch.device("meta"):
            view = ResNet(network.config)
        self._average_gradients(view, network, "stem")
        self._average_gradients(view, network, "head")
        for block, own in zip(view.blocks, network.blocks, strict=True):
            self._average_gradients(block, own, "branch")
            if getattr(own, "projection", None) is not None:
                self._average_gradients(block, own, "projection")
        return view

    @contextmanager
    def keeping_gradients(self, view: nn.Module, *, wanted: bool) -> Iterator[None]:
        """For all but the last part of a mini-batch: add up gradients without sending them."""
        with ExitStack() as stack:
            for module in view.modules() if wanted and self.size > 1 else ():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def _average_gradients(self, view: nn.Module, own: nn.Module, name: str) -> None:
        # Buffers are averaged by the training step, in the same message as the loss.
        around = DistributedDataParallel(
            getattr(own, name), process_group=self._group, forward_sync_buffers=False
        )
        # Else DDP lays out its messages anew behind the first backward pass, and so behind each resume. With
        # three processes or more, a gradient's place in a message decides in which order it is added up.
        around.reducer._push_all_rebuilt_params()
        setattr(view, name, around)


class _Notice:
    """Says, after _TELL_S in its block, whom this process waits for: it would be a riddle for minutes.

    A thread looks once a second, so that waiting often costs nothing. It counts its looks: by the clock, a
    process that was stopped and goes on would say so of itself.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._text = f"process {rank} of {size} waits for the others, up to {PATIENCE_S // 60} minutes"
        self._wait: object | None = None
        Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self._wait = object()

    def __exit__(self, *_error: object) -> None:
        self._wait = None

    def _watch(self) -> None:
        seen, num_looks = None, 0
        while True:
            time.sleep(1)
            now = self._wait
            num_looks = num_looks + 1 if now is seen else 0
            seen = now
            if now is not None and num_looks == _TELL_S:
                tell(self._text)


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    device: cpu, cuda or auto, as in params.yaml. Raises TrainingError when another process has died, and
    DeviceError where this one has no CUDA device.
    """
    size = _number("WORLD_SIZE", range(1, 2**31)) if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        yield World(0, 1, 0)
        return
    missing = [name for name in _TORCHRUN_SETS if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {size}, and torchrun's {', '.join(missing)} is not set")
    rank, local_rank = _number("RANK", range(size)), _number("LOCAL_RANK", range(size))
    _number("MASTER_PORT", range(1, _MAX_PORT + 1))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(cuda_device(local_rank))
    end_with_parent()
    try:
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        notice = _Notice(rank, size)
        with _signals_end_at_once(), notice:
            _meet(backend)
            questions = group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
            # NCCL's watchdog aborts the process: the question of each step shall notice before it.
            if on_cuda:
                group = dist.new_group(timeout=timedelta(seconds=2 * TIMEOUT_S))
        assert isinstance(group, dist.ProcessGroup), "every process is in it"
        assert isinstance(questions, dist.ProcessGroup), "every process is in it"
        yield World(rank, size, local_rank, group, questions, notice)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ["MASTER_PORT"]
            raise TrainingError(
                f"process {rank} of {size}: port {port} is taken; choose another MASTER_PORT"
            ) from error
        if isinstance(error, dist.DistError) or any(phrase in str(error) for phrase in _LOST):
            raise TrainingError(
                f"process {rank} of {size}: another process of this training has ended or does not answer; "
                f"a new start continues from the last checkpoint ({str(error).splitlines()[0][:200]})"
            ) from error
        raise
    dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Make the default group of all processes.

    Each restart of torchrun's (--max-restarts) needs names of its own: the store stays what it was, and holds
    the addresses of processes that are no more.
    """
    patience = timedelta(seconds=PATIENCE_S)
    store, rank, size = next(rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)


def _number(name: str, allowed: range) -> int:
    """An environment variable of torchrun's."""
    text = os.environ[name]
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) not in allowed:
        raise ConfigError(f"{name}: expected a number from {allowed[0]} to {allowed[-1]}, got {text!r}")
    return int(text)


@contextmanager
def _signals_end_at_once() -> Iterator[None]:
    """While the others are waited for nothing could notice a signal, and nothing is there to save."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
