"""How far the order of the blocks is, which takes hours of 1202 layers."""

from unittest.mock import MagicMock

import pytest
from conftest import make_weights, random_images

from sdpipe.deploy.pruning import recalibrate, worth
from sdpipe.deploy.pruning.recalibrate import LabelledImages


@pytest.mark.parametrize("num_candidates", [1, 4, 20])
def test_the_bar_ends_when_all_is_measured(num_candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 blocks: fewer candidates than blocks, and more; with every batch, one of which is not full."""
    tqdm = MagicMock()
    monkeypatch.setattr(worth, "tqdm", tqdm)
    monkeypatch.setattr(recalibrate, "_BATCH", 8)
    images_NHWC = random_images(20, seed=1)
    held = LabelledImages(images_NHWC=images_NHWC, labels_N=images_NHWC[:, 0, 0, 0].astype(int) % 3)
    worth.order_blocks(make_weights(), held, num_candidates)
    update = tqdm.return_value.__enter__.return_value.update
    counts = [call.args[0] for call in update.call_args_list]
    assert sum(counts) == tqdm.call_args.kwargs["total"]
    assert set(counts) == {4, 8}
