"""CUDA graphs: the kernels of an active block are launched as one, forward and backward.

Blocks of small networks are done sooner than a processor can launch their kernels one by one. The kernels,
their order and so the bytes stay the same. A graph is bound to its block and to parts of one size. That of an
inactive block is not launched, so stochastic depth saves what it saved before.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sdpipe.network import ResidualBlock, ResNet
from sdpipe.segment import Active
from sdpipe.training.compute import Compute


class _ActiveBlock(nn.Module):
    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_NCHW: Tensor) -> Tensor:
        return self.block(hidden_NCHW, True)  # type: ignore[no-any-return]


def launch_blocks_as_graphs(network: ResNet, images_NCHW: Tensor, compute: Compute) -> None:
    """From now on, in training, each block that is active for a part of this size is launched as a graph.

    network: in training mode, on a CUDA device; its parameters and buffers are left as they were.
    images_NCHW: of one part. Waits for the device. All blocks' activations stay in its memory.
    """
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    blocks = [block for block in network.blocks if isinstance(block, ResidualBlock)]
    graphed = tuple(map(_ActiveBlock, blocks))
    # A block's gradients come from a stream of its graph; PyTorch waits for that one by itself.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with compute.autocast(cache=False):
        torch.cuda.make_graphed_callables(graphed, _inputs(network, images_NCHW))
    for name, buffer in network.named_buffers():  # which BatchNorm has changed at every trial
        buffer.copy_(kept[name])
    for block, active_block in zip(blocks, graphed, strict=True):
        forward = partial(_forward, block, block.forward, active_block, len(images_NCHW))
        block.forward = forward  # type: ignore[method-assign]


def _inputs(network: ResNet, images_NCHW: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """A tensor like the input of each block."""
    inputs = []
    with torch.no_grad():
        hidden_NCHW = network.stem(images_NCHW)
        for block in network.blocks:
            inputs.append((torch.empty_like(hidden_NCHW).normal_().requires_grad_(),))
            hidden_NCHW = block(hidden_NCHW, True)
    return tuple(inputs)


def _forward(
    block: ResidualBlock,
    forward: Callable[[Tensor, Active | None], Tensor],
    graphed: nn.Module,
    num_images: int,
    hidden_NCHW: Tensor,
    active: Active | None,
) -> Tensor:
    if block.training and active is True and len(hidden_NCHW) == num_images:
        return graphed(hidden_NCHW)  # type: ignore[no-any-return]
    return forward(hidden_NCHW, active)
