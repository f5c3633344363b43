"""torchrun's own restarts."""

import os
import signal
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import make_dataset
from test_world import all_ended, pid, start, wait_for_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_again_by_itself(tmp_path: Path, mlflow_store: Path, rank: int) -> None:
    """At once, twice: its store outlives the processes, and held the addresses of those that were killed."""
    make_dataset(tmp_path / "data")
    process = start("run", tmp_path, restarts=2, EPOCHS="100000")
    with all_ended(process, tmp_path):
        wait_for_checkpoint(process)
        assert process.stdout is not None
        lines: list[str] = []
        for _ in range(2):
            killed = pid(tmp_path, rank)
            os.kill(killed, signal.SIGKILL)
            lines += takewhile(lambda line: "continuing after step" not in line, process.stdout)
            assert process.poll() is None
            assert pid(tmp_path, rank) != killed
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert "Gloo connectFullMesh failed" not in "".join(lines)
