"""How much a network computes, and how much of it with some blocks inactive."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdpipe.network import NetworkConfig

_KERNEL = 3 * 3  # pixels of each convolution


@dataclass(frozen=True, kw_only=True)
class MultiplyAdds:
    """Multiply-adds of one image's forward pass, of the convolutions and the head.

    always: stem and head; blocks: of each branch f_l, l = 1..L. The skips pool and pad only.
    """

    always: int
    blocks: tuple[int, ...]

    def active_share(self, active: Sequence[bool]) -> float:
        """The part of all multiply-adds that is left with only the active blocks."""
        computed = sum(cost for cost, is_active in zip(self.blocks, active, strict=True) if is_active)
        return (self.always + computed) / (self.always + sum(self.blocks))


def multiply_adds(network: NetworkConfig, height: int, width: int) -> MultiplyAdds:
    """Count them for a CIFAR-style network without projections, on images of height x width pixels."""
    always = _KERNEL * network.in_channels * network.widths[0] * height * width
    always += network.widths[-1] * network.num_classes
    blocks = []
    for shape in network.block_shapes:
        ins, outs = shape.in_channels, shape.out_channels
        # The ceiling, as a padded convolution has it.
        height, width = -(-height // shape.stride), -(-width // shape.stride)
        blocks.append(_KERNEL * (ins * outs + outs * outs) * height * width)
    return MultiplyAdds(always=always, blocks=tuple(blocks))
