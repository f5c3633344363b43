"""Activation checkpointing: what a branch computed is computed again in the backward pass, not kept.

Only the branches' inputs stay in memory: less memory for about a third more time, and the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdpipe.network import ResidualBlock, ResNet


def recompute_branches(network: ResNet) -> None:
    """From now on, in training, each active branch of `network` is computed twice.

    It is the branches that change, so that a view of them (`World.replicate`) does the same.
    """
    for block in network.blocks:
        assert isinstance(block, ResidualBlock)
        block.branch.forward = partial(_forward, block.branch, block.branch.forward)  # type: ignore[method-assign]


def _forward(branch: nn.Module, forward: Callable[[Tensor], Tensor], hidden_NCHW: Tensor) -> Tensor:
    if not branch.training:
        return forward(hidden_NCHW)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(branch)

    result = checkpoint(
        forward, hidden_NCHW, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    assert isinstance(result, Tensor)
    return result


@contextmanager
def _statistics_kept(branch: nn.Module) -> Iterator[None]:
    """BatchNorm counts the mini-batch a second time into copies, which are then thrown away."""
    kept = [
        (module, name, buffer)
        for module in branch.modules()
        if isinstance(module, nn.BatchNorm2d)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
