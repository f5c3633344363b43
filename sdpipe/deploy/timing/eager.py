"""PyTorch eager as a contender: the un-folded reference network, without what its test network lacks."""

from pathlib import Path

from torch import Tensor, nn

from sdpipe.deploy.proof.parity import Reference
from sdpipe.network import ResidualBlock
from sdpipe.runtime.benchmark import Contender
from sdpipe.segment import Active
from sdpipe.training.weights import load_weights


class _SkipOnly(nn.Module):
    """A removed block: its branch, which counts for nothing, is not computed either."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_NCHW: Tensor, _active: Active | None) -> Tensor:
        skipped: Tensor = self.block(hidden_NCHW, False)
        return skipped


def eager_contender(weights_path: Path) -> Contender:
    """The network of a weights file on the CPU, float32, normalisation included.

    It takes as many threads as torch.set_num_threads() said last. Raises ModelError if it cannot be read.
    """
    weights = load_weights(weights_path)
    reference = Reference(weights)
    blocks = reference.network.blocks
    for at, scale in enumerate(weights.info.scales):
        block = blocks[at]
        assert isinstance(block, ResidualBlock)
        if scale == 0:
            blocks[at] = _SkipOnly(block)
    height, width = weights.info.image_size
    return Contender(
        file=str(weights_path),
        engine="pytorch",
        image_shape=(height, width, weights.info.network.in_channels),
        run=reference,
    )
