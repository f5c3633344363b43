"""Error and loss of the test network on stored images."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sdpipe.data.augment import Normalisation
from sdpipe.errors import LoadingError
from sdpipe.network import ResNet
from sdpipe.training.images import Images, agree_on
from sdpipe.training.world import World

EVALUATION_BATCH = 500  # images at most; only memory and speed depend on these two
EVALUATION_PIXELS = 5_000_000  # of all images of a batch


@torch.no_grad()
def error_and_loss(
    network: ResNet,
    images: Images,
    indices: np.ndarray,
    normalise: Normalisation,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Error fraction and mean cross-entropy of the test network (eq. 5) on the chosen images.

    Each image is counted once, by one of the processes. Returns None when `stop` says so in between, which it
    may only where there is one process. Raises LoadingError, in all processes, if one lacks its images.
    """
    network.eval()
    batch_size = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // images.num_pixels))
    starts = range(0, len(indices), batch_size)[world.rank :: world.size]
    sums = torch.zeros(2, dtype=torch.float64, device=next(network.parameters()).device)
    failure = None
    try:
        for batch_NHWC, labels_N in images.batches([indices[start : start + batch_size] for start in starts]):
            if stop():
                return None
            logits_NK = network(normalise(batch_NHWC).permute(0, 3, 1, 2)).float()
            sums[0] += (logits_NK.argmax(dim=1) != labels_N).sum()
            sums[1] += F.cross_entropy(logits_NK, labels_N, reduction="sum")
    except LoadingError as error:
        failure = error
    world.wait()  # some have a batch more than others
    agree_on(failure, world)
    world.sum_(sums)
    num_wrong, loss_sum = sums.tolist()
    return num_wrong / len(indices), loss_sum / len(indices)
