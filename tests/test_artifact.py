"""What a model file is refused for that is none, or computes no numbers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import random_images
from test_hostile_models import edited, refusal

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact


def plant_nan(model: onnx.ModelProto) -> None:
    """In a weight, which makes all probabilities NaN."""
    weight = next(each for each in model.graph.initializer if len(each.dims) == 1 and each.data_type == 1)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def test_a_network_that_computes_no_numbers_is_an_error(tmp_path: Path, rgb_model_path: Path) -> None:
    """A NaN in a weight: no picture has the first label with the probability NaN, which is no JSON either."""
    path = edited(rgb_model_path, tmp_path, plant_nan)
    artifact = open_artifact(path, "cpu")
    with pytest.raises(ModelError, match="its probabilities are no numbers") as caught:
        artifact.probabilities(random_images(2, channels=3))
    assert str(caught.value).startswith(f"{path}: ")


def test_the_operators_are_those_of_the_bytes_that_were_opened(tmp_path: Path, model_path: Path) -> None:
    """Another file in its place says nothing of them."""
    path = tmp_path / "model.onnx"
    path.write_bytes(model_path.read_bytes())
    artifact = open_artifact(path, "cpu")
    path.unlink()
    assert (artifact.operators["Conv"], artifact.operators["Add"]) == (19, 9)


def test_what_is_no_file_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    assert refusal(tmp_path / "empty.onnx") == f"{tmp_path / 'empty.onnx'}: the file is empty"
    assert refusal(tmp_path).startswith(f"{tmp_path}: is not a file")
    assert refusal(tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such model file")


@pytest.mark.parametrize("name", ["images", "probabilities"])
def test_a_fixed_batch_is_refused(tmp_path: Path, model_path: Path, name: str) -> None:
    """When it is opened: at the first other number of images onnxruntime would fail in its own words."""

    def plant(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                value.type.tensor_type.shape.dim[0].dim_value = 2

    path = edited(model_path, tmp_path, plant)
    assert refusal(path) == f"{path}: its {name} are of 2 images, expected any number"
