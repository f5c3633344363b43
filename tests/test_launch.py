"""machine.launch: the stage becomes its launcher, once."""

import subprocess
import sys

import pytest
from conftest import ROOT

STAGE = """
import os, sys
sys.path.insert(0, {root!r})
from sdpipe.errors import errors_on_one_line
from pipeline import train
with errors_on_one_line():
    train.launch({launcher!r}, "plain")
"""


def launch(launcher: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    code = STAGE.format(root=str(ROOT), launcher=launcher)
    environment["PATH"] = "/usr/bin:/bin"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_launcher_gets_the_stage_as_its_arguments() -> None:
    done = launch("echo --nproc-per-node 2 'two words'")
    assert done.stdout == "--nproc-per-node 2 two words -m pipeline.train plain\n"


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [("no-such-launcher -x", "No such file"), ("torchrun 'open", "No closing quotation"), ("   ", "-m")],
)
def test_a_launcher_that_cannot_be_started_is_one_line(launcher: str, reason: str) -> None:
    done = launch(launcher)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: params.yaml: machine.launch: {launcher!r}: cannot be started: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_launcher_that_is_none_does_not_launch_for_ever() -> None:
    """`python` would start the stage again, which would start the launcher again."""
    done = launch("env python", SDPIPE_LAUNCHED="1")
    assert done.returncode == 1
    assert "expected a launcher like torchrun, which sets WORLD_SIZE" in done.stderr
