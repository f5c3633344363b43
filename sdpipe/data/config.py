"""The section `fetch` of params.yaml: one entry for each data set that can be fetched."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdpipe.config import Fraction, Section, Seed

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""64 lower-case hexadecimal digits."""

Source = Annotated[str, Field(min_length=1)]
"""A URL (http, https), a file or a folder; relative paths start at the project's root."""


Pixels = Annotated[int, Field(ge=4, le=1024)]
"""A picture's side."""


class DigitsConfig(Section):
    """The 1,797 handwritten digits inside scikit-learn: 8 x 8, grey, no network needed."""

    test_fraction: Fraction
    seed: Seed  # of the stratified choice of test images


class ArchiveConfig(Section):
    """A published data set of one or more files."""

    source: Source  # a folder or a URL that holds the files; or the file, where it is one
    sha256: dict[str, Sha256]  # file name -> digest (fashion-mnist: of the unpacked bytes)


class ImageFolderConfig(Section):
    """A user's own pictures: `<split>/<class>/*` or `<class>/*`, as a folder or in a tar or zip archive."""

    source: Source
    sha256: Sha256 | None  # of the archive; null for a folder, or not to check
    image_size: Pixels  # height and width
    channels: Literal[1, 3]  # grey or RGB
    test_fraction: Fraction  # of each class, held out where the source has no test part
    seed: Seed  # of that choice


class _CutPictures(Section):
    """The shorter side is resized to `resize`, and the centre of `image_size` cut out; RGB."""

    image_size: Pixels  # height and width
    resize: Pixels  # at least image_size

    @field_validator("resize")
    @classmethod
    def _check_resize(cls, resize: int, info: ValidationInfo) -> int:
        if resize < info.data.get("image_size", 0):
            raise ValueError(f"expected at least the image_size {info.data['image_size']}, got {resize}")
        return resize


class ImageNetConfig(_CutPictures):
    """Pictures in ImageNet's layout, `train/<class>/*` and `val/<class>/*`, decoded while training."""

    source: Source  # a folder


class DigitPicturesConfig(_CutPictures):
    """The digits of scikit-learn as picture files, to try that path without a download."""

    test_fraction: Fraction
    seed: Seed  # of the stratified choice of test images


DATASET_SECTIONS: dict[str, type[Section]] = {
    "digits": DigitsConfig,
    "fashion-mnist": ArchiveConfig,
    "cifar10": ArchiveConfig,
    "cifar100": ArchiveConfig,
    "svhn": ArchiveConfig,
    "imagefolder": ImageFolderConfig,
    "imagenet": ImageNetConfig,
    "digit-pictures": DigitPicturesConfig,
}


class FetchConfig(Section):
    """All of `fetch`; each stage fetch@<dataset> reads its own entry only."""

    digits: DigitsConfig
    fashion_mnist: Annotated[ArchiveConfig, Field(alias="fashion-mnist")]
    cifar10: ArchiveConfig
    cifar100: ArchiveConfig
    svhn: ArchiveConfig
    imagefolder: ImageFolderConfig
    imagenet: ImageNetConfig
    digit_pictures: Annotated[DigitPicturesConfig, Field(alias="digit-pictures")]
