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

NUM_GROUPS = 3  # section 4: three groups of blocks, each with half the resolution of the one before
CONVS_PER_BLOCK = 2


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


def check_depth(depth: int) -> None:
    """Raise ValueError unless a depth is 6n + 2 with n >= 1."""
    if depth < 8 or (depth - 2) % (NUM_GROUPS * CONVS_PER_BLOCK):
        raise ValueError(f"expected a depth of 6n + 2 (8, 14, 20, ..., 56, 110, ...), got {depth}")


def check_widths(widths: Sequence[int]) -> None:
    """Raise ValueError unless there is a width for each group and none is smaller than the one before."""
    if len(widths) != NUM_GROUPS or list(widths) != sorted(widths) or min(widths) < 1:
        raise ValueError(f"expected {NUM_GROUPS} positive widths, never falling, got {list(widths)}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What decides a network's shape; a weights file carries it, so that it can be built again.

    depth: layers with weights, 6n + 2; widths: channels of the three groups; rule: `linear_decay` or
    `uniform`; p_L: survival probability of the last block, 1 for constant depth; in_channels: 1 or 3.
    """

    depth: int
    widths: tuple[int, ...]
    rule: str
    p_L: float
    in_channels: int
    num_classes: int

    def __post_init__(self) -> None:
        """Raise ValueError where no such network exists."""
        check_depth(self.depth)
        check_widths(self.widths)

    @property
    def blocks_per_group(self) -> int:
        """The paper's n, in depth = 6n + 2: the stem, 2 convolutions a block, the head."""
        return (self.depth - 2) // (NUM_GROUPS * CONVS_PER_BLOCK)

    @property
    def num_blocks(self) -> int:
        """The paper's L = 3n."""
        return NUM_GROUPS * self.blocks_per_group

    @property
    def survival_probs(self) -> tuple[float, ...]:
        """p_1..p_L."""
        return SURVIVAL_RULES[self.rule](self.num_blocks, self.p_L)

    @property
    def block_channels(self) -> list[tuple[int, int]]:
        """Channels (in, out) of each block; the first block of groups 2 and 3 is transitional."""
        outs = [width for width in self.widths for _ in range(self.blocks_per_group)]
        return list(zip([self.widths[0], *outs[:-1]], outs, strict=True))

    @property
    def block_strides(self) -> list[int]:
        """2 in the transitional blocks, else 1."""
        n = self.blocks_per_group
        return [2 if ell > 0 and ell % n == 0 else 1 for ell in range(self.num_blocks)]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1; a BatchNorm behind it makes a bias needless."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=bias)


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


class ResidualBlock(nn.Module):
    """One residual block, H_l = ReLU(b_l f_l(H_{l-1}) + id(H_{l-1})).

    `branch` is f_l: Conv-BN-ReLU-Conv-BN. ReLU stands behind the addition, outside f_l (code).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, survival_prob: float) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        self.survival_prob = survival_prob
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=conv3x3(in_channels, out_channels, stride),
                bn1=nn.BatchNorm2d(out_channels),
                relu=nn.ReLU(),
                conv2=conv3x3(out_channels, out_channels),
                bn2=nn.BatchNorm2d(out_channels),
            )
        )

    def forward(self, hidden_NCHW: Tensor, active: bool | None) -> Tensor:
        """`active` is b_l; None is the test network."""
        identity = skip(hidden_NCHW, self.out_channels, self.stride)
        if active is None:
            return F.relu(self.survival_prob * self.branch(hidden_NCHW) + identity)  # eq. (5)
        if not active:
            # eq. (3): nothing of the branch is computed, forward or backward. ReLU changes nothing, since
            # H_{l-1} >= 0 and so are its averages and the zero channels.
            return identity
        return F.relu(self.branch(hidden_NCHW) + identity)  # eq. (2) with b_l = 1


class ResNet(nn.Module):
    """The CIFAR-style residual network of section 4: stem, three groups of n blocks, pooling, linear head.

    A module in `train()` mode uses and updates batch statistics of the active blocks only; which blocks are
    active is the caller's to draw and pass.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Sequential(
            OrderedDict(conv=conv3x3(config.in_channels, width), bn=nn.BatchNorm2d(width), relu=nn.ReLU())
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(*channels, stride, survival_prob)
            for channels, stride, survival_prob in zip(
                config.block_channels, config.block_strides, config.survival_probs, strict=True
            )
        )
        self.head = nn.Linear(config.widths[-1], config.num_classes)

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
