"""A training as a process: stopped, killed, refused, extended, and short of disk or memory."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, machine, make_dataset, train_config
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run
from picture_files import make_pictures
from session_runs import results, run_to

from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import BusyError, TrainingError
from sdpipe.training.interruption import noticing_signals
from sdpipe.training.progress import TrainResult
from sdpipe.training.session import memory_on_one_line, train_run
from sdpipe.training.trainer import Trainer

WORKER = str(ROOT / "tests" / "session_worker.py")


def start(
    project: Path, epochs: int, every_steps: int = 5, fault: str = "", **environment: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, WORKER, str(epochs), str(every_steps), fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(project: Path, process: "subprocess.Popen[str]") -> None:
    while not list(project.glob(".sdpipe/runs/*/step-*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


def steps_saved(project: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in project.glob(".sdpipe/runs/*/step-*"))


def wait_for_the_run(store: Path) -> None:
    """Until MLflow knows of it: a busy machine takes seconds to import MLflow."""
    client = MlflowClient(f"sqlite:///{store}")
    deadline = time.monotonic() + 60
    while (found := client.get_experiment_by_name("sdpipe")) is None or not client.search_runs(
        [found.experiment_id]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def the_run(store: Path) -> Run:
    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("sdpipe")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_is_continued_and_leaves_the_same_files(
    project: Path, mlflow_store: Path, number: signal.Signals
) -> None:
    """The same weights, history and summary; one MLflow run, KILLED in between if it could say so."""
    make_dataset(project / "data")
    epochs = 30
    process = start(project, epochs, every_steps=100)  # of 180
    wait_for_checkpoint(project, process)
    process.send_signal(number)
    sent = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in errors
    assert not (project / "out").exists()
    if number == signal.SIGKILL:
        assert steps_saved(project) == [100]
    else:
        assert steps_saved(project)[-1] > 100, "the step at the signal is saved"
        assert "continues from here" in out
        assert the_run(mlflow_store).info.status == "KILLED"
    process = start(project, epochs)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "continuing after step" in out
    killed = results(project / "out")

    whole = train_config(epochs=epochs, milestones=[])
    train_run("plain", whole, machine(), open_dataset(project / "data"), "code", project / "out")
    assert results(project / "out") == killed
    assert not list(project.glob(".sdpipe/runs/*/*")), "no unfinished state is left of a finished run"
    run = the_run(mlflow_store)
    assert run.info.status == "FINISHED"
    client = MlflowClient(f"sqlite:///{mlflow_store}")
    history = client.get_metric_history(run.info.run_id, "validation_error")
    assert sorted(metric.step for metric in history) == list(range(1, epochs + 1))


def test_a_last_state_that_cannot_be_kept_is_no_good_end(project: Path, mlflow_store: Path) -> None:
    """The stage fails, and MLflow says so, too; the checkpoints stay for the next start."""
    make_dataset(project / "data")
    (project / ".sdpipe").mkdir()
    (project / ".sdpipe/finished").touch()  # as a folder on a disk that has gone
    with start(project, 1) as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert ".sdpipe/finished" in errors.splitlines()[-1]
    assert the_run(mlflow_store).info.status == "FAILED"
    assert list((project / ".sdpipe/runs").glob("*/step-*"))


def test_who_reads_the_output_may_have_gone(project: Path, mlflow_store: Path) -> None:
    """Ctrl-C reaches `| tee log` too, and it is gone first; the run is closed honestly all the same."""
    make_dataset(project / "data")
    process = start(project, 300)
    wait_for_checkpoint(project, process)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert the_run(mlflow_store).info.status == "KILLED"


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs these tests may have started them by nohup


@pytest.mark.parametrize("fault", ["", "pictures"])
def test_a_terminal_that_is_closed_loses_nothing(project: Path, mlflow_store: Path, fault: str) -> None:
    """Its end is SIGHUP to all that runs in it, workers included, and no line can be written any more."""
    if fault:
        make_pictures(project)
    else:
        make_dataset(project / "data")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, WORKER, "300", "5", fault],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    wait_for_checkpoint(project, process)
    before = steps_saved(project)[-1]
    os.close(ours)
    assert process.wait(10) == 128 + signal.SIGHUP
    assert steps_saved(project)[-1] >= before
    assert the_run(mlflow_store).info.status == "KILLED"


def test_nohup_is_heard(project: Path, mlflow_store: Path) -> None:
    """Whoever starts a training by it wants it to outlive the terminal."""
    make_dataset(project / "data")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(project, 30)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_checkpoint(project, process)
    process.send_signal(signal.SIGHUP)
    assert "test error" in process.communicate(timeout=60)[0].splitlines()[-1]
    assert process.returncode == 0


def test_a_process_without_output_trains_and_is_ended(project: Path, mlflow_store: Path) -> None:
    """Standard output and error are closed, as some who start programs leave them."""
    make_dataset(project / "data")
    with subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, WORKER, "100000", "5"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True,
    ) as process:
        wait_for_checkpoint(project, process)
        process.terminate()
        assert process.wait(10) == 143
    assert the_run(mlflow_store).info.status == "KILLED"


@pytest.mark.parametrize("answers", [True, False], ids=["MLflow answers", "MLflow does not"])
def test_a_terminal_that_nobody_reads_does_not_keep_a_process_alive(
    project: Path, mlflow_store: Path, answers: bool
) -> None:
    """Its last words, and the warning about MLflow, wait for a reader; the grace is 1 s here."""
    make_dataset(project / "data")
    silent = socket.create_server(("127.0.0.1", 0))
    store = f"sqlite:///{mlflow_store}" if answers else f"http://127.0.0.1:{silent.getsockname()[1]}"
    reader, writer = os.pipe()
    os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))  # full
    with (
        silent,
        subprocess.Popen(
            [sys.executable, WORKER, "3", "5", "slow"],
            cwd=project,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MLFLOW_TRACKING_URI": store},
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()  # "run plain, fingerprint ..."
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 143
        finally:
            process.kill()
    os.close(reader)
    os.close(writer)


@pytest.mark.slow
def test_a_step_that_does_not_end_is_abandoned(project: Path, mlflow_store: Path) -> None:
    """The grace is 1 s here, 7 s for users; the MLflow run says KILLED all the same."""
    make_dataset(project / "data")
    process = start(project, 3, fault="slow")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()  # "run plain, fingerprint ..."
    wait_for_the_run(mlflow_store)
    process.terminate()
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 6
    assert process.returncode == 143
    assert "the step did not end in 1 s; the last checkpoint stands" in errors
    assert the_run(mlflow_store).info.status == "KILLED"


@pytest.mark.slow
def test_a_tracking_server_that_hangs_does_not_delay_the_end(project: Path) -> None:
    make_dataset(project / "data")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = start(project, 100_000, MLFLOW_TRACKING_URI=uri)
        wait_for_checkpoint(project, process)
        process.terminate()
        sent = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
    assert process.returncode == 143
    assert errors.count("warning: MLflow: no answer") == 1


def test_a_second_process_on_the_same_run_is_refused_unless_the_first_is_ending(
    project: Path, dataset: DataSet, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(epochs=1, milestones=[])
    train_run("plain", config, machine(), dataset, "code", project / "out")
    (name,) = {json.loads((project / "out" / "train.json").read_text())["fingerprint"]}
    lock = FileLock(project / ".sdpipe" / "runs" / f"{name}.lock", thread_local=False)
    monkeypatch.setattr("sdpipe.training.session.ENDING_S", 0.1)
    with lock, pytest.raises(BusyError, match="run plain"):
        train_run("plain", config, machine(), dataset, "code", project / "out")
    monkeypatch.setattr("sdpipe.training.session.ENDING_S", 60.0)
    with lock:
        threading.Timer(1.0, lock.release).start()
        train_run("plain", config, machine(), dataset, "code", project / "out")


# ---------------------------------------------------------------- signals at odd moments


def test_the_clock_of_a_stopped_training_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on after the interruption must not be ended by it."""
    monkeypatch.setattr("sdpipe.training.interruption.GRACE_S", 0.1)
    given_up: list[int] = []
    monkeypatch.setattr(os, "_exit", given_up.append)
    with noticing_signals(lambda: None) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            interruption.end()
    time.sleep(0.3)
    assert given_up == []


def test_a_signal_behind_the_last_step_is_heeded(
    project: Path, dataset: DataSet, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the final evaluation: exit 143, and the next start has not a step to take."""
    finish = Trainer.finish

    def finish_interrupted(self: Trainer) -> TrainResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    monkeypatch.setattr(Trainer, "finish", finish_interrupted)
    with pytest.raises(SystemExit, match="143"):
        run_to(project / "out", dataset, epochs=1, milestones=[])
    assert not (project / "out").exists()
    assert the_run(mlflow_store).info.status == "KILLED"
    monkeypatch.setattr(Trainer, "finish", finish)
    monkeypatch.setattr(Trainer, "steps", lambda _self: pytest.fail("a step was taken"))
    run_to(project / "out", dataset, epochs=1, milestones=[])


@pytest.mark.slow
def test_a_reader_who_has_gone_does_not_stop_the_saving(project: Path, mlflow_store: Path) -> None:
    """SIGTERM with standard error closed at the other end."""
    make_dataset(project / "data")
    process = start(project, 100_000)
    wait_for_checkpoint(project, process)
    assert process.stderr is not None
    process.stderr.close()
    process.terminate()
    process.stderr = None
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert the_run(mlflow_store).info.status == "KILLED"


# ---------------------------------------------------------------- a short disk, a short memory


def in_mounts(script: str, project: Path, **environment: str) -> str:
    """Run a shell script in a mount namespace of its own, where it may mount what it likes."""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-eu", "-c", script],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "TRAIN": f"{sys.executable} {WORKER}",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


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
@pytest.mark.parametrize("linked", ["runs", "runs/$NAME"])
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
    ],
    ids=repr,
)
def test_every_kind_of_too_little_memory_is_known(error: Exception) -> None:
    """As CUDA's driver, cuDNN, Python and the kernel say it."""
    says = "^out of memory at train.batch_size 16 in 1 parts"
    with pytest.raises(TrainingError, match=says), memory_on_one_line(train_config()):
        raise error


def test_a_capture_that_was_given_up_for_lack_of_memory_is_one() -> None:
    """torch.cuda.graph ends the capture while the allocator's error passes, which fails in its own words."""

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(TrainingError, match="^out of memory"), memory_on_one_line(train_config()):
        capture()


def test_other_errors_are_not_called_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), memory_on_one_line(train_config()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
