"""Trainings on a full or read-only disk, and with too little memory."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import machine, make_dataset, train_config
from session_runs import in_mounts, results, start, the_run

from sdpipe.data.store import open_dataset
from sdpipe.errors import TrainingError
from sdpipe.training.session import memory_on_one_line, train_run


def reference(project: Path) -> dict[str, bytes]:
    """What the interrupted training must come to."""
    config = train_config(epochs=4, milestones=[])
    train_run("plain", config, machine(), open_dataset(project / "data"), "code", project / "whole")
    return results(project / "whole")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(project: Path, mlflow_store: Path) -> None:
    """A tmpfs with room for two checkpoints, not for three; with more room, it goes on from there."""

    make_dataset(project / "data")
    out = in_mounts(
        """
        mkdir small
        mount -t tmpfs -o size=300k none small
        status=0; DVC_ROOT=$PWD/small $TRAIN 4 5 || status=$?
        echo "exit $status, left: $(ls small/.sdpipe/runs/*/)"
        mount -o remount,size=8m small
        DVC_ROOT=$PWD/small $TRAIN 4 5
        """,
        project,
        MLFLOW_TRACKING_URI=f"sqlite:///{mlflow_store}",
    )
    assert re.search(r"error: \[Errno 28\] No space left on device: '.*/step-0000000015'", out)
    assert out.count("error:") == 1
    assert "exit 1, left: step-0000000005\nstep-0000000010\n" in out
    assert "continuing after step 10" in out
    assert results(project / "out") == reference(project)


@pytest.mark.slow
def test_a_read_only_output_is_one_line_and_loses_nothing(project: Path, mlflow_store: Path) -> None:
    """The training is over by then; the next start writes its files without a step more."""
    make_dataset(project / "data")
    out = in_mounts(
        """
        mkdir out
        mount -t tmpfs none out
        mount -o remount,ro out
        status=0; $TRAIN 4 5 || status=$?
        echo "exit $status"
        umount out
        rmdir out
        $TRAIN 4 5
        """,
        project,
    )
    assert "Read-only file system" in out
    assert out.count("error:") == 1
    assert "exit 1\n" in out
    assert "continuing after step 24, 4 of 4 epochs" in out
    assert results(project / "out") == reference(project)


@pytest.mark.slow
@pytest.mark.parametrize("linked", [pytest.param("runs", marks=pytest.mark.long), "runs/$NAME"])
def test_checkpoints_may_stand_on_another_disk(project: Path, mlflow_store: Path, linked: str) -> None:
    """Behind a link: the finished training's last state leaves it, and more epochs go on from there."""
    make_dataset(project / "data")
    train_run("plain", train_config(epochs=4, milestones=[]), machine(), open_dataset(project / "data"),
              "code", project / "whole")  # fmt: skip
    name = json.loads((project / "whole" / "train.json").read_text())["fingerprint"]
    shutil.rmtree(project / ".sdpipe")
    out = in_mounts(
        f"""
        NAME={name}
        mkdir large
        mount -t tmpfs none large
        mkdir -p $(dirname .sdpipe/{linked})
        mkdir large/checkpoints
        ln -s $PWD/large/checkpoints .sdpipe/{linked}
        $TRAIN 4 5
        find large
        $TRAIN 5 5
        """,
        project,
    )
    assert "step-" not in out
    assert "extending the finished training" in out
    (kept,) = project.glob(f".sdpipe/finished/*/{name}/step-*")
    assert sorted(path.name for path in kept.iterdir()) == ["SHA256SUMS", "state.json", "tensors.safetensors"]


@pytest.mark.slow
def test_too_little_memory_is_one_line(project: Path, mlflow_store: Path) -> None:
    """The address space is limited to what is there already and 300 MB; a step needs more."""
    make_dataset(project / "data")
    process = start(project, 3, fault="memory")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "error: out of memory at train.batch_size 96 in 1 parts" in errors
    assert the_run(mlflow_store).info.status == "FAILED"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("could not create a primitive"),
    ],
    ids=repr,
)
def test_every_kind_of_too_little_memory_is_known(error: Exception) -> None:
    """As Python, the kernel, CUDA's driver, cuDNN and oneDNN say it."""
    says = "^out of memory at train.batch_size 16 in 1 parts"
    with pytest.raises(TrainingError, match=says), memory_on_one_line(train_config()):
        raise error


def test_a_thread_that_cannot_be_started_is_told_apart() -> None:
    """Smaller parts of a batch would not help."""
    with pytest.raises(TrainingError, match="^no thread can be started"), memory_on_one_line(train_config()):
        raise RuntimeError("can't start new thread")


def test_a_capture_that_was_given_up_for_lack_of_memory_is_one() -> None:
    """torch.cuda.graph ends the capture while the allocator's error passes, which fails in its own words."""

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(TrainingError, match="^out of memory"), memory_on_one_line(train_config()):
        capture()


@pytest.mark.parametrize(
    "says",
    [
        "CUDA error: an illegal memory access was encountered",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
    ],
)
def test_other_errors_are_not_called_a_lack_of_memory(says: str) -> None:
    """The second is oneDNN's for shapes and types that it does not know."""
    with pytest.raises(RuntimeError, match=f"^{says}$"), memory_on_one_line(train_config()):
        raise RuntimeError(says)
