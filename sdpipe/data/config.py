"""The section `fetch` of params.yaml: one entry for each data set that can be fetched."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator

from sdpipe.config import Fraction, Section, Seed
from sdpipe.errors import ConfigError, without_passwords
from sdpipe.files import local_path, project_root

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""64 lower-case hexadecimal digits."""


def _check_source(source: str) -> str:
    expected = "expected an address with http or https, or a path"
    if "\0" in source:
        raise ValueError(f"{expected}; got a NUL in it")
    try:
        scheme = urlsplit(source).scheme
        if scheme not in ("http", "https"):
            Path(source).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{expected}; got {without_passwords(source)!r}: {error}") from error
    if "://" in source and scheme not in ("http", "https"):
        raise ValueError(f"{expected}; got {without_passwords(source)!r}")
    return source


Source = Annotated[str, Field(min_length=1), AfterValidator(_check_source)]
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


def check_apart(dataset: str, config: Section) -> None:
    """Raise ConfigError if a fetch would delete its own source, or read its own output.

    data/<dataset>/ is emptied before each fetch, by DVC too, so nobody's files may lie in it.
    """
    source: str | None = getattr(config, "source", None)
    if source is None or urlsplit(source).scheme in ("http", "https"):
        return
    place = Path(os.path.realpath(local_path(source)))  # resolve() raises at a link in a circle
    reads_tree = isinstance(config, ImageFolderConfig | ImageNetConfig)
    for root in (project_root(), Path.cwd()):  # another folder where `dvc exp` runs a stage in a copy
        folder = (root / "data" / dataset).resolve()
        if place.is_relative_to(folder):
            raise ConfigError(
                f"params.yaml: fetch.{dataset}.source: {source} lies in data/{dataset}, which is emptied "
                "before each fetch; move it to another place"
            )
        if reads_tree and folder.is_relative_to(place):
            raise ConfigError(
                f"params.yaml: fetch.{dataset}.source: {source} holds data/{dataset}, which a fetch writes; "
                "expected a folder with nothing but pictures"
            )


def dataset_name(field: str) -> str:
    """The data set, as it is called in params.yaml and in data/, that a field of `FetchConfig` is of."""
    return field.replace("_", "-")


class FetchConfig(Section):
    """All of `fetch`; each stage fetch@<dataset> reads its own entry only."""

    model_config = ConfigDict(alias_generator=dataset_name)

    digits: DigitsConfig
    fashion_mnist: ArchiveConfig
    cifar10: ArchiveConfig
    cifar100: ArchiveConfig
    svhn: ArchiveConfig
    imagefolder: ImageFolderConfig
    imagenet: ImageNetConfig
    digit_pictures: DigitPicturesConfig


DATASET_SECTIONS: dict[str, Any] = {
    dataset_name(name): field.annotation for name, field in FetchConfig.model_fields.items()
}
"""The section of each data set."""
