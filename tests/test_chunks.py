"""What goes piece by piece is what it would be in one piece: nothing lost, doubled or swapped at a seam."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ALONE, CPU, make_weights, random_images, train_config
from ensemble_files import in_pytorch
from picture_files import SIZE, files_of, make_pictures, open_images
from PIL import Image
from scipy.special import log_softmax

from sdpipe.data import imagefolder, store
from sdpipe.training import evaluation, inputs
from sdpipe.training.draws import Draws
from sdpipe.training.images import ArrayImages


def test_arrays_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 and 4 images, 2 at a time."""
    monkeypatch.setattr(store, "_CHUNK", 2)
    images_NHWC, labels_N = random_images(9), np.arange(9)[::-1]
    store.write_part(tmp_path, "train", [(images_NHWC[:5], labels_N[:5]), (images_NHWC[5:], labels_N[5:])])
    np.testing.assert_array_equal(np.load(tmp_path / "train_images.npy"), images_NHWC)
    np.testing.assert_array_equal(np.load(tmp_path / "train_labels.npy"), labels_N)


def test_each_picture_keeps_its_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 pictures, 4 at a time, of the size that they are to have."""
    monkeypatch.setattr(imagefolder, "_CHUNK", 4)
    images_NHWC, labels_N = random_images(9), np.arange(9)[::-1]
    pictures = [(tmp_path / f"{at}.png", int(label)) for at, label in enumerate(labels_N)]
    for (path, _), image_HWC in zip(pictures, images_NHWC, strict=True):
        Image.fromarray(image_HWC[..., 0]).save(path)
    imagefolder.write_pictures(tmp_path, "test", pictures, images_NHWC.shape[1:3], 1)
    np.testing.assert_array_equal(np.load(tmp_path / "test_images.npy"), images_NHWC)
    np.testing.assert_array_equal(np.load(tmp_path / "test_labels.npy"), labels_N)


def test_statistics_are_of_all_pictures_that_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 of 70 pictures in files, drawn by the seed, 12 or fewer at a time, against numpy in float64."""
    monkeypatch.setattr(inputs, "_STATISTICS_BATCH", 12)
    monkeypatch.setattr(inputs, "STATISTICS_IMAGES", 50)
    dataset, indices = make_pictures(tmp_path), np.arange(5, 75)
    fitted = inputs.fit_to(train_config(seed=3), dataset, indices, open_images(dataset, 0))
    chosen = indices[Draws(3).statistics_sample(70, 50)]
    decoded_NHWC = np.stack([files_of(dataset).read(number) for number in chosen])
    assert decoded_NHWC.shape == (50, SIZE, SIZE, 3)
    mean_HWC = decoded_NHWC.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(fitted.mean_HWC.numpy(), mean_HWC, rtol=1e-6)
    assert fitted.std.item() == pytest.approx(decoded_NHWC.std(dtype=np.float64), rel=1e-6)


def test_error_and_loss_are_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 of 30 images, 7 at a time: the fraction that is wrong, and the mean cross-entropy in float64."""
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 7)
    weights, images_NHWC, chosen = make_weights(), random_images(30), np.arange(4, 29)
    labels_N = np.random.default_rng(0).integers(3, size=30)
    found = evaluation.error_and_loss(
        weights.build_network(), ArrayImages(images_NHWC, labels_N, CPU), chosen, weights.normalisation, ALONE
    )
    assert found is not None
    logits_NK, true_N = in_pytorch(weights, images_NHWC[chosen], None), labels_N[chosen]
    assert found[0] == (logits_NK.argmax(axis=1) != true_N).mean()
    losses_N = -log_softmax(logits_NK, axis=1)[np.arange(25), true_N]
    assert found[1] == pytest.approx(losses_N.mean(), rel=1e-5)
