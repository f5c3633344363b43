import numpy as np
import pytest
import torch

from sdpipe.data.augment import fit_normalisation, shifted_pixels, take_pixels
from sdpipe.errors import DataError


def test_statistics_are_of_the_training_part_in_float64() -> None:
    """Against numpy in float64 over the chosen images only; float32 sums would be far off at this size.

    The deviation is that of the pixels as they are, as in the authors' code, not around the mean image.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(9_000, 6, 5, 3), dtype=np.uint8)
    images[:, :3] //= 4  # a mean image that is not grey
    chosen = np.arange(0, 9_000, 2)
    images[1::2] = 255  # must not be seen
    fitted = fit_normalisation(images, chosen, "pixel")
    mean = images[chosen].astype(np.float64).mean(axis=0)
    std = images[chosen].std(dtype=np.float64)
    np.testing.assert_allclose(fitted.mean_HWC.numpy(), mean, rtol=1e-6)
    assert fitted.std.item() == pytest.approx(std, rel=1e-6)
    normalised = fitted(torch.from_numpy(images[chosen])).double()
    assert normalised.mean().item() == pytest.approx(0, abs=1e-6)
    assert normalised.std(correction=0).item() == pytest.approx((images[chosen] - mean).std() / std, rel=1e-6)
    channels = fit_normalisation(images, chosen, "channel")
    np.testing.assert_allclose(channels.mean_HWC[0, 0].numpy(), mean.mean(axis=(0, 1)), rtol=1e-6)
    by_channel = images[chosen].std(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(channels.std[0, 0].numpy(), by_channel, rtol=1e-6)


def test_equal_images_are_refused() -> None:
    with pytest.raises(DataError, match="all training images are the same"):
        fit_normalisation(np.full((4, 3, 3, 1), 7, np.uint8), np.arange(4), "pixel")
    with pytest.raises(DataError, match="all training images are the same"):
        fit_normalisation(
            np.tile(np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1), (4, 1, 1, 1)), np.arange(4), "pixel"
        )


def shifted(image: np.ndarray, down: int, right: int, flip: bool) -> np.ndarray:
    """The oracle: pixel by pixel, zeros outside."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row - down, (width - 1 - column if flip else column) - right
            if 0 <= y < height and 0 <= x < width:
                out[row, column] = image[y, x]
    return out


def test_a_channel_of_one_value_is_named() -> None:
    """The images differ, so it is not they that are the same."""
    images_NHWC = np.random.default_rng(0).integers(256, size=(5, 4, 4, 3), dtype=np.uint8)
    images_NHWC[..., 2] = 7
    fit_normalisation(images_NHWC, np.arange(5), "pixel")
    with pytest.raises(DataError, match=r"train\.normalisation: channel 2 has one value"):
        fit_normalisation(images_NHWC, np.arange(5), "channel")


def test_shift_and_flip_against_a_loop_over_pixels() -> None:
    """The border is 0, after normalisation; a flip mirrors the shifted picture."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(40, 5, 7, 2)).astype(np.float32)
    shifts = rng.integers(-3, 4, size=(40, 2))
    flips = rng.random(40) < 0.5
    pixels = shifted_pixels(torch.from_numpy(shifts), torch.from_numpy(flips), (5, 7), 3)
    out = take_pixels(torch.from_numpy(images), pixels, 3)
    for at in range(40):
        np.testing.assert_array_equal(out[at].numpy(), shifted(images[at], *shifts[at], flips[at]))
