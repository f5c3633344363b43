"""Fold: the survival probabilities and BatchNorm go into the convolutions.

What remains of eq. (5), H_l = ReLU(p_l f_l(H_{l-1}) + id(H_{l-1})), is a plain network: in each branch
convolutions with biases and ReLU between them, and no p_l. Behind a convolution W with bias 0, BatchNorm in
eval mode gives gamma / sqrt(var + eps) * (W x - mean) + beta, which is again a convolution; p_l scales the
last one of the branch, weight and bias. A learned skip is folded likewise, without p_l. A block whose scale
is 0 was removed: only its skip remains.
"""

import copy
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from sdpipe.dropout import Dropout
from sdpipe.network import ResidualBlock, ResNet
from sdpipe.training.weights import Weights, load_weights, new_network, save_weights


class TestNetwork(nn.Module):
    """The deterministic full-depth network: convolutions, ReLU, additions, skips, head.

    Its blocks are those of `ResNet` without BatchNorm and dropout, with b_l = 1; with b_l = 0 and without a
    branch where the block was removed.
    """

    __test__ = False  # its name is the paper's, pytest shall not collect it

    def __init__(self, network: ResNet) -> None:
        """network: in eval mode, with the survival probabilities in its weights; it is taken apart."""
        super().__init__()
        self.network = network
        self.active = [block.survival_prob != 0 for block in network.blocks]
        network.stem = _fused(network.stem)
        for block, is_active in zip(network.blocks, self.active, strict=True):
            assert isinstance(block, ResidualBlock)
            block.branch = _fused(block.branch) if is_active else nn.Sequential()
            if block.projection is not None:
                block.projection = _fused(block.projection)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K) of normalised images."""
        logits_NK: Tensor = self.network(images_NCHW, self.active)
        return logits_NK


def _fused(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, with each BatchNorm in the convolution before it, and no dropout."""
    fused: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in layers.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            last, conv = next(reversed(fused.items()))
            assert isinstance(conv, nn.Conv2d)
            fused[last] = fuse_conv_bn_eval(conv, layer)
        elif not isinstance(layer, Dropout):
            fused[name] = layer
    return nn.Sequential(fused).eval()


@torch.no_grad()
def fold(network: ResNet) -> TestNetwork:
    """The test network of a trained network, float64, eval mode; `network` is left as it is.

    Computed in float64, so that `fold(network).float()` is rounded once. Equals `network.double().eval()` to
    1e-12 of its logits.
    """
    trained = copy.deepcopy(network).double().eval()
    for block in trained.blocks:
        assert isinstance(block, ResidualBlock)
        *_, last_norm = block.branch.children()
        assert isinstance(last_norm, nn.BatchNorm2d)
        last_norm.weight.mul_(block.survival_prob)  # eq. (5)
        last_norm.bias.mul_(block.survival_prob)
    return TestNetwork(trained)


def fold_weights(trained: Weights) -> Weights:
    """The folded weights, float32, with the same normalisation and description."""
    folded = fold(trained.build_network()).float()
    return Weights(info=trained.info, normalisation=trained.normalisation, state=folded.state_dict())


def build_test_network(folded: Weights) -> TestNetwork:
    """The test network of folded weights, float32, eval mode."""
    network = TestNetwork(new_network(folded.info).eval())
    network.load_state_dict(folded.state)
    return network.eval()


def fold_file(weights_path: Path, folded_path: Path) -> None:
    """weights.safetensors to folded.safetensors. Raises ModelError if the first cannot be read."""
    save_weights(folded_path, fold_weights(load_weights(weights_path)))
