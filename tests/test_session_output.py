"""Who reads what a training prints may leave, hang, or never have been there."""

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_dataset
from picture_files import make_pictures
from session_runs import WORKER, start, steps_saved, the_run, wait_for_checkpoint

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("fault", ["", pytest.param("pictures", marks=pytest.mark.long)])
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


def assert_it_ends(process: "subprocess.Popen[Any]") -> None:
    """Within the ten seconds, as SIGTERM asks; none is left behind."""
    try:
        assert process.wait(10) == 143
    finally:
        process.kill()


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(True, id="MLflow answers", marks=pytest.mark.long),
        pytest.param(False, id="MLflow does not"),
    ],
)
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
        assert_it_ends(process)
    os.close(reader)
    os.close(writer)


@pytest.mark.slow
def test_a_reader_who_pauses_does_not_keep_a_stopped_training(project: Path, mlflow_store: Path) -> None:
    """Standard output is full when it says that it has stopped."""
    make_dataset(project / "data")
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, WORKER, "100000", "5"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=writer,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_for_checkpoint(project, process)
        while select.select([], [writer], [], 0)[1]:
            os.write(writer, b"x" * select.PIPE_BUF)
        process.terminate()
        assert_it_ends(process)
    os.close(reader)
    os.close(writer)
    assert the_run(mlflow_store).info.status == "KILLED"


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
