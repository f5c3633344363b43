"""Fold: the survival probabilities and BatchNorm go into the convolutions.

What remains of eq. (5), H_l = ReLU(p_l f_l(H_{l-1}) + id(H_{l-1})), is a plain network: in each branch
Conv-ReLU-Conv with biases, and no p_l. Behind a convolution W with bias 0, BatchNorm in eval mode gives
gamma / sqrt(var + eps) * (W x - mean) + beta, which is again a convolution; p_l scales the second one of the
branch, weight and bias.
"""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from sdpipe.network import NetworkConfig, ResidualBlock, ResNet, conv3x3, skip
from sdpipe.training.weights import Weights, load_weights, save_weights


class TestNetwork(nn.Module):
    """The deterministic full-depth network: convolutions, ReLU, additions, skips, head."""

    __test__ = False  # its name is the paper's, pytest shall not collect it

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv3x3(config.in_channels, config.widths[0], bias=True)
        self.branches = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    conv1=conv3x3(in_channels, out_channels, stride, bias=True),
                    relu=nn.ReLU(),
                    conv2=conv3x3(out_channels, out_channels, bias=True),
                )
            )
            for (in_channels, out_channels), stride in zip(
                config.block_channels, config.block_strides, strict=True
            )
        )
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K) of normalised images."""
        hidden_NCHW = F.relu(self.stem(images_NCHW))
        for branch, (_, out_channels), stride in zip(
            self.branches, self.config.block_channels, self.config.block_strides, strict=True
        ):
            hidden_NCHW = F.relu(branch(hidden_NCHW) + skip(hidden_NCHW, out_channels, stride))
        logits_NK: Tensor = self.head(hidden_NCHW.mean(dim=(2, 3)))
        return logits_NK


@torch.no_grad()
def fold(network: ResNet) -> TestNetwork:
    """The test network of a trained network, float64, eval mode; `network` is left as it is.

    Computed in float64, so that `fold(network).float()` is rounded once. Equals `network.double().eval()` to
    1e-12 of its logits.
    """
    trained = copy.deepcopy(network).double().eval()
    folded = TestNetwork(network.config).double().eval()
    _fold_into(folded.stem, trained.stem.conv, trained.stem.bn)
    for branch, block in zip(folded.branches, trained.blocks, strict=True):
        assert isinstance(block, ResidualBlock)
        _fold_into(branch.conv1, block.branch.conv1, block.branch.bn1)
        _fold_into(branch.conv2, block.branch.conv2, block.branch.bn2, scale=block.survival_prob)  # eq. (5)
    folded.head.load_state_dict(trained.head.state_dict())
    return folded


def _fold_into(target: Any, conv: Any, bn: Any, scale: float = 1.0) -> None:
    fused = fuse_conv_bn_eval(conv, bn)
    target.weight.copy_(scale * fused.weight)
    target.bias.copy_(scale * fused.bias)


def fold_weights(trained: Weights) -> Weights:
    """The folded weights, float32, with the same normalisation and description."""
    folded = fold(trained.build_network()).float()
    return Weights(info=trained.info, normalisation=trained.normalisation, state=folded.state_dict())


def build_test_network(folded: Weights) -> TestNetwork:
    """The test network of folded weights, float32, eval mode."""
    network = TestNetwork(folded.info.network)
    network.load_state_dict(folded.state)
    return network.eval()


def fold_file(weights_path: Path, folded_path: Path) -> None:
    """weights.safetensors to folded.safetensors. Raises ModelError if the first cannot be read."""
    save_weights(folded_path, fold_weights(load_weights(weights_path)))
