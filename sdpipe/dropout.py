"""Dropout whose masks have no state: each image's is a function of a key, drawn for it by the caller.

So an image's mask is the same whatever else is in the mini-batch, whichever process computes it and on which
device; PyTorch's own dropout draws one stream of numbers for the whole tensor, another one on each device.
"""

import torch
from torch import Tensor, nn

# Source: the 32-bit finaliser of Appleby's MurmurHash3, and the golden ratio's 32 bits. As signed numbers,
# which wrap around as the unsigned ones do: PyTorch multiplies no unsigned ones.
_GOLDEN = 0x9E3779B9 - 2**32
_FIRST, _SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


class Dropout(nn.Module):
    """Zeroes each number of an image in training, by a mask that is a function of the image's key."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.keys_N: Tensor | None = None
        """int32, one for each image, on its device; set anew before each forward pass."""

    def forward(self, hidden_NCHW: Tensor) -> Tensor:
        """In training, zero each number with `drop_prob` and divide the rest by what is kept."""
        if not self.training:
            return hidden_NCHW
        assert self.keys_N is not None
        assert len(self.keys_N) == len(hidden_NCHW)
        keep_prob = 1 - self.drop_prob
        num_dropped = min(round(self.drop_prob * 2**32), 2**32 - 1)  # of all hashes
        kept_NCHW = hashes(self.keys_N, hidden_NCHW.shape[1:]) >= num_dropped - 2**31
        return hidden_NCHW * kept_NCHW / keep_prob


def hashes(keys_N: Tensor, shape_CHW: torch.Size) -> Tensor:
    """Numbers that look drawn uniformly from all of int32, shape (N, C, H, W), laid out channels-last."""
    channels, height, width = shape_CHW
    places = torch.arange(height * width * channels, dtype=torch.int32, device=keys_N.device)
    places_CHW = places.mul_(_GOLDEN).view(height, width, channels).permute(2, 0, 1)
    mixed = places_CHW + keys_N.view(-1, 1, 1, 1)
    # The shifts keep the sign, so its copies are masked out. The finaliser's last step changes low bits only.
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    mixed *= _FIRST
    mixed ^= (mixed >> 13).bitwise_and_(0x7FFFF)
    mixed *= _SECOND
    return mixed
