"""From a data set to what a training reads: whether they fit together, the images, their normalisation."""

import numpy as np

from sdpipe.architecture import block_shapes, min_image_px
from sdpipe.data.augment import Normalisation, fit_normalisation
from sdpipe.data.split import split_validation
from sdpipe.data.store import DataSet
from sdpipe.errors import ConfigError, DataError
from sdpipe.training.compute import Compute
from sdpipe.training.config import RandomScaleCrop, TrainConfig
from sdpipe.training.decoding import FileImages
from sdpipe.training.draws import Draws
from sdpipe.training.images import ArrayImages, Images

STATISTICS_IMAGES = 5_000  # over which mean and deviation are taken where pictures are decoded for it
_STATISTICS_BATCH = 100
_RGB = 3
_SAFE_CHANNELS, _SAFE_PX = 16, 32


def check_fits(config: TrainConfig, dataset: DataSet, compute: Compute) -> None:
    """Raise ConfigError, naming the key, unless the data set's images can be trained on like this, here."""
    height, width, channels = dataset.image_shape_HWC
    smallest, least = min(height, width), min_image_px(config.family)
    if smallest < least:
        raise ConfigError(
            f"params.yaml: train.family: {config.family} needs images of at least {least} pixels a side, "
            f"{dataset.name} has {height} x {width}"
        )
    if compute.device.type == "cpu" and compute.precision == "fp32":
        _check_projections(config, max(height, width))
    if config.shift_px >= smallest:
        raise ConfigError(
            f"params.yaml: train.shift_px: expected less than the image size {smallest}, "
            f"got {config.shift_px}"
        )
    for key in ("colour_jitter", "lighting"):
        if getattr(config, key) and channels != _RGB:
            raise ConfigError(f"params.yaml: train.{key}: expected 0, since {dataset.name} has no colours")
    if config.crop is not None and isinstance(dataset.train_images, np.ndarray):
        raise ConfigError(
            f"params.yaml: train.crop: expected null, since the images of {dataset.name} are cut already; "
            "imagenet's stay in their files"
        )
    if isinstance(config.crop, RandomScaleCrop) and config.crop.shorter_side[0] < max(height, width):
        raise ConfigError(
            f"params.yaml: train.crop.shorter_side: expected at least the image size "
            f"{max(height, width)}, got {config.crop.shorter_side[0]:g}"
        )


def _check_projections(config: TrainConfig, side: int) -> None:
    """Raise ConfigError where oneDNN's gradient of a projection would write beyond its memory (PyTorch 2.14).

    So it does for strided 1x1 convolutions in fp32 with AVX-512 (2026-11-28): of fewer than 16 channels, on
    56 pixels a side or more; on 52 it was not seen to.
    """
    if config.skip in ("A", "plain"):
        return
    side = side // 4 if config.family == "imagenet" else side  # behind the stem
    for shape in block_shapes(config.family, config.depth, config.widths):
        if shape.stride != 1 and shape.in_channels < _SAFE_CHANNELS and side > _SAFE_PX:
            raise ConfigError(
                f"params.yaml: train.widths: skip {config.skip} on a processor in fp32 needs at least "
                f"{_SAFE_CHANNELS} channels where {side} pixels a side become fewer, or PyTorch writes "
                f"beyond its memory; got {shape.in_channels}"
            )
        side = -(-side // shape.stride)


def split(config: TrainConfig, dataset: DataSet) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, sorted) of the images to train on and of those to validate on.

    Raises DataError where the first are fewer than a batch, or none of a class, which could not be learned.
    """
    labels_N = dataset.train_labels_N
    train, validation = split_validation(labels_N, dataset.train_parts, config.validation, config.seed)
    if len(train) < config.batch_size:
        raise DataError(f"train.batch_size: {config.batch_size} images asked for, {len(train)} to train on")
    lost = np.setdiff1d(labels_N, labels_N[train])
    if len(lost):
        k = int(lost[0])
        if "validation" in dict(dataset.train_parts):
            raise DataError(
                f"{dataset.name}: no image of the class {dataset.class_names[k]} is left to train on, but "
                f"{np.count_nonzero(labels_N == k)} in the validation part"
            )
        raise DataError(
            f"train.validation: {config.validation} with train.seed {config.seed} takes all "
            f"{np.count_nonzero(labels_N == k)} training images of the class {dataset.class_names[k]}; "
            "expected some of each to train on: more images, another seed, or a validation part of its own"
        )
    return train, validation


def open_images(config: TrainConfig, dataset: DataSet, compute: Compute, workers: int | None) -> Images:
    """The training images. workers: processes that decode picture files; None: one a core."""
    images, labels_N = dataset.train_images, dataset.train_labels_N
    if isinstance(images, np.ndarray):
        return ArrayImages(images, labels_N, compute)
    return FileImages(images, labels_N, compute, crop=config.crop, seed=config.seed, workers=workers)


def fit_to(config: TrainConfig, dataset: DataSet, train_indices: np.ndarray, images: Images) -> Normalisation:
    """The normalisation of the training part; of pictures in files over so many of it as are decoded soon."""
    array_NHWC = dataset.train_images
    if isinstance(array_NHWC, np.ndarray):
        return fit_normalisation(array_NHWC, train_indices, config.normalisation)
    sample = Draws(config.seed).statistics_sample(len(train_indices), STATISTICS_IMAGES)
    batches = np.array_split(train_indices[sample], -(-len(sample) // _STATISTICS_BATCH))
    decoded_NHWC = np.empty((len(sample), *dataset.image_shape_HWC), dtype=np.uint8)
    start = 0
    for batch_NHWC, _ in images.batches(batches):  # copied, since each lies in /dev/shm while it is held
        decoded_NHWC[start : start + len(batch_NHWC)] = batch_NHWC.cpu().numpy()
        start += len(batch_NHWC)
    return fit_normalisation(decoded_NHWC, np.arange(len(decoded_NHWC)), config.normalisation)
