"""Random crops and colours of pictures against torchvision's and the papers'."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, train_config
from picture_files import AUGMENTED, make_pictures
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sdpipe.data.augment import jitter_colours, light
from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.runtime.image import decode
from sdpipe.training.draws import Draws
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


def test_resize_and_centre_crop_are_torchvisions() -> None:
    """450 x 300 to 384 x 256, centre of 224: the same pixels, but for one of 255 by rounding."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    picture = coarse.resize((450, 300), Image.Resampling.BICUBIC)
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(picture)
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    ours = decode(raw.getvalue(), 3, (224, 224), 224 / 256)
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def assert_anywhere(boxes: np.ndarray, picture_WH: tuple[int, int]) -> None:
    """Each edge in what the box leaves of the picture: uniform, so of mean 1/2 and deviation 1 / sqrt(12)."""
    for edge, length in enumerate(picture_WH):
        room = length - (boxes[:, edge + 2] - boxes[:, edge])
        shares = boxes[room > 50, edge] / room[room > 50]
        assert shares.mean() == pytest.approx(0.5, abs=0.02)
        assert shares.std() == pytest.approx(12**-0.5, rel=0.03)
        assert shares.min() < 0.01
        assert shares.max() > 0.99


def test_random_size_boxes_have_the_asked_area_and_aspect() -> None:
    """10,000 boxes of a 300 x 400 picture, and their edges; a square always fits into a square, so there the
    mean area is (0.08 + 1) / 2, with a standard error of 0.92 / sqrt(12 * 10,000) = 0.0027."""
    rng = np.random.default_rng(1)
    boxes = [random_size_box((300, 400), (224, 224), (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(10_000)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    assert_anywhere(np.array(boxes), (400, 300))
    area = (right - left) * (bottom - top) / (300 * 400)
    aspect = (right - left) / (bottom - top)
    assert 0.079 < area.min() < 0.09
    assert 0.95 < area.max() < 1.01
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    squares = [random_size_box((500, 500), (224, 224), (0.08, 1.0), (1.0, 1.0), rng) for _ in range(10_000)]
    shares = [(box[2] - box[0]) ** 2 / 500**2 for box in squares]
    assert np.mean(shares) == pytest.approx(0.54, abs=4 * 0.0027)


def test_random_size_boxes_lie_and_stand_equally_often() -> None:
    """Aspect 2, in a picture where both fit: 4,000 boxes, half of them upright, within 4 standard errors."""
    rng = np.random.default_rng(5)
    boxes = np.array([random_size_box((300, 300), (8, 8), (0.1, 0.2), (2.0, 2.0), rng) for _ in range(4_000)])
    aspect = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert set(np.round(aspect, 1)) == {0.5, 2.0}
    assert (aspect > 1).mean() == pytest.approx(0.5, abs=4 * 0.5 / 4_000**0.5)


def test_a_box_that_never_fits_is_the_centre() -> None:
    """No box of all of a 10 x 100 picture's area has a side ratio under 4 : 3."""
    generator = np.random.default_rng(0)
    assert random_size_box((10, 100), (8, 8), (1.0, 1.0), (1.0, 4 / 3), generator) == (45, 0, 55, 10)


def test_random_scale_boxes_are_224_pixels_of_the_resized_picture() -> None:
    """A 512 x 768 picture at shorter side 256 to 480: the box's side is 224 * 512 / s, from 239 to 448."""
    rng = np.random.default_rng(2)
    boxes = np.array([random_scale_box((512, 768), (224, 224), (256, 480), rng) for _ in range(5_000)])
    side = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_allclose(side, boxes[:, 3] - boxes[:, 1])
    assert side.min() == pytest.approx(224 * 512 / 480)
    assert side.max() == pytest.approx(224 * 512 / 256)
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 768
    assert boxes[:, 3].max() <= 512
    assert_anywhere(boxes, (768, 512))


def test_colour_jitter_is_torchvisions() -> None:
    """Each change alone and all in every order, against torchvision on values that it does not clamp."""
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.uniform(80, 150, (6, 5, 7, 3)).astype(np.float32))
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    weights = torch.from_numpy(rng.uniform(0.6, 1.4, (6, 3)).astype(np.float32))
    ours = jitter_colours(images, orders, weights)
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for image, order, weight, jittered in zip(images, orders, weights, ours, strict=True):
        theirs = image.permute(2, 0, 1) / 255
        for kind, factor in zip(order.tolist(), weight.tolist(), strict=True):
            theirs = changes[kind](theirs, factor)
        # torchvision's weight of red is 0.2989.
        torch.testing.assert_close(jittered.permute(2, 0, 1) / 255, theirs, atol=2e-4, rtol=0)


def test_lighting_moves_along_imagenets_colours() -> None:
    """alpha (1, 0, 0): 255 * 0.2175 = 55.4625 times the first vector; (0, 0, 2): 2.295 times the third."""
    images = torch.full((2, 2, 3, 3), 100.0)
    lit = light(images, torch.tensor([[1.0, 0, 0], [0, 0, 2.0]])) - 100
    torch.testing.assert_close(lit[0, 1, 2], torch.tensor([-31.47497, -32.21262, -32.36792]))
    torch.testing.assert_close(lit[1, 0, 0], torch.tensor([0.920066, -1.868130, 0.964589]), atol=1e-5, rtol=0)
    assert (lit[0] == lit[0, 0, 0]).all()


def test_colours_are_drawn_in_the_range_that_is_asked_for() -> None:
    """Weights uniform in [0.6, 1.4], the six orders equally often; lighting deviates by 0.1."""
    draws, num = Draws(0), 30_000
    order_N3, weights_N3 = draws.jitter(1, num, 0.4)
    assert 0.6 <= weights_N3.min() < 0.601
    assert 1.399 < weights_N3.max() <= 1.4
    assert weights_N3.std(axis=0) == pytest.approx(0.8 / np.sqrt(12), rel=0.02)
    counts = np.unique(order_N3, axis=0, return_counts=True)[1]
    assert counts == pytest.approx([num / 6] * 6, rel=0.06)  # a deviation is 1.3 %
    alphas_N3 = draws.lighting(1, num, 0.1)
    assert alphas_N3.std(axis=0) == pytest.approx(0.1, rel=0.02)
    assert alphas_N3.mean(axis=0) == pytest.approx(0, abs=0.003)
    assert not np.array_equal(alphas_N3, draws.lighting(2, num, 0.1))


@pytest.mark.parametrize(("jitter", "lighting"), [(0.4, 0.0), (0.0, 0.1), (0.4, 0.1)])
def test_a_batch_is_jittered_lit_and_then_normalised(tmp_path: Path, jitter: float, lighting: float) -> None:
    """In that order, each image by the draws of its own number."""
    pictures = make_pictures(tmp_path)
    colours = {"colour_jitter": jitter, "lighting": lighting}
    config = train_config(**(AUGMENTED | {"crop": None, "flip": False, "shift_px": 0} | colours))
    trainer = Trainer(config, pictures, CPU, World(0, 1, 0), workers=0)
    ((found_NCHW, _labels),) = next(iter(trainer.batches.epoch(1, range(1), [slice(0, 8)])))
    num = len(trainer.train_indices)
    of_images = Draws(config.seed).order(1, num)[:8]
    raw_NHWC, _ = next(iter(trainer.images.batches([trainer.train_indices[of_images]])))
    colours_NHWC = raw_NHWC.float()
    if jitter:
        order_N3, weights_N3 = (torch.from_numpy(each[of_images]) for each in Draws(0).jitter(1, num, 0.4))
        colours_NHWC = jitter_colours(colours_NHWC, order_N3, weights_N3)
    if lighting:
        colours_NHWC = light(colours_NHWC, torch.from_numpy(Draws(0).lighting(1, num, 0.1)[of_images]))
    plain_NHWC = (raw_NHWC - trainer.normalise.mean_HWC) / trainer.normalise.std
    expected_NHWC = (colours_NHWC - trainer.normalise.mean_HWC) / trainer.normalise.std
    assert not torch.allclose(expected_NHWC, plain_NHWC, atol=0.01)
    assert torch.allclose(found_NCHW, expected_NHWC.permute(0, 3, 1, 2), atol=1e-5)
