"""The implicit ensemble (section 3): the test network stands for the average of the 2^L sub-networks.

That is checked by averaging the softmax of M sub-networks drawn as in training. N: images, K: classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import error_fraction
from sdpipe.deploy.files_of_run import WEIGHTS
from sdpipe.deploy.held_out import check_data
from sdpipe.errors import ModelError
from sdpipe.files import write_csv
from sdpipe.runtime.uncertainty import draw_members
from sdpipe.training.compute import choose_compute
from sdpipe.training.images import ArrayImages
from sdpipe.training.weights import Weights, load_weights

BATCH = 500  # images; only memory and speed depend on it
COLUMNS = (
    "fingerprint", "members", "seed",
    "ensemble_error", "test_network_error", "ensemble_nll", "test_network_nll",
)  # fmt: skip


@torch.inference_mode()
def ensemble_probabilities(
    weights: Weights, images_NHWC: np.ndarray, members: Sequence[int], seed: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Probabilities, float64 (N, K), of the test network, and of the averages of the first M sub-networks.

    members: each M. A sub-network has its active blocks' branches unscaled (eq. 2) and BatchNorm's running
    statistics; the device is that of a training.
    """
    compute = choose_compute("auto", "fp32")
    network = weights.build_network()
    compute.place(network)
    normalise = weights.normalisation.to(compute.device)
    images = ArrayImages(images_NHWC, np.zeros(len(images_NHWC), dtype=np.int64), compute)
    drawn = draw_members(weights.info.network.survival_probs, max(members), seed)
    num_classes = len(weights.info.class_names)
    tested_NK = np.empty((len(images_NHWC), num_classes))
    averaged = {count: np.empty_like(tested_NK) for count in members}
    for start in tqdm(range(0, len(images_NHWC), BATCH), desc="images", unit="batch", disable=None):
        rows = np.arange(start, min(start + BATCH, len(images_NHWC)))
        batch_NCHW = normalise(images.take(rows)[0]).permute(0, 3, 1, 2)
        tested_NK[rows] = _softmax(network(batch_NCHW))
        total_NK = np.zeros((len(rows), num_classes))
        for number, active in enumerate(drawn, start=1):
            total_NK += _softmax(network(batch_NCHW, active))
            if number in averaged:
                averaged[number][rows] = total_NK / number
    return tested_NK, averaged


def _softmax(logits_NK: Tensor) -> np.ndarray:
    return np.asarray(logits_NK.double().softmax(dim=1).cpu().numpy())


def compare_ensemble(
    folder: Path, dataset: DataSet, members: Sequence[int], seed: int
) -> list[dict[str, float]]:
    """Write models/<run>/ensemble.csv: error and mean negative log-likelihood on the test part, a row an M.

    Raises ModelError if the run has no sub-networks but itself, DataError if it was trained on other data.
    """
    weights = load_weights(folder / WEIGHTS)
    info = weights.info
    if info.network.p_L == 1:
        raise ModelError(f"{folder}: constant depth has no sub-networks; expected p_L below 1, got 1")
    check_data(info, dataset)
    tested_NK, averaged = ensemble_probabilities(weights, dataset.test_images_NHWC, members, seed)
    labels_N = dataset.test_labels_N
    rows = [
        {
            "members": count,
            "seed": seed,
            "ensemble_error": error_fraction(averaged[count], labels_N),
            "test_network_error": error_fraction(tested_NK, labels_N),
            "ensemble_nll": _nll(averaged[count], labels_N),
            "test_network_nll": _nll(tested_NK, labels_N),
        }
        for count in members
    ]
    cells = [{"fingerprint": info.fingerprint, **row} for row in rows]
    write_csv(folder / "ensemble.csv", COLUMNS, [[row[column] for column in COLUMNS] for row in cells])
    return rows


def _nll(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> float:
    true_N = probabilities_NK[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(true_N, np.finfo(np.float64).tiny)).mean())
