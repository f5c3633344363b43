"""The processes of one training: none but this, or those that torchrun started.

A mini-batch is cut into parts, and each process computes its share of them. PyTorch's
DistributedDataParallel averages the gradients. It is put around the stem, each branch and the head, not
around the network: an inactive block then takes part in nothing, so its gradients are not communicated. Which
blocks are active is a function of (seed, epoch, step) (`draws.py`) and the same everywhere without a message.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdpipe.errors import ConfigError, TrainingError
from sdpipe.network import ResNet

_TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_S = 50  # a process that is silent for so long is taken for dead


class World:
    """This process among the others. Use `joined_world()`."""

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank

    @property
    def leads(self) -> bool:
        """Whether this process writes files, tracks and talks."""
        return self.rank == 0

    def share(self, num_parts: int) -> slice:
        """Which of so many equal parts are this process's; num_parts is a multiple of `size`."""
        each = num_parts // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. A message between the hosts; no device waits."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message. The same bits everywhere."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def take_from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Copy the leader's tensors into those of all others."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def take_object_from_leader(self, value: object) -> object:
        """The leader's value, which must be plain data."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def replicate(self, network: ResNet) -> ResNet:
        """A view of the network, with the same parameters, whose backward pass averages the gradients.

        For one process it is the network itself.
        """
        if self.size == 1:
            return network
        with torch.device("meta"):
            view = ResNet(network.config)
        _average_gradients(view, network, "stem")
        _average_gradients(view, network, "head")
        for block, own in zip(view.blocks, network.blocks, strict=True):
            _average_gradients(block, own, "branch")
            if getattr(own, "projection", None) is not None:
                _average_gradients(block, own, "projection")
        return view


def _average_gradients(view: nn.Module, own: nn.Module, name: str) -> None:
    # Buffers are averaged by the training step, in the same message as the loss.
    setattr(view, name, DistributedDataParallel(getattr(own, name), forward_sync_buffers=False))


@contextmanager
def gradients_kept_here(view: nn.Module, *, wanted: bool) -> Iterator[None]:
    """For all but the last part of a mini-batch: add up gradients without sending them."""
    with ExitStack() as stack:
        for module in view.modules() if wanted else ():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    device: cpu, cuda or auto, as in params.yaml. Raises TrainingError when another process has died.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, 0)
        return
    missing = [name for name in _TORCHRUN_SETS if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {size}, and torchrun's {', '.join(missing)} is not set")
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL")):
            raise TrainingError(
                f"process {world.rank} of {size}: another process of this training has ended or is missing; "
                f"a new start continues from the last checkpoint ({str(error).splitlines()[0][:200]})"
            ) from error
        raise
    dist.destroy_process_group()
