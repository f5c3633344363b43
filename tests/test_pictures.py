"""Data sets whose pictures stay in their files, and trainings on them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import CLASS_NAMES, CPU, export_to, make_weights, train_config
from picture_files import (
    AUGMENTED,
    CROP,
    RESIZE,
    SIZE,
    fetch_pictures,
    files_of,
    make_pictures,
    write_pictures,
)
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sdpipe.data.config import DigitPicturesConfig
from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.data.fetch import fetch
from sdpipe.data.pictures import PictureFiles, make_table
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import ConfigError, DataError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.image import decode
from sdpipe.training.draws import Draws
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_statistics_are_of_the_training_part(pictures: DataSet) -> None:
    """Channel means and deviations over the decoded training part, in float64; validation is not in it."""
    trainer = Trainer(train_config(**AUGMENTED), pictures, CPU, World(0, 1, 0), workers=0)
    files = files_of(pictures)
    decoded = np.stack([files.read(number) for number in trainer.train_indices]).astype(np.float64)
    normalisation = trainer.normalisation
    assert normalisation.mean_HWC.shape == normalisation.std.shape == (1, 1, 3)
    np.testing.assert_allclose(normalisation.mean_HWC.flatten(), decoded.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(normalisation.std.flatten(), decoded.std(axis=(0, 1, 2)), rtol=1e-6)
    everything = np.stack([files.read(number) for number in range(len(files))])
    assert abs(everything.mean(axis=(0, 1, 2)) - normalisation.mean_HWC.flatten().numpy()).min() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"family": "imagenet", "depth": 18, "widths": [4, 4, 8, 8]}, "at least 17 pixels a side"),
        ({"crop": {"shorter_side": [SIZE - 1, 40]}}, f"at least the image size {SIZE}, got {SIZE - 1}"),
    ],
)
def test_trainings_that_do_not_fit_pictures(
    pictures: DataSet, overrides: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Trainer(train_config(**overrides), pictures, CPU, World(0, 1, 0))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"crop": CROP}, "train.crop: expected null, since the images of animals are cut already"),
        ({"lighting": 0.1}, "train.lighting: expected 0, since animals has no colours"),
        ({"colour_jitter": 0.4}, "train.colour_jitter: expected 0"),
        (
            {"shift_px": 10**9},
            "train.shift_px: expected less than the image size 9, got 1000000000",
        ),
    ],
)
def test_trainings_that_do_not_fit_arrays(dataset: DataSet, overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Trainer(train_config(**overrides), dataset, CPU, World(0, 1, 0))


def test_imagenets_validation_images_are_the_test_part(pictures: DataSet) -> None:
    """Unless there is a test folder: then each is what it is called."""
    assert (len(pictures.train_labels_N), len(pictures.test_labels_N)) == (90, 12)
    assert pictures.train_parts == (("train", 90),)
    assert pictures.test_images_NHWC.shape == (12, SIZE, SIZE, 3)


def test_test_pictures_are_cut_as_validation_pictures_are(pictures: DataSet) -> None:
    """The centre 12 / 16 of the shorter side, by Pillow; what the data set says of it goes into the file."""
    assert pictures.crop_fraction == SIZE / RESIZE
    paths = sorted((files_of(pictures).root / "val").rglob("*.png"))
    for path, found_HWC in zip(paths, pictures.test_images_NHWC, strict=True):
        picture = Image.open(path)
        side = min(picture.size) * SIZE / RESIZE
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        expected = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        np.testing.assert_array_equal(found_HWC, np.asarray(expected))


def test_a_test_folder_beside_the_validation_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all")
    for k in "rgb":
        (tmp_path / "all" / "test" / k).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "all" / "test" / k / "a.png")
    dataset = fetch_pictures(tmp_path / "all", tmp_path / "data")
    assert dataset.train_parts == (("train", 90), ("validation", 12))
    assert len(files_of(dataset)) == len(dataset.train_labels_N) == 102
    assert files_of(dataset).path(90) == tmp_path / "all" / "val" / "b" / "11.png"
    assert len(dataset.test_labels_N) == 3


def test_a_picture_that_grew_is_not_the_one_that_was_listed(tmp_path: Path) -> None:
    """By one byte, which a decoder does not mind."""
    path = tmp_path / "a.png"
    Image.new("RGB", (SIZE, SIZE)).save(path)
    table = make_table([path], tmp_path)
    pictures = PictureFiles(root=tmp_path, table=table, size_HW=(SIZE, SIZE), channels=3, crop_fraction=1.0)
    size = path.stat().st_size
    assert pictures.read(0).shape == (SIZE, SIZE, 3)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=rf"{path}: {size + 1} bytes, and {size} when it was listed"):
        pictures.read(0)


def test_trees_that_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all")
    (tmp_path / "all" / "train" / "r" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"r/0.png: the file is empty"):
        fetch_pictures(tmp_path / "all", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "all" / "val").rename(tmp_path / "val")
    with pytest.raises(DataError, match=r"all/val: no such folder; expected train and val"):
        fetch_pictures(tmp_path / "all", tmp_path / "data")
    with pytest.raises(DataError, match="no such folder"):
        fetch_pictures(tmp_path / "nothing", tmp_path / "data")
    with pytest.raises(DataError, match="expected a folder"):
        fetch_pictures(tmp_path / "all" / "train" / "r" / "3.png", tmp_path / "data")


def test_digits_as_pictures(tmp_path: Path) -> None:
    """1,437 and 360 digits by the seed; each file is the digit, enlarged, and may move with its folder."""
    config = DigitPicturesConfig(image_size=32, resize=36, test_fraction=0.2, seed=3)
    fetch("digit-pictures", config, tmp_path / "first", tmp_path)
    (tmp_path / "first").rename(tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    assert (len(files_of(dataset)), len(dataset.test_labels_N)) == (1437, 360)
    labels = load_digits().target
    train, _ = train_test_split(range(1797), test_size=360, random_state=3, stratify=labels)
    assert sorted(int(files_of(dataset).path(at).stem) for at in range(1437)) == sorted(train)
    image = files_of(dataset).read(0)
    assert image.shape == (32, 32, 3)
    assert image.std() > 50


@pytest.mark.slow
def test_the_deployed_file_cuts_as_evaluation_did(tmp_path: Path) -> None:
    """crop_fraction goes into the file, and prediction reads it there."""
    weights = make_weights(channels=3)
    cut = weights.info.__class__(**{**weights.info.__dict__, "crop_fraction": 0.75})
    model = export_to(tmp_path / "model.onnx", weights.__class__(**{**weights.__dict__, "info": cut}))
    artifact = open_artifact(model, "cpu")
    assert artifact.metadata.crop_fraction == 0.75
    rng = np.random.default_rng(4)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", 3, tuple(weights.info.image_size), 0.75)
    expected = CLASS_NAMES[int(artifact.run(pixels[np.newaxis])[1][0].argmax())]
    from sdpipe.runtime.predictor import Prediction, predict

    (found,) = predict(artifact, [str(tmp_path / "a.png")], top_k=3, batch_size=4)
    assert isinstance(found, Prediction)
    assert found.top[0][0] == expected
    assert found.top[0][1] == pytest.approx(float(artifact.run(pixels[np.newaxis])[1].max()), rel=1e-6)


SCALES = {"shorter_side": [SIZE, 2 * SIZE]}


@pytest.mark.parametrize("crop", [CROP, SCALES], ids=["size", "scale"])
def test_a_training_sees_the_boxes_that_are_drawn(pictures: DataSet, crop: dict[str, list[float]]) -> None:
    """Each picture's, for its number and the epoch, cut and resized by Pillow; in the next epoch another."""
    overrides = {"crop": crop, "flip": False, "shift_px": 0, "normalisation": "pixel", "seed": 3}
    trainer = Trainer(train_config(**overrides), pictures, CPU, World(0, 1, 0), workers=0)
    files, normalise = files_of(pictures), trainer.normalise
    size_HW = (SIZE, SIZE)
    assert normalise.mean_HWC.shape == (SIZE, SIZE, 3)
    seen = []
    for epoch in (1, 2):
        ((found_NCHW, _labels_N),) = next(iter(trainer.batches.epoch(epoch, range(1), [slice(0, 16)])))
        numbers = trainer.train_indices[Draws(3).order(epoch, len(trainer.train_indices))[:16]]
        found_NHWC = found_NCHW.permute(0, 2, 3, 1) * normalise.std + normalise.mean_HWC
        for number, found_HWC in zip(numbers, found_NHWC, strict=True):
            picture, generator = Image.open(files.path(number)), Draws(3).crop(epoch, number)
            picture_HW = (picture.height, picture.width)
            box = (
                random_size_box(picture_HW, size_HW, (0.3, 1.0), (0.75, 1.3333), generator)
                if crop is CROP
                else random_scale_box(picture_HW, size_HW, (SIZE, 2 * SIZE), generator)
            )
            cut = np.asarray(picture.resize(size_HW, Image.Resampling.BILINEAR, box=box))
            np.testing.assert_allclose(found_HWC.numpy(), cut, atol=1e-3)
            seen.append((number, box))
    assert len(set(seen)) == 32
