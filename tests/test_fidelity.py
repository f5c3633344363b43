"""What the paper fixes and a training must not get wrong, seen in a whole Trainer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, CPU, train_config
from test_augment import shifted

from sdpipe.data.store import DataSet
from sdpipe.training.draws import Draws
from sdpipe.training.trainer import Trainer


def test_the_mean_image_is_that_of_the_training_part(dataset: DataSet) -> None:
    """24 validation images are made white, 255; the mean of the other 96 does not move."""
    config = train_config()
    held_out = Trainer(config, dataset, CPU, ALONE).validation_indices
    images_NHWC = np.array(dataset.train_images)
    images_NHWC[held_out] = 255
    trainer = Trainer(config, replace(dataset, train_images=images_NHWC), CPU, ALONE)
    np.testing.assert_array_equal(trainer.validation_indices, held_out)
    kept_NHWC = np.delete(images_NHWC, held_out, axis=0).astype(np.float64)
    mean_HWC = kept_NHWC.mean(axis=0)
    np.testing.assert_allclose(trainer.normalisation.mean_HWC.numpy(), mean_HWC, rtol=1e-6)
    np.testing.assert_allclose(trainer.normalisation.std.item(), kept_NHWC.std(), rtol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift_px", [0, 2])
def test_a_batch_is_padded_after_normalisation(dataset: DataSet, shift_px: int, flip: bool) -> None:
    """Each image is (x - mean) / std first and shifted then: zeros move in, which is the mean image.

    Shifted, mirrored, both or neither, as the configuration says.
    """
    config = train_config(shift_px=shift_px, flip=flip, seed=3)
    trainer = Trainer(config, dataset, CPU, ALONE)
    draws, num = Draws(3), len(trainer.train_indices)
    order = draws.order(0, num)[: config.batch_size]
    shifts, flips = draws.shifts(0, num, shift_px)[order], draws.flips(0, num)[order] & flip
    assert (np.abs(shifts).max(), flips.any()) == (shift_px, flip)
    ((images_NCHW, labels_N),) = next(trainer.batches.epoch(0, range(1), trainer.step.parts))
    chosen = trainer.train_indices[order]
    np.testing.assert_array_equal(labels_N.numpy(), dataset.train_labels_N[chosen])
    mean_HWC, std = trainer.normalisation.mean_HWC.numpy(), trainer.normalisation.std.numpy()
    for at, number in enumerate(chosen):
        normalised_HWC = (dataset.train_images[number].astype(np.float32) - mean_HWC) / std
        expected_HWC = shifted(normalised_HWC, *shifts[at], flips[at])
        np.testing.assert_allclose(images_NCHW[at].permute(1, 2, 0).numpy(), expected_HWC, atol=1e-6)


def test_the_test_error_is_not_that_of_the_last_epoch(dataset: DataSet) -> None:
    """The third epoch's network names one class for all, 2/3 wrong; the second epoch's error is reported."""
    trainer = Trainer(train_config(epochs=3, p_L=1.0), dataset, CPU, ALONE)
    for _ in range(2):
        for _ in trainer.steps():
            pass
        trainer.validate()
    kept = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    for _ in trainer.steps():
        pass
    with torch.no_grad():
        trainer.network.head.weight.zero_()
        trainer.network.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    trainer.validate()
    first, second, third = (record.validation_error for record in trainer.progress.history)
    assert second <= first < third, "the oracle needs a second epoch that is best"
    result = trainer.finish()
    network = trainer.network
    network.load_state_dict(kept)
    network.eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(dataset.test_images_NHWC))
        predicted = network(trainer.normalise(pixels).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    assert result.test_error == np.mean(predicted != dataset.test_labels_N)
    assert result.test_error < 2 / 3
