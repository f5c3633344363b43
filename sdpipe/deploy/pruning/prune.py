"""Prune: a family of smaller networks from one training, by the removal of blocks.

models/<run>/pruned/
    order.csv                the blocks, the one that goes first in front
    keep-N.safetensors       N blocks, re-calibrated, as a weights file: the reference of
    keep-N.onnx              the same, folded and exported
    prune.json               what was kept and chosen, and what it does on the validation part
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig, PruneConfig
from sdpipe.deploy.export import export_network
from sdpipe.deploy.files_of_run import PRUNED, WEIGHTS
from sdpipe.deploy.fold import fold_weights
from sdpipe.deploy.held_out import StoredImages, open_held_out
from sdpipe.deploy.pruning.recalibrate import (
    LabelledImages,
    Score,
    equal_batches,
    interpolated_scales,
    network_logits,
    recalibrate,
    score,
)
from sdpipe.deploy.pruning.worth import BlockWorth, order_blocks
from sdpipe.files import replacing_folder, write_json, write_records
from sdpipe.training.weights import ModelInfo, Weights, load_weights, save_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """The images that decide, all from the training part and the validation part, in memory."""

    statistics_batches: list[np.ndarray]  # training images, uint8 (N, H, W, C)
    chosen_on: LabelledImages  # validation images for order and scale
    validated: LabelledImages  # validation images for temperature and errors


def prune_run(folder: Path, dataset: DataSet, config: PruneConfig, export: ExportConfig) -> None:
    """Write models/<run>/pruned/. The same weights, settings and number of threads give the same bytes.

    Without skips (`plain`) nothing can be removed; the family is then empty, and prune.json says so.
    Raises ModelError if weights.safetensors cannot be read, DataError if it belongs to other data.
    """
    weights = load_weights(folder / WEIGHTS)
    material = open_material(weights.info, dataset, config)
    with replacing_folder(folder / PRUNED) as beside:
        if weights.info.network.skip == "plain":
            order, why_empty = [], "without skips no block can be removed"
        else:
            order, why_empty = order_blocks(weights, material.chosen_on, config.num_candidates), None
        write_records(beside / "order.csv", BlockWorth, order)
        num_blocks = weights.info.network.num_blocks
        counts = sorted({count_of(fraction, num_blocks) for fraction in config.keep}, reverse=True)
        ells = [worth.ell for worth in order]
        sizes = [
            write_size(beside, weights, ells, count, material, config, export) for count in counts if ells
        ]
        facts = {
            "fingerprint": weights.info.fingerprint,
            "num_blocks": num_blocks,
            "why_empty": why_empty,
            "num_ordered_on": len(material.chosen_on.labels_N),
            "num_validation": len(material.validated.labels_N),
            "num_statistics": sum(len(batch_NHWC) for batch_NHWC in material.statistics_batches),
            "all_blocks": _score_of(weights, material.validated),
            "sizes": sizes,
            "prune": config.model_dump(),
            "export": export.model_dump(),
        }
        write_json(beside / "prune.json", facts)


def count_of(fraction: float, num_blocks: int) -> int:
    """That share of the blocks, rounded half up; at least one is kept and one removed."""
    return min(max(math.floor(fraction * num_blocks + 0.5), 1), num_blocks - 1)


def open_material(info: ModelInfo, dataset: DataSet, config: PruneConfig) -> Material:
    """Draw the images. Raises DataError if the run was trained on other data."""
    trained, validated = open_held_out(info, dataset)
    statistics = trained.sample(config.num_statistics, config.seed)
    return Material(
        statistics_batches=equal_batches(statistics[:], config.statistics_batch),
        chosen_on=_labelled(validated.sample(config.num_order, config.seed)),
        validated=_labelled(validated.sample(config.num_validation, config.seed)),
    )


def _labelled(stored: StoredImages) -> LabelledImages:
    return LabelledImages(images_NHWC=stored[:], labels_N=stored.labels_N)


def write_size(
    folder: Path,
    weights: Weights,
    order: Sequence[int],
    count: int,
    material: Material,
    config: PruneConfig,
    export: ExportConfig,
) -> dict[str, Any]:
    """Write keep-<count>.safetensors and .onnx without the first blocks of `order`; what to say of them."""
    name, kept = f"keep-{count}", sorted(order[len(order) - count :])
    scales = interpolated_scales(weights.info.network.survival_probs, kept, 0.0)
    removed_only = replace(weights, info=replace(weights.info, scales=scales))
    found = recalibrate(
        weights,
        kept,
        scale_steps=config.scale_steps,
        statistics_batches=material.statistics_batches,
        chosen_on=material.chosen_on,
    )
    logits_NK = network_logits(found.weights, material.validated.images_NHWC)
    its_score = score(logits_NK, material.validated.labels_N)
    save_weights(folder / f"{name}.safetensors", found.weights)
    onnx_path = folder / f"{name}.onnx"
    folded = fold_weights(found.weights)
    export_network(folded, onnx_path, export, temperature=its_score.temperature, variant=name)
    return {
        "name": name,
        "kept": kept,
        "t": found.t,
        "scales": list(found.weights.info.scales),
        "removed_only": _score_of(removed_only, material.validated),
        "recalibrated": asdict(its_score),
        "scale_search": [{"t": t, **asdict(tried)} for t, tried in found.curve],
        "bytes": onnx_path.stat().st_size,
    }


def _score_of(weights: Weights, held: LabelledImages) -> dict[str, float]:
    its_score: Score = score(network_logits(weights, held.images_NHWC), held.labels_N)
    return asdict(its_score)
