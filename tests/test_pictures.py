"""Pictures that are decoded while training: crops, colours, worker processes and their end."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, CPU, ROOT, export_to, machine, make_weights, train_alone, train_config
from picture_files import AUGMENTED, CROP, RESIZE, SIZE, fetch_pictures, make_pictures, write_pictures
from PIL import Image
from test_session import in_mounts
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sdpipe.data.augment import jitter_colours, light
from sdpipe.data.config import DigitPicturesConfig
from sdpipe.data.crops import random_scale_box, random_size_box
from sdpipe.data.fetch import fetch
from sdpipe.data.pictures import PictureFiles
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import ConfigError, DataError, LoadingError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.image import decode
from sdpipe.training import inputs
from sdpipe.training.config import RandomScaleCrop, RandomSizeCrop
from sdpipe.training.decoding import Crop, FileImages
from sdpipe.training.session import train_run
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World

RANDOM_SIZE = RandomSizeCrop.model_validate(CROP)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def files_of(dataset: DataSet) -> PictureFiles:
    assert isinstance(dataset.train_images, PictureFiles)
    return dataset.train_images


def open_images(dataset: DataSet, workers: int, crop: Crop = RANDOM_SIZE) -> FileImages:
    return FileImages(files_of(dataset), dataset.train_labels_N, CPU, crop=crop, seed=0, workers=workers)


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
    assert boxes[:, 0].max() > 500, "anywhere in the picture"


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


def test_any_number_of_workers_gives_the_same_pixels(pictures: DataSet) -> None:
    """0, 1 and 2 processes, cropped in two epochs and uncropped: the same bytes in the order asked for."""
    wanted = [np.array([5, 3, 80]), np.array([7]), np.array([1, 2, 3, 4])]
    found = {
        workers: [
            (images.numpy().tobytes(), labels.tolist())
            for epoch in (0, 1, None)
            for images, labels in open_images(pictures, workers).batches(wanted, epoch)
        ]
        for workers in (0, 1, 2)
    }
    assert found[0] == found[1] == found[2]
    first, second, uncropped = (found[0][at : at + 3] for at in (0, 3, 6))
    assert first != second, "another epoch, other crops"
    assert first != uncropped
    files = files_of(pictures)
    as_predicted = decode(files.path(7), 3, (SIZE, SIZE), SIZE / RESIZE)
    assert uncropped[1] == (as_predicted.tobytes(), [pictures.train_labels_N[7]])


def test_workers_decode_while_the_device_computes(pictures: DataSet) -> None:
    """Behind 150 ms of other work, half the wait for a batch and less than where this process decodes."""
    wanted = [np.tile(np.arange(80), 4)] * 8  # 40 ms and more to decode, on busy cores too

    def median_wait_s(workers: int) -> float:
        waits, batches = [], open_images(pictures, workers).batches(wanted, 0)
        for _ in wanted:
            started = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - started)
            time.sleep(0.15)
        return float(np.median(waits[2:]))

    assert median_wait_s(1) < median_wait_s(0) / 2


def test_abandoned_batches_are_not_seen_again(pictures: DataSet) -> None:
    """After a validation that was broken off, the next epoch begins with its own first batch."""
    images = open_images(pictures, 2)
    everything = [np.array([number]) for number in range(60)]
    next(images.batches(everything))
    again = [labels.tolist() for _, labels in images.batches(everything[:5])]
    assert again == [[label] for label in pictures.train_labels_N[:5].tolist()]


def test_a_training_on_files_resumes_to_the_same_weights(pictures: DataSet, tmp_path: Path) -> None:
    """With all augmentations, stopped at each third step; one worker more changes nothing either."""
    config = train_config(**AUGMENTED, epochs=2, milestones=[])
    whole = train_alone(config, pictures, tmp_path / "whole")
    trainer = Trainer(config, pictures, CPU, World(0, 1, 0), workers=1)
    for epoch in range(2):
        while trainer.epoch == epoch:
            for number, _ in enumerate(trainer.steps()):
                if number == 2:
                    saved = trainer.checkpoint()
                    trainer = Trainer(config, pictures, CPU, World(0, 1, 0), workers=0)
                    trainer.restore(saved)
                    break
            else:
                trainer.validate()
    assert trainer.progress.history == whole.progress.history
    assert all(torch.equal(tensor, trainer.best_state[name]) for name, tensor in whole.state.items())
    assert whole.progress.best.validation_error < 0.5, "three colours, where guessing misses two thirds"


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named_and_the_training_is_saved(tmp_path: Path, workers: int) -> None:
    dataset = make_pictures(tmp_path)
    config = train_config(**AUGMENTED, epochs=1, milestones=[], batch_size=8)
    trainer = Trainer(config, dataset, CPU, World(0, 1, 0), workers=workers)
    number = trainer.batches.indices(0, 4)[3]
    path = files_of(dataset).path(number)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(LoadingError, match=f"{path}: not a picture"):
        for _ in trainer.steps():
            pass
    assert trainer.num_steps == 4
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match=rf"{path}: 3 bytes, and \d+ when it was listed"):
        files_of(dataset).read(number)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file"):
        files_of(dataset).read(number)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_a_decoder_that_cannot_be_started_is_one_line(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As the kernel refuses it where memory or processes are short."""

    def fork() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(LoadingError, match="no process can be started to decode pictures"):
        next(open_images(pictures, 1).batches([np.array([0])]))


SMALL_SHM = """
mount -t tmpfs -o size=64k none /dev/shm
status=0; timeout 40 $TRAIN 3 2 pictures || status=$?
echo "exit $status"
"""


@pytest.mark.slow
def test_a_full_dev_shm_is_one_line(project: Path, mlflow_store: Path) -> None:
    """As in a container with too little of it, where the training would wait for ever."""
    make_pictures(project)
    out = in_mounts(SMALL_SHM, project)
    assert "exit 1\n" in out
    assert out.count("error:") == 1
    assert re.search("error: no memory for a batch of [0-9]+ pictures; they wait in /dev/shm", out)


def shared_mappings() -> int:
    """Blocks of /dev/shm that this process holds for tensors."""
    return Path("/proc/self/maps").read_text().count("/torch_")


def test_statistics_do_not_hold_all_batches_in_dev_shm(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 pictures one by one, of which few wait; 5,000 would take hundreds of megabytes there."""
    monkeypatch.setattr(inputs, "_STATISTICS_BATCH", 1)
    most = 0
    images = open_images(pictures, 1)
    batches = images.batches

    def counted(wanted: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal most
        for batch in batches(wanted):
            most = max(most, shared_mappings())
            yield batch

    monkeypatch.setattr(images, "batches", counted)
    inputs.fit_to(train_config(**AUGMENTED), pictures, np.arange(72), images)
    assert 1 <= most <= 8


def start(project: Path, fault: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "session_worker.py"), "40", "0", fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def checkpoints(project: Path) -> list[Path]:
    return list(project.glob(".sdpipe/runs/*/step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_lost_when_workers_end(project: Path, mlflow_store: Path, number: signal.Signals) -> None:
    """A worker that is killed: one line, exit 1. SIGTERM or Ctrl-C to all processes: as to the parent alone.

    Either way the last step is saved, no process stays, and a new start ends in the same bytes.
    """
    make_pictures(project)
    process = start(project, "pictures")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    assert not checkpoints(project), "none is due until it ends"
    workers = children(process.pid)
    assert len(workers) >= 2, "two decode"
    if number == signal.SIGKILL:
        os.kill(workers[0], number)
    else:
        os.killpg(process.pid, number)
    sent = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert process.returncode == 1
        assert "error: a process that decodes pictures has died (DataLoader worker" in errors
    else:
        assert process.returncode == 128 + number
        assert "continues from here" in out
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker stayed"
        time.sleep(0.1)
    (saved,) = checkpoints(project)
    process = start(project, "pictures")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"continuing after step {int(saved.name.split('-')[1])}," in out
    continued = (project / "out" / "weights.safetensors").read_bytes()
    config = train_config(**AUGMENTED, epochs=40, milestones=[])
    train_run("plain", config, machine(), open_dataset(Path("data")), "code", Path("out"))
    assert (project / "out" / "weights.safetensors").read_bytes() == continued


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
    assert pictures.crop_fraction == SIZE / RESIZE


def test_a_test_folder_beside_the_validation_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all")
    for k in "rgb":
        (tmp_path / "all" / "test" / k).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "all" / "test" / k / "a.png")
    dataset = fetch_pictures(tmp_path / "all", tmp_path / "data")
    assert dataset.train_parts == (("train", 90), ("validation", 12))
    assert len(dataset.test_labels_N) == 3


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
    """1,437 and 360 digits; each file is the digit, enlarged, and can be moved with its folder."""
    config = DigitPicturesConfig(image_size=32, resize=36, test_fraction=0.2, seed=0)
    fetch("digit-pictures", config, tmp_path / "first", tmp_path)
    (tmp_path / "first").rename(tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    assert (len(files_of(dataset)), len(dataset.test_labels_N)) == (1437, 360)
    image = files_of(dataset).read(0)
    assert image.shape == (32, 32, 3)
    assert image.std() > 50


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


def test_a_crop_of_scales_trains(pictures: DataSet) -> None:
    crop = {"shorter_side": [SIZE, 2 * SIZE]}
    trainer = Trainer(
        train_config(crop=crop, normalisation="pixel"), pictures, CPU, World(0, 1, 0), workers=0
    )
    assert isinstance(trainer.config.crop, RandomScaleCrop)
    assert trainer.normalisation.mean_HWC.shape == (SIZE, SIZE, 3)
    next(trainer.steps())
