"""A run with a family of shallower networks, small enough to be made in seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import export_to, make_weights, random_images

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig, PruneConfig
from sdpipe.deploy.proof.parity import Reference
from sdpipe.deploy.pruning.prune import prune_run
from sdpipe.deploy.pruning.recalibrate import LabelledImages
from sdpipe.training.weights import Weights, save_weights

EXPORT = ExportConfig(opset=19)  # neither that of params.yaml nor PyTorch's own


CONFIG = PruneConfig(
    keep=(0.8, 0.5),
    num_order=20,
    num_candidates=2,
    num_validation=1000,
    num_statistics=64,
    statistics_batch=16,
    scale_steps=(0.0, 0.5, 1.0),
    seed=0,
)


def belonging_to(weights: Weights, dataset: DataSet) -> Weights:
    """As if trained on this data set."""
    params = {"validation": 0.2, "seed": 0}
    info = replace(weights.info, dataset_digest=dataset.digest, train_params=params)
    return replace(weights, info=info)


def with_own_labels(weights: Weights) -> tuple[Weights, LabelledImages]:
    """Random images, and what the network takes them for: every block that does something has a worth.

    Its head is changed so that all classes occur: logits of mean 0 and deviation 3.
    """
    images_NHWC = random_images(60, seed=5)
    logits_NK = torch.from_numpy(Reference(weights).logits(images_NHWC))
    weight, bias = weights.state["head.weight"], weights.state["head.bias"]
    factor_K = 3 / logits_NK.std(dim=0)
    head = {
        "head.weight": weight * factor_K[:, None],
        "head.bias": (bias - logits_NK.mean(dim=0)) * factor_K,
    }
    weights = replace(weights, state=weights.state | head)
    labels_N = Reference(weights).logits(images_NHWC).argmax(axis=1)
    assert np.bincount(labels_N).min() > 5
    return weights, LabelledImages(images_NHWC=images_NHWC, labels_N=labels_N)


class Untouchable:
    """In place of the test part."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the test part was read: {name}")

    def __getitem__(self, wanted: object) -> object:
        raise AssertionError("the test part was read")

    def __len__(self) -> int:
        raise AssertionError("the test part was read")


def make_pruned_run(folder: Path, dataset: DataSet) -> Path:
    """A pruned run of 14 layers, 6 blocks, made without its test part."""
    weights = belonging_to(make_weights(depth=14), dataset)
    save_weights(folder / "weights.safetensors", weights)
    export_to(folder / "model.onnx", weights)
    blind = replace(dataset, test_images_NHWC=Untouchable(), test_labels_N=Untouchable())
    prune_run(folder, blind, CONFIG, EXPORT)
    return folder
