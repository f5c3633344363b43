"""Activation checkpointing: what a block computed is computed again in the backward pass, not kept.

Only the blocks' inputs stay in memory: less memory for about a third more time, and the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdpipe.network import Active, ResidualBlock, ResNet


def recompute_blocks(network: ResNet) -> None:
    """From now on, in training, each active block of `network` computes its branch twice."""
    for block in network.blocks:
        assert isinstance(block, ResidualBlock)
        block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]


def _forward(
    block: ResidualBlock,
    forward: Callable[[Tensor, Active | None], Tensor],
    hidden_NCHW: Tensor,
    active: Active | None,
) -> Tensor:
    if not block.training or not active:  # an inactive block computes nothing worth forgetting
        return forward(hidden_NCHW, active)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    result = checkpoint(
        forward, hidden_NCHW, active, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    assert isinstance(result, Tensor)
    return result


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorm counts the mini-batch a second time into copies, which are then thrown away."""
    kept = [
        (module, name, buffer)
        for module in block.modules()
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
