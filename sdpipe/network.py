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

from sdpipe.architecture import BlockShape, block_shapes, check_widths, groups_of
from sdpipe.dropout import Dropout
from sdpipe.segment import Active, Segment


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
SKIPS = ("A", "B", "C", "plain")


def expected_depth(survival_probs: Sequence[float]) -> float:
    """E(L~), the expected number of active blocks: the sum of p_l (section 3)."""
    return math.fsum(survival_probs)


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
        if self.skip not in SKIPS:
            raise ValueError(f"expected one of the skips {', '.join(SKIPS)}, got {self.skip!r}")
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
        return block_shapes(self.family, self.depth, self.widths)


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
            layers[f"relu{number}"] = nn.ReLU(inplace=True)
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

    def forward(self, hidden_NCHW: Tensor, active: Active | None) -> Tensor:
        """`active` is b_l, of the mini-batch or of each image; None is the test network."""
        if isinstance(active, Segment) and active.count < len(hidden_NCHW):
            return self._forward_segment(hidden_NCHW, active)
        if self.is_plain:
            return F.relu(self.branch(hidden_NCHW))
        identity = self.identity(hidden_NCHW)
        if active is None:
            return F.relu_(self.survival_prob * self.branch(hidden_NCHW) + identity)  # eq. (5)
        if active:
            return F.relu_(self.branch(hidden_NCHW) + identity)  # eq. (2) with b_l = 1
        # eq. (3): nothing of the branch is computed, forward or backward. Without a projection ReLU changes
        # nothing, since H_{l-1} >= 0 and so are its averages and the zero channels.
        return identity if self.projection is None else F.relu(identity)

    def identity(self, hidden_NCHW: Tensor) -> Tensor:
        """id(H), the skip."""
        if self.projection is not None:
            identity: Tensor = self.projection(hidden_NCHW)
            return identity
        return skip(hidden_NCHW, self.shape.out_channels, self.shape.stride)

    def _forward_segment(self, hidden_NCHW: Tensor, segment: Segment) -> Tensor:
        """Eq. (2) with a b_l for each image: the branch sees the active images only, BatchNorm included.

        Split and joined again, which is much cheaper than a gather: its backward pass is a copy.
        """
        sizes, are_active = segment.cut(len(hidden_NCHW))
        rows = torch.split(hidden_NCHW, sizes)
        active = join_rows(rows, are_active)
        identities, active_identity = rows, active
        identity_NCHW = self.identity(hidden_NCHW)
        if identity_NCHW is not hidden_NCHW:
            identities = torch.split(identity_NCHW, sizes)
            active_identity = join_rows(identities, are_active)
        if self.projection is not None:
            identities = tuple(map(F.relu, identities))  # eq. (3); else they are >= 0
        outputs = F.relu_(self.branch(active) + active_identity)
        active_sizes = [size for size, is_active in zip(sizes, are_active, strict=True) if is_active]
        output = iter(torch.split(outputs, active_sizes))
        return torch.cat(
            [next(output) if on else identity for identity, on in zip(identities, are_active, strict=True)]
        )


def join_rows(rows: Sequence[Tensor], are_wanted: Sequence[bool]) -> Tensor:
    """The wanted rows behind one another; a single one as it is, not copied."""
    wanted = [row for row, is_wanted in zip(rows, are_wanted, strict=True) if is_wanted]
    return wanted[0] if len(wanted) == 1 else torch.cat(wanted)


def _stem(config: NetworkConfig) -> nn.Sequential:
    """Conv3x3-BN-ReLU (section 4), or Conv7x7/2-BN-ReLU-MaxPool3x3/2 (ResNet, table 1)."""
    width, is_imagenet = config.widths[0], config.family == "imagenet"
    kernel, stride = (7, 2) if is_imagenet else (3, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=convolution(config.in_channels, width, kernel, stride),
        bn=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
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

    def forward(self, images_NCHW: Tensor, active: Sequence[Active] | None = None) -> Tensor:
        """Logits, shape (N, K), of normalised images.

        active: b_1..b_L, each of the whole mini-batch or of a segment of it; None: every block, scaled by its
        p_l, the test network (eq. 5).
        """
        switches: Sequence[Active | None] = [None] * len(self.blocks) if active is None else active
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
