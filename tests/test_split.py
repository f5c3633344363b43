import numpy as np
import pytest

from sdpipe.data.split import split_stratified, split_validation
from sdpipe.errors import DataError


def test_cifar_is_split_into_45000_and_5000() -> None:
    """Paper section 4; the parts are disjoint, complete, and another seed gives another split."""
    labels = np.arange(50_000) % 10
    train, validation = split_validation(labels, (("train", 50_000),), 0.1, seed=0)
    assert (len(train), len(validation)) == (45_000, 5_000)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(50_000))
    assert not np.array_equal(validation, split_validation(labels, (("train", 50_000),), 0.1, seed=1)[1])
    # Shuffled: of 5,000 chosen from 50,000 about half lie in the first half, +- 5 * 33.
    assert abs((validation < 25_000).sum() - 2_500) < 165


def test_svhn_takes_400_of_train_and_200_of_extra_per_class() -> None:
    """6,000 validation images of 73,257 + 531,131; here from a tenth of them.

    Shuffled: of those chosen about half lie in the first half of their part, +- 5 * 22; another seed chooses
    others.
    """
    labels = np.arange(7_330 + 53_110) % 10
    parts = (("train", 7_330), ("extra", 53_110))
    train, validation = split_validation(labels, parts, {"train": 400, "extra": 200}, seed=0)
    assert len(validation) == 6_000
    for k in range(10):
        chosen = validation[labels[validation] == k]
        assert ((chosen < 7_330).sum(), (chosen >= 7_330).sum()) == (400, 200)
    assert not set(train.tolist()) & set(validation.tolist())
    assert abs((validation < 3_665).sum() - 2_000) < 110
    assert abs((validation >= 7_330 + 26_555).sum() - 1_000) < 110
    assert not np.array_equal(validation, split_validation(labels, parts, {"train": 400, "extra": 200}, 1)[1])


def test_a_validation_part_is_used_as_it_is() -> None:
    train, validation = split_validation(np.zeros(10, int), (("train", 7), ("validation", 3)), 0.5, seed=0)
    assert validation.tolist() == [7, 8, 9]
    assert train.tolist() == list(range(7))


@pytest.mark.parametrize("validation", [{"nowhere": 1}, {"train": 6}, 0.001])
def test_impossible_splits_name_the_key(validation: float | dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"train\.validation"):
        split_validation(np.arange(50) % 10, (("train", 50),), validation, seed=0)


@pytest.mark.parametrize(("fraction", "train", "test"), [(0.999, 0, 20), (0.9, 2, 18), (0.05, 19, 1)])
def test_a_test_part_that_leaves_out_classes_names_the_key(fraction: float, train: int, test: int) -> None:
    """Of 20 images of 3 classes; in words of ours, not scikit-learn's."""
    labels = [0] * 8 + [1] * 6 + [2] * 6
    with pytest.raises(DataError) as caught:
        split_stratified(labels, fraction, 0, "fetch.imagefolder")
    assert str(caught.value) == (
        f"fetch.imagefolder.test_fraction: {fraction} of 20 images leaves {train} to train on and {test} to "
        "test on; expected at least 3 of both, the number of classes"
    )
    split_stratified(labels, 0.85, 0, "fetch.imagefolder")
