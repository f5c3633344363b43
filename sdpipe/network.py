"""Deep Networks with Stochastic Depth (Huang, Sun, Liu, Sedra, Weinberger, ECCV 2016, arXiv 1603.09382).

The paper in one file, in its order: the survival probabilities, the residual block, the network. Equation
numbers are the paper's. Where its text is silent, "code" means the authors' Torch 7 code,
yueatsprograms/Stochastic_Depth, and "ResNet" means He et al. 2015, arXiv 1512.03385.

N: images, C: channels, H, W: height and width, K: classes, L: residual blocks, l = 1..L.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Blocks in each group (ResNet, table 1). CIFAR-style nets have depth 6n + 2: three groups of n (section 4).
_IMAGENET_GROUPS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_EXPANSION = 4  # a bottleneck's output has four times the channels of its 3x3 convolution


def linear_decay(num_blocks: int, p_L: float) -> tuple[float, ...]:
    """Survival probabilities p_1..p_L that fall linearly from 1 (the input, l = 0) to p_L (eq. 4)."""
    return tuple(1 - ell / num_blocks * (1 - p_L) for ell in range(1, num_blocks + 1))  # eq. (4)


def uniform(num_blocks: int, p_L: float) -> tuple[float, ...]:
    """The same survival probability p_L for every block (section 3)."""
    return (p_L,) * num_blocks


SURVIVAL_RULES: dict[str, Callable[[int, float], tuple[float, ...]]] = {
    "linear_decay": linear_decay,
    "uniform": uniform,
}


def expected_depth(survival_probs: Sequence[float]) -> float:
    """E(L~), the expected number of active blocks: the sum of p_l (section 3)."""
    return math.fsum(survival_probs)


def groups_of(family: str, depth: int) -> tuple[int, ...]:
    """Residual blocks in each group. Raises ValueError if the family has no such depth."""
    if family == "imagenet":
        if depth not in _IMAGENET_GROUPS:
            raise ValueError(f"expected a depth of {', '.join(map(str, _IMAGENET_GROUPS))}, got {depth}")
        return _IMAGENET_GROUPS[depth]
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"expected a depth of 6n + 2 (8, 14, 20, ..., 56, 110, ...), got {depth}")
    return ((depth - 2) // 6,) * 3


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


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What decides a network's shape; a weights file carries it, so that it can be built again.

    family: `cifar` (depth 6n + 2, three groups) or `imagenet` (18, 34, 50, 101, 152; four groups); depth:
    layers with weights; widths: of the groups' 3x3 convolutions; skip: option A, B or C of ResNet section
    4.1, or `plain` for none; dropout: probability in the branches; rule: `linear_decay` or `uniform`; p_L:
    survival probability of the last block, 1 for constant depth; in_channels: 1 or 3.
    """

    family: str
    depth: int
    widths: tuple[int, ...]
    skip: str
    dropout: float
    rule: str
    p_L: float
    in_channels: int
    num_classes: int

    def __post_init__(self) -> None:
        """Raise ValueError where no such network exists."""
        groups_of(self.family, self.depth)
        check_widths(self.family, self.widths)
        if self.skip == "plain" and self.p_L != 1:
            raise ValueError(f"expected p_L 1 without skips, since no block can be skipped, got {self.p_L}")

    @property
    def num_blocks(self) -> int:
        """The paper's L."""
        return sum(groups_of(self.family, self.depth))

    @property
    def survival_probs(self) -> tuple[float, ...]:
        """p_1..p_L."""
        return SURVIVAL_RULES[self.rule](self.num_blocks, self.p_L)

    @property
    def block_shapes(self) -> list[BlockShape]:
        """The blocks in order, l = 1..L."""
        is_bottleneck = self.family == "imagenet" and self.depth >= 50
        expansion = _EXPANSION if is_bottleneck else 1
        shapes: list[BlockShape] = []
        channels = self.widths[0]
        for group, num_blocks in enumerate(groups_of(self.family, self.depth)):
            for at in range(num_blocks):
                width = self.widths[group]
                shapes.append(
                    BlockShape(
                        in_channels=channels,
                        width=width,
                        out_channels=width * expansion,
                        stride=2 if group > 0 and at == 0 else 1,
                    )
                )
                channels = width * expansion
        return shapes


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1; the BatchNorm behind it makes a bias needless."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False
    )


def skip(hidden_NCHW: Tensor, out_channels: int, stride: int) -> Tensor:
    """The identity path id(H). In a transitional block: average pooling, then zero channels (option A).

    At an odd size the last pooling window is cut at the border, so that (H, W) becomes the ceiling of
    (H/2, W/2), as the branch's padded convolution of stride 2 has it.
    """
    if stride != 1:
        hidden_NCHW = F.avg_pool2d(
            hidden_NCHW, kernel_size=stride, stride=stride, ceil_mode=True, count_include_pad=False
        )
    num_new = out_channels - hidden_NCHW.shape[1]
    return F.pad(hidden_NCHW, (0, 0, 0, 0, 0, num_new)) if num_new else hidden_NCHW


class Dropout(nn.Module):
    """Dropout whose mask is a function of `seed`, which the caller sets before each forward pass."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.seed = 0

    def forward(self, hidden_NCHW: Tensor) -> Tensor:
        """In training, zero each number with `drop_prob` and divide the rest by what is kept."""
        if not self.training:
            return hidden_NCHW
        generator = torch.Generator(hidden_NCHW.device).manual_seed(self.seed)
        keep_prob = 1 - self.drop_prob
        kept = torch.empty_like(hidden_NCHW).bernoulli_(keep_prob, generator=generator)
        return hidden_NCHW * kept / keep_prob


def _branch(shape: BlockShape, dropout: float) -> nn.Sequential:
    """f_l: Conv-BN-ReLU-Conv-BN, or the bottleneck 1x1-3x3-1x1; dropout stands before the last convolution.

    The stride is that of the 3x3 convolution (fb.resnet.torch, torchvision; ResNet had it in the first 1x1).
    """
    ins, width, outs, stride = shape.in_channels, shape.width, shape.out_channels, shape.stride
    if shape.is_bottleneck:
        convolutions = [
            convolution(ins, width, 1),
            convolution(width, width, 3, stride),
            convolution(width, outs, 1),
        ]
    else:
        convolutions = [convolution(ins, width, 3, stride), convolution(width, outs, 3)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, conv in enumerate(convolutions, start=1):
        is_last = number == len(convolutions)
        if is_last and dropout:
            layers["dropout"] = Dropout(dropout)
        layers[f"conv{number}"] = conv
        layers[f"bn{number}"] = nn.BatchNorm2d(conv.out_channels)
        if not is_last:
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


class ResidualBlock(nn.Module):
    """One residual block, H_l = ReLU(b_l f_l(H_{l-1}) + id(H_{l-1})).

    `branch` is f_l. ReLU stands behind the addition, outside f_l (code). `projection` is the learned skip of
    options B and C.
    """

    def __init__(self, shape: BlockShape, config: NetworkConfig, survival_prob: float) -> None:
        super().__init__()
        self.shape = shape
        self.survival_prob = survival_prob
        self.is_plain = config.skip == "plain"
        self.branch = _branch(shape, config.dropout)
        changes = shape.stride != 1 or shape.in_channels != shape.out_channels
        self.projection: nn.Sequential | None = None
        if config.skip == "C" or (config.skip == "B" and changes):
            conv = convolution(shape.in_channels, shape.out_channels, 1, shape.stride)
            self.projection = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(shape.out_channels)))

    def forward(self, hidden_NCHW: Tensor, active: bool | None) -> Tensor:
        """`active` is b_l; None is the test network."""
        if self.is_plain:
            return F.relu(self.branch(hidden_NCHW))
        if self.projection is not None:
            identity = self.projection(hidden_NCHW)
        else:
            identity = skip(hidden_NCHW, self.shape.out_channels, self.shape.stride)
        if active is None:
            return F.relu(self.survival_prob * self.branch(hidden_NCHW) + identity)  # eq. (5)
        if active:
            return F.relu(self.branch(hidden_NCHW) + identity)  # eq. (2) with b_l = 1
        # eq. (3): nothing of the branch is computed, forward or backward. Without a projection ReLU changes
        # nothing, since H_{l-1} >= 0 and so are its averages and the zero channels.
        return identity if self.projection is None else F.relu(identity)


def _stem(config: NetworkConfig) -> nn.Sequential:
    """Conv3x3-BN-ReLU (section 4), or Conv7x7/2-BN-ReLU-MaxPool3x3/2 (ResNet, table 1)."""
    width, is_imagenet = config.widths[0], config.family == "imagenet"
    kernel, stride = (7, 2) if is_imagenet else (3, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=convolution(config.in_channels, width, kernel, stride),
        bn=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
    )
    if is_imagenet:
        layers["pool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return nn.Sequential(layers)


class ResNet(nn.Module):
    """The residual network of section 4: stem, groups of blocks, global average pooling, linear head.

    A module in `train()` mode uses and updates batch statistics of the active blocks only; which blocks are
    active is the caller's to draw and pass.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config)
        shapes = config.block_shapes
        self.blocks = nn.ModuleList(
            ResidualBlock(shape, config, survival_prob)
            for shape, survival_prob in zip(shapes, config.survival_probs, strict=True)
        )
        self.head = nn.Linear(shapes[-1].out_channels, config.num_classes)

    def forward(self, images_NCHW: Tensor, active: Sequence[bool] | None = None) -> Tensor:
        """Logits, shape (N, K), of normalised images.

        active: b_1..b_L of this mini-batch; None: every block, scaled by its p_l, the test network (eq. 5).
        """
        switches: Sequence[bool | None] = [None] * len(self.blocks) if active is None else active
        hidden_NCHW = self.stem(images_NCHW)
        for block, is_active in zip(self.blocks, switches, strict=True):
            hidden_NCHW = block(hidden_NCHW, is_active)
        features_NC = hidden_NCHW.mean(dim=(2, 3))  # global average pooling
        logits_NK: Tensor = self.head(features_NC)
        return logits_NK


def initialise(network: ResNet, seed: int) -> None:
    """He normal initialisation (fan in, gain of ReLU), biases 0; BatchNorm starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
