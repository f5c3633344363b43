"""Checkpoints: whole or not at all, and no damaged one is used silently."""

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdpipe.errors import TrainingError
from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder, remove_folder

FINGERPRINT = "0123456789abcdef"


def checkpoint(num_steps: int) -> Checkpoint:
    return Checkpoint(
        num_steps=num_steps,
        tensors={"network.x": torch.full((3,), float(num_steps))},
        state={"history": []},
    )


def saved(folder: Path, *steps: int) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, FINGERPRINT)
    for num_steps in steps:
        checkpoints.save(checkpoint(num_steps))
    return checkpoints


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    found, damaged = saved(tmp_path, 7).load_newest()
    assert found is not None
    assert (found.num_steps, found.state, damaged) == (7, {"history": []}, [])
    assert torch.equal(found.tensors["network.x"], torch.full((3,), 7.0))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003", "step-0000000012"]
    found, _ = checkpoints.load_newest()
    assert found is not None
    assert found.num_steps == 12


def test_the_state_behind_a_validation_is_not_that_before_it(tmp_path: Path) -> None:
    """Both are of the same step; the one behind it is newer, and the one before stays until then."""
    checkpoints = saved(tmp_path, 1)
    checkpoints.save(replace(checkpoint(2), is_unvalidated=True, state={"history": ["before"]}))
    found, _ = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, found.is_unvalidated, found.state) == (2, True, {"history": ["before"]})
    checkpoints.save(checkpoint(2))
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.is_unvalidated, found.state, damaged) == (False, {"history": []}, [])
    assert [path.name for path in checkpoints.paths()] == ["step-0000000002", "step-0000000002-unvalidated"]
    checkpoints.save(checkpoint(3))
    assert [path.name for path in checkpoints.paths()] == ["step-0000000003", "step-0000000002"]


def test_sha256sum_can_check_them(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "step-0000000001",
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "tensors.safetensors: OK\nstate.json: OK\n"


DAMAGES = (
    "flipped bit in tensors.safetensors",
    "flipped bit in state.json",
    "flipped bit in SHA256SUMS",
    "truncated tensors.safetensors",
    "empty state.json",
    "no tensors.safetensors",
    "no state.json",
    "no SHA256SUMS",
    "swapped SHA256SUMS",
    "an older one under its name",
    "of another training",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    older, newer = tmp_path / "step-0000000001", tmp_path / "step-0000000002"
    path = newer / damage.split()[-1]
    if damage.startswith("flipped"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif damage.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-4])
    elif damage.startswith("empty"):
        path.write_bytes(b"")
    elif damage.startswith("no "):
        path.unlink()
    elif damage.startswith("swapped"):
        shutil.copy(older / "SHA256SUMS", path)
    elif damage.startswith("an older"):
        shutil.rmtree(newer)
        shutil.copytree(older, newer)
    else:
        shutil.rmtree(newer)
        CheckpointFolder(tmp_path, "f" * 16).save(checkpoint(2))
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert found.num_steps == 1
    assert len(damaged) == 1
    assert damaged[0].startswith(f"checkpoint {newer} is damaged and passed over: ")
    checkpoints.save(checkpoint(2))  # the training comes here again
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, damaged) == (2, [])


def test_when_all_are_damaged_none_is_used(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for folder in tmp_path.iterdir():
        (folder / "state.json").unlink()
    found, damaged = checkpoints.load_newest()
    assert found is None
    assert len(damaged) == 2


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_full_disk_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever of three files and their folder it fails at; `test_session_limits.py` fills a disk."""
    checkpoints = saved(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = 0

    def fsync(_descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(checkpoint(3))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-0000000001", tmp_path / ".step-0000000002.abc.tmp")
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, damaged) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]


def test_all_is_synced_before_the_name_and_the_name_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files and their folder, then the rename, then the folder around it."""
    checkpoints = saved(tmp_path, 1)
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(path.name.partition(".")[0] or "step")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    checkpoints.save(checkpoint(2))
    assert done == ["tensors", "state", "SHA256SUMS", "step", "rename", tmp_path.name]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    """A file system's own files, a person's backup, a file with a checkpoint's name."""
    checkpoints = saved(tmp_path, 1, 2, 3)
    (tmp_path / ".nfs0001").touch()
    (tmp_path / "step-0000000099").touch()
    (tmp_path / "backup").mkdir()
    (tmp_path / "step-abc").mkdir()
    checkpoints.save(checkpoint(4))
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, damaged) == (4, [])
    assert {".nfs0001", "step-0000000099", "backup", "step-abc"} <= {path.name for path in tmp_path.iterdir()}


def test_reading_touches_nothing(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "step-0000000002" / "state.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    found, damaged = checkpoints.read_newest()
    assert found is not None
    assert found.num_steps == 1
    assert len(damaged) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert CheckpointFolder(tmp_path / "none", FINGERPRINT).read_newest() == (None, {})


@pytest.mark.parametrize("what", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_one_that_cannot_be_read_stops_and_is_there_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: int, name: str
) -> None:
    """As on a network disk that is away for a while: nothing is damaged, and nothing is passed over."""
    checkpoints = saved(tmp_path, 1, 2)
    newest, read_bytes = tmp_path / "step-0000000002", Path.read_bytes

    def away(self: Path) -> bytes:
        if self == newest / name:
            raise OSError(what, os.strerror(what), str(self))
        return read_bytes(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", away)
        with pytest.raises(TrainingError, match=f"checkpoint {newest} cannot be read.*{os.strerror(what)}"):
            checkpoints.load_newest()
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, damaged) == (2, [])


@pytest.mark.parametrize("odd", ["file", "link", "link to nothing"])
def test_what_stands_in_a_checkpoints_place_is_put_aside(tmp_path: Path, odd: str) -> None:
    """It is not read, and a link is named; when that step is saved nothing keeps it from being written."""
    checkpoints = saved(tmp_path / "run", 1, 2)
    path = checkpoints.folder / "step-0000000003"
    if odd == "file":
        path.touch()
    else:
        path.symlink_to("step-0000000002" if odd == "link" else "gone")
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert found.num_steps == 2
    assert damaged == ([] if odd == "file" else [f"checkpoint {path} is a link and passed over"])
    checkpoints.save(checkpoint(3))
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, damaged) == (3, [])


def test_left_files_of_odd_kinds_are_no_obstacle(tmp_path: Path) -> None:
    """A file where a folder was being written, and one under the name that a damaged checkpoint gets."""
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / ".step-0000000003.abc.tmp").touch()
    (tmp_path / "damaged-step-0000000002").touch()
    (tmp_path / "step-0000000002" / "state.json").write_text("")
    found, damaged = checkpoints.load_newest()
    assert found is not None
    assert (found.num_steps, len(damaged)) == (1, 1)
    assert (tmp_path / "damaged-step-0000000002").is_dir()


def test_a_removal_that_was_killed_is_done_by_the_next(tmp_path: Path) -> None:
    """Its hidden folder would stand in the way of every removal of that name."""
    saved(tmp_path, 1)
    left = tmp_path / ".step-0000000001.old.tmp"
    left.mkdir()
    (left / "state.json").touch()
    remove_folder(tmp_path / "step-0000000001")
    assert list(tmp_path.iterdir()) == []
