"""Pictures that changed in their folder, read again through DVC as the README says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline import call, copy_project

from sdpipe.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.long]


def write_class(folder: Path, num_pictures: int) -> None:
    folder.mkdir(parents=True)
    pixels_NHWC = np.random.default_rng(num_pictures).integers(0, 256, (num_pictures, 16, 16, 3), np.uint8)
    for at, pixels_HWC in enumerate(pixels_NHWC):
        Image.fromarray(pixels_HWC).save(folder / f"{at}.png")


def test_pictures_read_before_never_come_back(tmp_path: Path) -> None:
    """DVC's run cache knows a fetch by its params; what the folder held then is not what it holds now.

    Two sizes of image, the pictures changed between them, and the first size again.
    """
    project = copy_project(tmp_path / "project")
    pictures, params = tmp_path / "pictures", project / "params.yaml"
    for name in ("cat", "dog"):
        write_class(pictures / name, 12)

    def fetch(side: int, *options: str) -> list[str]:
        text = original
        for old, new in (
            ("dataset: digits\n", "dataset: imagefolder\n"),
            ("source: images ", f"source: {pictures} "),
            ("image_size: 32 ", f"image_size: {side} "),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        params.write_text(text)
        call(project, "dvc", "repro", *options, "fetch@imagefolder")
        return list(read_json(project / "data" / "imagefolder" / "meta.json")["class_names"])

    original = params.read_text()
    assert fetch(16) == ["cat", "dog"]
    assert fetch(24) == ["cat", "dog"]
    (pictures / "dog").rename(pictures / "eel")
    assert fetch(16, "-f") == ["cat", "eel"]
    assert fetch(24) == ["cat", "eel"]
