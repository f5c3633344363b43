"""The images that a deployment's choices are made on, told by the run's seed and by the choice's own."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ALONE, CPU, make_weights, train_config
from pruned_runs import CONFIG, belonging_to

from sdpipe.data.store import DataSet
from sdpipe.deploy.held_out import StoredImages, open_held_out
from sdpipe.deploy.pruning.prune import open_material
from sdpipe.training.trainer import Trainer
from sdpipe.training.weights import ModelInfo


def trained_info(dataset: DataSet, seed: int) -> ModelInfo:
    info = belonging_to(make_weights(depth=8), dataset).info
    return replace(info, train_params={"validation": 0.2, "seed": seed})


@pytest.fixture
def stored(dataset: DataSet) -> StoredImages:
    return open_held_out(trained_info(dataset, 3), dataset)[0]


def test_no_choice_is_made_on_images_that_were_trained_on(dataset: DataSet) -> None:
    """With any seed the parts are those of the training; another seed splits otherwise."""
    splits = []
    for seed in (0, 3):
        trainer = Trainer(train_config(seed=seed), dataset, CPU, ALONE)
        trained, validated = open_held_out(trained_info(dataset, seed), dataset)
        np.testing.assert_array_equal(trained.indices, trainer.train_indices)
        np.testing.assert_array_equal(validated.indices, trainer.validation_indices)
        splits.append(validated.indices.tolist())
    assert splits[0] != splits[1]


def test_a_sample_is_told_by_its_seed(stored: StoredImages) -> None:
    """40 of 96, none twice, in their order, each with its label; all where there are no more."""
    sample = stored.sample(40, 3)
    assert len(set(sample.indices.tolist())) == 40
    assert set(sample.indices) < set(stored.indices)
    assert sample.indices.tolist() == sorted(sample.indices)
    np.testing.assert_array_equal(sample.labels_N, sample.indices % 3)  # as `make_dataset` has them
    assert stored.sample(40, 3).indices.tolist() == sample.indices.tolist()
    assert stored.sample(40, 4).indices.tolist() != sample.indices.tolist()
    np.testing.assert_array_equal(stored.sample(1000, 3).indices, stored.indices)


def test_prune_takes_the_images_of_its_seed(dataset: DataSet, stored: StoredImages) -> None:
    """64 training images for the statistics, 20 of 24 validation images to order the blocks by."""
    info = trained_info(dataset, 3)
    _, validated = open_held_out(info, dataset)
    for seed in (0, 3):
        material = open_material(info, dataset, CONFIG.model_copy(update={"seed": seed}))
        statistics_NHWC = np.concatenate(material.statistics_batches)
        np.testing.assert_array_equal(statistics_NHWC, stored.sample(64, seed)[:])
        np.testing.assert_array_equal(material.chosen_on.images_NHWC, validated.sample(20, seed)[:])
        np.testing.assert_array_equal(material.validated.images_NHWC, validated[:])
