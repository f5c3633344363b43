"""What a report calls a setting."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from sdpipe.report.reading import read_runs
from sdpipe.report.runs import AUGMENTATION
from sdpipe.report.settings import group
from sdpipe.training.config import TrainConfig

CHANGES_NO_IMAGE = """
    dataset seed validation family depth widths skip dropout rule p_L p_L_warmup_epochs draw epochs batch_size
    validate_steps micro_batches learning_rate milestones plateau_epochs drop_factor warmup momentum
    weight_decay normalisation device precision compile recompute
"""


@pytest.mark.parametrize(
    ("params", "label"),
    [
        ({}, "animals, no augmentation, 20 layers"),
        ({"shift_px": 1}, "animals, 20 layers"),
        ({"flip": True}, "animals, 20 layers"),
        ({"crop": {"shorter_side": [32, 44]}}, "animals, 20 layers"),
        ({"colour_jitter": 0.4}, "animals, 20 layers"),
        ({"lighting": 0.1}, "animals, 20 layers"),
    ],
)
def test_only_a_training_that_changes_no_image_is_without_augmentation(
    tmp_path: Path, params: dict[str, Any], label: str
) -> None:
    """Random crops and colours were passed over, as the twins of the ImageNet recipes have them."""
    write_run(tmp_path / "a", **{"shift_px": 0, "flip": False, **params})
    (setting,) = group(read_runs([tmp_path])[0])
    assert setting.label == label


def test_dropout_in_the_constant_depth_is_in_the_label(tmp_path: Path) -> None:
    """Tables and figures call what they compare with `constant depth`; with none, it is not in the label."""
    write_run(tmp_path / "c", p_L=1.0, dropout=0.1)
    write_run(tmp_path / "s", p_L=0.5, dropout=0.1)
    write_run(tmp_path / "c26", p_L=1.0, depth=26)
    write_run(tmp_path / "d26", p_L=1.0, depth=26, dropout=0.1)
    labels = [setting.label for setting in group(read_runs([tmp_path])[0])]
    assert labels == ["animals, 20 layers, dropout 0.1", "animals, 26 layers"]


def test_each_key_of_a_training_changes_images_or_is_known_not_to() -> None:
    """One that is forgotten would set its runs beside those of the paper without augmentation."""
    assert sorted(TrainConfig.model_fields) == sorted([*AUGMENTATION, *CHANGES_NO_IMAGE.split()])
