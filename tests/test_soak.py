"""The kill harness in its short form; `make soak` is the long one, docs/soak.md its result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_nothing_is_lost_in_the_short_form(tmp_path: Path) -> None:
    """A tenth of everything or less; every seventh system call."""
    page = tmp_path / "soak.md"
    options = ["--kills", "8", "--terms", "3", "--every-call", "7", "--damages", "30"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "soak.py"), *options, "--out", str(page)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text().count("\n| ") == 6


def test_the_page_in_the_docs_is_of_the_long_form() -> None:
    """At least 100 kills, every call, 200 damaged checkpoints, and its date."""
    page = (ROOT / "docs" / "soak.md").read_text()
    assert re.search(r"`make soak` on 20\d\d-\d\d-\d\d", page)
    kills = re.search(r"SIGKILL at a random instant \| (\d+) in", page)
    calls = re.search(r"(\d+) of (\d+) calls", page)
    damaged = re.search(r"damaged checkpoints \| (\d+) ", page)
    assert kills is not None
    assert int(kills[1]) >= 100
    assert calls is not None
    assert calls[1] == calls[2]
    assert damaged is not None
    assert int(damaged[1]) >= 200
