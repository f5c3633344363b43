"""How many blocks of which shape a residual network has: the tables of He et al. 2015, arXiv 1512.03385."""

from collections.abc import Sequence
from dataclasses import dataclass

# Blocks in each group (ResNet, table 1). CIFAR-style nets have depth 6n + 2: three groups of n (section 4).
_IMAGENET_GROUPS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_FIRST_BOTTLENECK_DEPTH = 50
_EXPANSION = 4  # a bottleneck's output has four times the channels of its 3x3 convolution


def groups_of(family: str, depth: int) -> tuple[int, ...]:
    """Residual blocks in each group. Raises ValueError if the family has no such depth."""
    if family == "imagenet":
        if depth not in _IMAGENET_GROUPS:
            raise ValueError(f"expected a depth of {', '.join(map(str, _IMAGENET_GROUPS))}, got {depth}")
        return _IMAGENET_GROUPS[depth]
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"expected a depth of 6n + 2 (8, 14, 20, ..., 56, 110, ...), got {depth}")
    return ((depth - 2) // 6,) * 3


def min_image_px(family: str) -> int:
    """The smallest side of images of which the last strided convolution still sees 2 pixels.

    On one pixel it has nothing to skip, and oneDNN's bf16 gradient of its weights is wrong (PyTorch 2.14).
    """
    # Strides in front of it: stem, pooling and two groups, or one group; each halves, rounding up.
    return 2**4 + 1 if family == "imagenet" else 2 + 1


def check_widths(family: str, widths: Sequence[int]) -> None:
    """Raise ValueError unless there is a width for each group and none is smaller than the one before."""
    num_groups = 4 if family == "imagenet" else 3
    if len(widths) != num_groups or list(widths) != sorted(widths) or min(widths) < 1:
        raise ValueError(f"expected {num_groups} positive widths, never falling, got {list(widths)}")


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Channels and stride of one block. width: of its 3x3 convolutions."""

    in_channels: int
    width: int
    out_channels: int
    stride: int  # 2 in the first block of a group but the first: a transitional block

    @property
    def is_bottleneck(self) -> bool:
        """1x1-3x3-1x1 in place of two 3x3 convolutions."""
        return self.out_channels != self.width


def block_shapes(family: str, depth: int, widths: Sequence[int]) -> list[BlockShape]:
    """The blocks in order, l = 1..L. Raises ValueError if the family has no such depth."""
    expansion = _EXPANSION if family == "imagenet" and depth >= _FIRST_BOTTLENECK_DEPTH else 1
    shapes: list[BlockShape] = []
    channels = widths[0]
    for group, num_blocks in enumerate(groups_of(family, depth)):
        for at in range(num_blocks):
            width, stride = widths[group], 2 if group > 0 and at == 0 else 1
            shapes.append(
                BlockShape(in_channels=channels, width=width, out_channels=width * expansion, stride=stride)
            )
            channels = width * expansion
    return shapes
