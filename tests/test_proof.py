"""What evaluate refuses to prove, and what the proof finds besides wrong logits."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quantized_runs import QUICK, make_quantized_run
from test_evaluate import HISTORY, NUM_BINS

from sdpipe.data.store import DataSet
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_quantized_run(tmp_path_factory.mktemp("models") / "run", dataset)


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """A sound run with all its variants, to be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def evaluate(run: Path, dataset: DataSet) -> None:
    evaluate_run(run, dataset, HISTORY, QUICK, NUM_BINS)


def test_a_run_is_not_tested_on_other_data(run: Path, dataset: DataSet) -> None:
    """Its training images as another set's test part would give an error that is none of new images."""
    trained_on = np.asarray(dataset.train_images[:30])
    other = replace(dataset, digest="f" * 64, test_images_NHWC=trained_on)
    with pytest.raises(DataError, match=f"was trained on the data {dataset.digest[:16]}.* is ffff"):
        evaluate(run, other)
    assert not (run / "metrics.json").exists()
