"""The model repository for Triton is valid by Triton's own schema and loads in onnxruntime."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from conftest import ROOT, random_images
from google.protobuf import text_format

from sdpipe.cli import main
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_ensemble
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.triton import _beside, write_triton_repository
from sdpipe.training.weights import Weights

# protobuf's Python code of tritonclient warns where it is older than protobuf itself.
pytestmark = pytest.mark.filterwarnings("ignore:Protobuf gencode")


def parse(folder: Path):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def test_the_config_is_what_triton_reads(rgb_model_path: Path, tmp_path: Path) -> None:
    """Parsed by Triton's protobuf: types and shapes are the session's, the batch left out."""
    folder = write_triton_repository(rgb_model_path, tmp_path / "repository", "animals", 48)
    config = parse(folder)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert (config.name, config.backend, config.max_batch_size) == ("animals", "onnxruntime", 48)
    from tritonclient.grpc.model_config_pb2 import TYPE_FP32, TYPE_UINT8, ModelInstanceGroup

    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [
        (each.name, TYPE_UINT8, each.shape[1:]) for each in session.get_inputs()
    ]
    assert [(each.name, each.data_type, list(each.dims)) for each in config.output] == [
        (each.name, TYPE_FP32, each.shape[1:]) for each in session.get_outputs()
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 32]
    assert max(config.dynamic_batching.preferred_batch_size) <= config.max_batch_size
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (1, ModelInstanceGroup.KIND_AUTO)
    ]


def test_the_labels_belong_to_the_probabilities(rgb_model_path: Path, tmp_path: Path) -> None:
    folder = write_triton_repository(rgb_model_path, tmp_path, "animals", 64)
    named = {each.name: each.label_filename for each in parse(folder).output}
    assert named == {"logits": "", "probabilities": "labels.txt"}
    assert (folder / "labels.txt").read_text().splitlines() == ["cat", "dog", "eel"]


def test_a_batch_of_the_largest_size_runs(model_path: Path, tmp_path: Path) -> None:
    """What Triton would send: the dims with a batch in front; the answers are the deployed file's."""
    folder = write_triton_repository(model_path, tmp_path, "animals", 5)
    config = parse(folder)
    assert not config.dynamic_batching.preferred_batch_size
    images = random_images(config.max_batch_size)
    assert list(images.shape[1:]) == list(config.input[0].dims)
    ours = open_artifact(folder / "1" / "model.onnx", "cpu").run(images)
    theirs = open_artifact(model_path, "cpu").run(images)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_a_second_time_replaces_ours_and_refuses_what_is_not(model_path: Path, tmp_path: Path) -> None:
    folder = write_triton_repository(model_path, tmp_path, "animals", 8)
    write_triton_repository(model_path, tmp_path, "animals", 16)
    assert parse(folder).max_batch_size == 16
    assert sorted(path.name for path in folder.rglob("*")) == [
        "1",
        "config.pbtxt",
        "labels.txt",
        "model.onnx",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["animals"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.pbtxt").write_text('name: "foreign"\n')
    with pytest.raises(ModelError, match="was not written by `sdpipe triton`"):
        write_triton_repository(model_path, tmp_path, "foreign", 8)
    assert (foreign / "config.pbtxt").read_text() == 'name: "foreign"\n'
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ModelError, match="was not written by"):
        write_triton_repository(model_path, tmp_path, "link", 8)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from sdpipe.runtime.triton import write_triton_repository
shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_triton_repository(Path(sys.argv[1]), Path(sys.argv[2]), "animals", 8)
"""


def test_what_a_killed_process_left_goes_with_the_next(model_path: Path, tmp_path: Path) -> None:
    """It lay in the repository for ever; what is another's stays."""
    command = [sys.executable, "-c", KILLED, str(model_path), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".animals.notes").touch()
    write_triton_repository(model_path, tmp_path, "animals", 8)
    assert {path.name for path in tmp_path.iterdir()} == {"animals", ".animals.notes"}


@pytest.mark.slow
def test_a_process_that_lives_is_waited_for(model_path: Path, tmp_path: Path) -> None:
    """Its folder is not taken for one that was left."""
    with ThreadPoolExecutor(1) as pool, _beside(tmp_path / "animals") as beside:
        second = pool.submit(write_triton_repository, model_path, tmp_path, "animals", 8)
        with pytest.raises(TimeoutError):
            second.result(timeout=1)
        assert beside.is_dir()
    assert second.result(timeout=60) == tmp_path / "animals"


def test_another_version_is_not_lost(model_path: Path, tmp_path: Path) -> None:
    folder = write_triton_repository(model_path, tmp_path, "digits", 64)
    (folder / "2").mkdir()
    for name in ("2/model.onnx", "1/model.plan"):
        (folder / name).write_bytes(b"another")
        with pytest.raises(ModelError, match=f"also holds {name}, which would be lost"):
            write_triton_repository(model_path, tmp_path, "digits", 32)
        assert (folder / name).read_bytes() == b"another"
        (folder / name).unlink()
    assert parse(folder).max_batch_size == 64


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", 'a"b'])
def test_a_name_that_is_no_folder_is_refused(model_path: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="in a model's name"):
        write_triton_repository(model_path, tmp_path, name, 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", ["dog\neel", ""])
def test_a_label_of_no_single_line_is_refused(model_path: Path, tmp_path: Path, label: str) -> None:
    """labels.txt has a line a label: the classes behind it would all be wrong."""
    model = onnx.load(model_path)
    for entry in model.metadata_props:
        if entry.key == "sdpipe.class_names":
            entry.value = json.dumps(["cat", label, "owl"])
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="expected one line"):
        write_triton_repository(tmp_path / "model.onnx", tmp_path / "out", "animals", 8)


@pytest.mark.slow
def test_the_ensemble_is_refused(weights: Weights, tmp_path: Path) -> None:
    """Its second input is not in the config, so Triton would not load it; what was there stays."""
    export_ensemble(weights, tmp_path / "ensemble.onnx", ExportConfig(opset=20), temperature=1.0)
    with pytest.raises(ModelError, match="is the sub-network ensemble"):
        write_triton_repository(tmp_path / "ensemble.onnx", tmp_path / "out", "animals", 8)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it_and_says_where(model_path: Path, tmp_path: Path) -> None:
    arguments = ["triton", "--model", str(model_path), "--out", str(tmp_path / "repository")]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.output) == (0, f"{tmp_path / 'repository' / 'sdpipe'}\n")
    assert parse(tmp_path / "repository" / "sdpipe").name == "sdpipe"
    (tmp_path / "file").write_text("x")
    done = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "repository"), "--name", "../x"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: '../x'")
