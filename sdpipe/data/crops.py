"""Random boxes to cut out of training pictures. H, W: height and width in pixels."""

import numpy as np

from sdpipe.runtime.image import Box, centre_box

_ATTEMPTS = 10  # fb.resnet.torch, datasets/transforms.lua

Size = tuple[int, int]
"""Height and width."""


def random_size_box(
    picture_HW: Size,
    size_HW: Size,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> Box:
    """A box of random area and aspect ratio, both uniform; the centred one if ten of them do not fit.

    area: of the picture's; aspect: width over height, turned upright with probability 1/2.
    Source: fb.resnet.torch, datasets/transforms.lua, RandomSizedCrop.
    """
    height, width = picture_HW
    for _ in range(_ATTEMPTS):
        pixels = generator.uniform(*area) * height * width
        ratio = generator.uniform(*aspect)
        box_width, box_height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if generator.random() < 0.5:
            box_width, box_height = box_height, box_width
        if 1 <= box_width <= width and 1 <= box_height <= height:
            left = int(generator.integers(width - box_width, endpoint=True))
            top = int(generator.integers(height - box_height, endpoint=True))
            return (left, top, left + box_width, top + box_height)
    return centre_box(picture_HW, size_HW, 1.0)


def random_scale_box(
    picture_HW: Size, size_HW: Size, shorter_side: tuple[float, float], generator: np.random.Generator
) -> Box:
    """What a box of `size_HW` holds, anywhere in the picture once its shorter side is resized at random.

    shorter_side: pixels, at least those of `size_HW`; whole numbers, uniform. Source: ResNet section 3.4.
    """
    (picture_height, picture_width), (height, width) = picture_HW, size_HW
    side = int(generator.integers(round(shorter_side[0]), round(shorter_side[1]), endpoint=True))
    scale = min(picture_HW) / side
    box_width, box_height = min(width * scale, picture_width), min(height * scale, picture_height)
    left = generator.uniform(0, picture_width - box_width)
    top = generator.uniform(0, picture_height - box_height)
    # Rounding must not push an edge out of the picture.
    return (left, top, min(left + box_width, picture_width), min(top + box_height, picture_height))
