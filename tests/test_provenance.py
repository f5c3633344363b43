"""What a result says of the commit that made it."""

import subprocess
from pathlib import Path

import pytest

from sdpipe.provenance import git_state


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
