"""What is in the pictures of a run, and which pictures can be drawn."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASS_NAMES
from matplotlib.axes import Axes

from sdpipe.deploy.confidence import Bin
from sdpipe.deploy.proof.figures import draw_confusion, draw_mistakes, draw_reliability, draw_training


def points(axes: Axes, number: int) -> list[tuple[float, float]]:
    """Of one line."""
    return [(float(x), float(y)) for x, y in axes.lines[number].get_xydata()]  # type: ignore[union-attr]


def test_a_confusion_matrix_is_coloured_by_shares_of_its_rows(tmp_path: Path) -> None:
    """3 of 4 cats are known and one is taken for a dog; of eels there is no picture."""
    counts_KK = np.array([[3, 1, 0], [0, 2, 6], [0, 0, 0]])
    axes, _bar = draw_confusion(tmp_path / "c.png", counts_KK, CLASS_NAMES, "title").axes
    expected = [[0.75, 0.25, 0], [0, 0.25, 0.75], [0, 0, 0]]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    numbers = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "3", (0, 1): "1", (1, 1): "2", (1, 2): "6"}
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("true", "predicted", "title")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(CLASS_NAMES)


@pytest.mark.slow
def test_the_surest_mistakes_come_first(tmp_path: Path) -> None:
    """24 of 30, in the order of their probability; the image has the brightness of its number."""
    num = 32
    surety_N = np.random.default_rng(0).permutation(np.linspace(0.5, 0.9, num))
    taken_N, labels_N = np.arange(num) % 3, (np.arange(num) + 1) % 3
    probabilities_NK = np.repeat((1 - surety_N[:, None]) / 2, 3, axis=1)
    probabilities_NK[np.arange(num), taken_N] = surety_N
    surest = np.argsort(surety_N)[::-1]
    labels_N[surest[[0, 9]]] = taken_N[surest[[0, 9]]]  # two are none
    expected = [at for at in surest if labels_N[at] != taken_N[at]][:24]
    images_NHWC = np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 5, 5, 1))
    figure = draw_mistakes(tmp_path / "m.png", images_NHWC, labels_N, probabilities_NK, CLASS_NAMES, "title")
    assert len(figure.axes) == 24
    for axes, at in zip(figure.axes, expected, strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), np.full((5, 5), at))
        taken, true = CLASS_NAMES[taken_N[at]], CLASS_NAMES[labels_N[at]]
        assert axes.get_title() == f"{taken} {surety_N[at]:.0%}\nis {true}"


def test_a_training_is_drawn_by_its_history(tmp_path: Path) -> None:
    """Validation error in percent and training loss, the kept epoch, and where the learning rate drops."""
    rows = [(1.0, 0.1, 2.0, 0.5), (2.0, 0.1, 1.0, 0.125), (3.0, 0.01, 0.5, 0.25)]
    names = ("epoch", "learning_rate", "train_loss", "validation_error")
    history = [dict(zip(names, row, strict=True)) for row in rows]
    errors, losses = draw_training(tmp_path / "t.png", history, 2.0, "title").axes
    assert points(errors, 0) == [(1, 50), (2, 12.5), (3, 25)]
    assert points(errors, 1) == [(2, 12.5)]
    assert [x for x, _ in points(errors, 2)] == [2, 2]
    assert points(losses, 0) == [(1, 2), (2, 1), (3, 0.5)]
    assert (errors.get_ylabel(), losses.get_ylabel()) == ("validation error (%)", "training loss")


def test_bars_of_reliability_are_accuracies_and_counts(tmp_path: Path) -> None:
    """The calibration error of the left is (6 * 0.25 + 2 * 0.5) / 8 = 31.25 %, of the right 0."""
    empty = Bin(lowest=0.0, highest=0.5, num_images=0, confidence=0.0, accuracy=0.0)
    low = Bin(lowest=0.0, highest=0.5, num_images=6, confidence=0.5, accuracy=0.25)
    high = Bin(lowest=0.5, highest=1.0, num_images=2, confidence=1.0, accuracy=0.5)
    right = Bin(lowest=0.5, highest=1.0, num_images=8, confidence=0.75, accuracy=0.75)
    bins = {"uncalibrated": [low, high], "calibrated": [empty, right]}
    axes = draw_reliability(tmp_path / "r.png", bins, 1.5, "title").axes
    heights = [[float(bar.get_height()) for bar in each.patches] for each in axes]  # type: ignore[attr-defined]
    assert heights == [[0.25, 0.5], [0.0, 0.75], [6, 2], [0, 8]]
    assert [each.get_title() for each in axes[:2]] == [
        "uncalibrated: calibration error 31.2%", "calibrated: calibration error 0.0%",
    ]  # fmt: skip
    assert points(axes[0], 1) == [(0.5, 0.25), (1.0, 0.5)]
    assert points(axes[1], 1) == [(0.75, 0.75)]


def test_long_class_names_do_not_touch_their_neighbours(tmp_path: Path) -> None:
    names = [f"a class whose name goes on and on, {at}" for at in range(3)]
    labels_N, images_NHWC = np.arange(24) % 3, np.zeros((24, 5, 5, 1), np.uint8)
    probabilities_NK = np.eye(3)[(labels_N + 1) % 3]
    figure = draw_mistakes(tmp_path / "m.png", images_NHWC, labels_N, probabilities_NK, names, "title")
    figure.draw_without_rendering()
    drawn = [axes.title.get_window_extent() for axes in figure.axes]
    assert figure.axes[0].get_title() == "a class ... on, 1 100%\nis a class ... on, 0"
    assert not any(one.overlaps(other) for one, other in combinations(drawn, 2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (5, 1, 1), (1, 1, 3), (1, 5, 3)])
def test_mistakes_of_pictures_one_pixel_wide_are_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images_NHWC, labels_N = np.zeros((2, *shape), dtype=np.uint8), np.array([1, 0])
    draw_mistakes(tmp_path / "m.png", images_NHWC, labels_N, np.eye(3)[:2], CLASS_NAMES, "title")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_class_names_in_letters_that_the_font_lacks_are_drawn_without_a_warning(tmp_path: Path) -> None:
    """Matplotlib has one for each letter, several times; in the tests a warning is an error."""
    names = ["猫", "狗", "\U0001f427"]
    draw_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, "title")
    images_NHWC = np.zeros((2, 5, 5, 1), np.uint8)
    draw_mistakes(tmp_path / "m.png", images_NHWC, np.array([1, 2]), np.eye(3)[:2], names, "title")
    assert {path.name for path in tmp_path.iterdir()} == {"c.png", "m.png"}


def test_more_classes_than_fit_with_numbers_are_drawn(tmp_path: Path) -> None:
    """CIFAR-100's matrix has no room for numbers or names."""
    draw_confusion(tmp_path / "big.png", np.eye(100, dtype=int), [str(k) for k in range(100)], "title")
    assert (tmp_path / "big.png").stat().st_size > 10_000
