"""Ctrl-C and SIGTERM: noticed anywhere, one line, and an end in time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from sdpipe.training.interruption import noticing_signals


def test_a_second_sigterm_does_not_cut_the_saving_short() -> None:
    """A scheduler sends one to every process, and torchrun sends it on; a second Ctrl-C is a person's."""
    with noticing_signals(lambda: None) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_what_is_left_of_seven_seconds_is_for_mlflow() -> None:
    """Two at least; and who presses Ctrl-C twice waits no longer."""
    with noticing_signals(lambda: None) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.remaining_s() == pytest.approx(7, abs=0.5)
        time.sleep(1)
        assert interruption.remaining_s() == pytest.approx(6, abs=0.5)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.remaining_s() == 2


def run_python(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own; waits for the end of its output, too."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(("error", "code"), [("KeyboardInterrupt", 130), ("ValueError('ours')", 1)])
def test_ctrl_c_while_a_stage_is_imported_is_one_line(error: str, code: int) -> None:
    """The import of PyTorch and its kind takes seconds. Other errors keep their traceback."""
    done = run_python(f"import pipeline; raise {error}")
    assert done.returncode == code
    assert done.stderr == "interrupted\n" if code == 130 else "Traceback" in done.stderr


HELD = """
import multiprocessing.util, os, signal, time
from sdpipe.training import interruption
interruption.GRACE_S = interruption.ENDING_S = 1.0
open(multiprocessing.util.get_temp_dir() + "/listener", "x")
with interruption.ending_at_once(), interruption.noticing_signals(lambda: None) as asked:
    multiprocessing.Process(target=time.sleep, args=(60,)).start()
    os.kill(os.getpid(), signal.SIGTERM)
    {then}
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["pass", "asked.allow_last_words()", "asked.end()"])
def test_who_decodes_pictures_ends_with_a_training_that_is_given_up(then: str, tmp_path: Path) -> None:
    """They hold its output, for whose end `run` waits, as a supervisor does. Their sockets go, too."""
    done = run_python(HELD.format(then=then), TMPDIR=str(tmp_path))
    assert (done.returncode, list(tmp_path.iterdir())) == (143, [])


SHORT_OF_MEMORY = """
import _thread, os, signal, threading, time
from sdpipe.training import interruption
interruption.GRACE_S = interruption.ENDING_S = 1.0
def start_new_thread(*_arguments):
    {fault}
with interruption.noticing_signals(lambda: interruption.tell_in_time("not closed")) as asked:
    threading._start_new_thread = _thread.start_new_thread = start_new_thread
    interruption.tell_in_time("a warning")
    os.kill(os.getpid(), signal.SIGTERM)
    {then}
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["pass", "asked.allow_last_words()"])
@pytest.mark.parametrize("fault", ["return 7", 'raise RuntimeError("can\'t start new thread")'])
def test_a_training_without_memory_for_a_thread_ends_in_time(fault: str, then: str) -> None:
    """It dies as it begins, for which Thread.start() waits for ever, or there is no room for its stack."""
    done = run_python(SHORT_OF_MEMORY.format(fault=fault, then=then))
    assert (done.returncode, done.stderr) == (143, "")


ENDING = """
import atexit, sys, time
from sdpipe.errors import errors_on_one_line
from sdpipe.training.interruption import ending_at_once
atexit.register(lambda: time.sleep(30))
with ending_at_once(), errors_on_one_line():
    print("saved")
    raise {raised}
"""


@pytest.mark.parametrize(("raised", "code"), [("KeyboardInterrupt", 130), ("SystemExit(143)", 143)])
def test_an_interrupted_process_does_not_take_its_time_to_end(raised: str, code: int) -> None:
    """What waits to be done at the interpreter's end (30 s here) is not waited for; what was said is seen."""
    done = run_python(ENDING.format(raised=raised))
    assert done.returncode == code
    assert done.stdout == "saved\n"
