"""Files and folders that are written beside what they replace, also by several processes at once."""

import os
import subprocess
from pathlib import Path

import pytest

from sdpipe.files import replacing, replacing_folder


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    """Two commands of one output at once took each other's half-written files; nor is a namesake's taken."""
    target, dead, living = tmp_path / "report", ended_process(), os.getppid()
    left = [tmp_path / f".report.{pid}.tmp" for pid in (dead, os.getpid())]
    kept = [tmp_path / name for name in (f".report.{living}.tmp", f".report.json.{dead}.tmp")]
    for path in (*left, *kept):
        path.mkdir()
        (path / "half").touch()
    with replacing_folder(target) as beside:
        assert not (beside / "half").exists()
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])
    file = tmp_path / "table.csv"
    left, kept = ([tmp_path / f".table.csv.{pid}.tmp"] for pid in (dead, living))
    for path in (*left, *kept):
        path.touch()
    with replacing(file) as beside:
        beside.write_text("whole")
    assert (left[0].exists(), kept[0].exists(), file.read_text()) == (False, True, "whole")


def write_half_and_lose_it(folder: Path, taken: Path) -> None:
    with replacing_folder(folder) as beside:
        (beside / "runs.csv").write_text("new")
        beside.rename(taken)
        with replacing(beside / "table1.csv") as table:
            table.write_text("new")


def test_a_folder_that_is_taken_away_while_it_is_written_does_not_come_back_without_its_files(
    tmp_path: Path,
) -> None:
    """The rest of them would take the place of a whole one."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "runs.csv").write_text("whole")
    with pytest.raises(FileNotFoundError):
        write_half_and_lose_it(tmp_path / "report", tmp_path / "taken")
    assert [path.read_text() for path in (tmp_path / "report").iterdir()] == ["whole"]
