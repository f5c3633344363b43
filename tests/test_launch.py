"""machine.launch: the stage becomes its launcher, once; and what a launcher hands to its processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from sdpipe.errors import ConfigError
from sdpipe.training.world import joined_world

pytestmark = pytest.mark.slow

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
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in launch("bash -c env").stdout


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


JOIN = """
from sdpipe.errors import errors_on_one_line
from sdpipe.training import world
world._TELL_S = 1
with errors_on_one_line(), world.joined_world("cpu"):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_waits_for_the_others_to_come_can_be_ended(number: signal.Signals) -> None:
    """Nobody listens on that port, and it would wait for ten minutes."""
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", JOIN]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "process 1 of 2 waits for the others, up to 10 minutes\n"
            process.send_signal(number)
            assert process.wait(10) == -number
        finally:
            process.kill()


MEET = """
import time
from sdpipe.training import world
with world.joined_world("cpu") as both:
    both.wait()
    world._TELL_S = 1
    time.sleep(4 * both.rank)
    both.wait()
"""


def test_who_waits_for_another_says_so_once() -> None:
    """Wherever all meet: before a checkpoint's end, in a validation. It would be silent for ten minutes."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert told[0] == "process 0 of 2 waits for the others, up to 10 minutes\n"


def test_a_port_that_is_taken_is_said_to_be() -> None:
    """No other process has ended, and a new start would not help."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables, "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == f"error: process 0 of 2: port {port} is taken; choose another MASTER_PORT\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("RANK", "2"), ("RANK", "x"), ("MASTER_PORT", "99999999")],
)
def test_odd_variables_of_a_launcher_are_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for each, text in (variables | {name: value}).items():
        monkeypatch.setenv(each, text)
    says = rf"^{name}: expected a number from \d+ to \d+, got '{value}'"
    with pytest.raises(ConfigError, match=says), joined_world("cpu"):
        pass
