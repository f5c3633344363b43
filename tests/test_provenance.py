"""What a result says of the commit that made it."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from sdpipe.provenance import git_state, hardware


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("params.yaml", "dvc.lock", "net.py"):
        (tmp_path / name).write_text("before\n")
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "All")):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "is_dirty"), [("params.yaml", False), ("dvc.lock", False), ("net.py", True)]
)
def test_only_changed_code_makes_a_commit_say_less_than_all(
    checkout: Path, name: str, is_dirty: bool
) -> None:
    """Params stand beside every result, and `dvc exp run -S` changes them on purpose."""
    assert git_state(checkout)["git_dirty"] is False
    (checkout / name).write_text("after\n")
    assert git_state(checkout)["git_dirty"] is is_dirty


def test_what_git_does_not_know_is_not_a_change_of_the_code(checkout: Path) -> None:
    (checkout / "pictures.npy").write_text("data\n")
    assert git_state(checkout)["git_dirty"] is False


def test_without_git_both_are_unknown(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"git_commit": None, "git_dirty": None}


def test_a_machine_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are said where they are not one a core."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for num_cores, num_threads, expected in (
        (1, 1, "Abacus, 1 core, x86_64"),
        (1, 3, "Abacus, 1 core, x86_64, 3 threads"),
        (2, None, "Abacus, 2 cores, x86_64"),
        (2, 1, "Abacus, 2 cores, x86_64, 1 thread"),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process, num=num_cores: set(range(num)))
        assert hardware("Abacus", num_threads=num_threads) == expected
    assert hardware("Abacus", num_processes=2) == "Abacus, 2 cores, x86_64, 2 processes"
