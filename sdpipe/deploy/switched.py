"""The sub-networks of eq. (2) as one network that takes its b_1..b_L as an input.

H_l = ReLU(b_l f_l(H_{l-1}) + id(H_{l-1})) is the sub-network of those b_l in {0, 1}, and at b_l = p_l the
test network (eq. 5). N: images, C: channels, H, W: height and width, K: classes, L: blocks.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpipe.deploy.fold import TestNetwork, fold_weights
from sdpipe.network import ResidualBlock
from sdpipe.training.weights import Weights


class SwitchedNetwork(nn.Module):
    """The blocks of a folded network whose branches are unscaled, each branch times its switch."""

    def __init__(self, folded: TestNetwork) -> None:
        """folded: what `fold_unscaled` makes, built."""
        super().__init__()
        self.network = folded.network

    def forward(self, images_NCHW: Tensor, switches_L: Tensor) -> Tensor:
        """Logits (N, K) of normalised images. Every branch is computed, also where its switch is 0."""
        hidden_NCHW = self.network.stem(images_NCHW)
        for block, switch in zip(self.network.blocks, torch.split(switches_L, 1), strict=True):
            assert isinstance(block, ResidualBlock)
            switched_NCHW = switch * block.branch(hidden_NCHW)
            if not block.is_plain:
                switched_NCHW = switched_NCHW + block.identity(hidden_NCHW)
            hidden_NCHW = F.relu(switched_NCHW)  # eq. (2)
        logits_NK: Tensor = self.network.head(hidden_NCHW.mean(dim=(2, 3)))
        return logits_NK


def fold_unscaled(trained: Weights) -> Weights:
    """The folded weights with BatchNorm's running statistics in the convolutions, and no p_l."""
    ones = (1.0,) * trained.info.network.num_blocks
    return fold_weights(replace(trained, info=replace(trained.info, scales=ones)))
