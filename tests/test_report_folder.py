"""The folder that a report is written to: what it may replace, and when."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from report_runs import rows_of, write_run

from sdpipe.errors import DataError
from sdpipe.report.write import write_report


def test_only_a_reports_folder_is_replaced(tmp_path: Path) -> None:
    """All of it must be a report's: neither runs nor a note beside a report are lost."""
    models, out = tmp_path / "models", tmp_path / "out"
    write_run(models / "a")
    with pytest.raises(DataError, match="no report wrote a;"):
        write_report([models], models)
    out.mkdir()
    write_report([models], out)
    write_run(models / "b", p_L=1.0, depth=26)
    write_report([models], out)
    assert len(rows_of(out / "runs.csv")) == 2
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"no report wrote notes\.txt"):
        write_report([models], out)
    assert (out / "notes.txt").read_text() == "mine"
    marker = (out / "report.json").read_text()
    (out / "report.json").write_text('{"files": 5}')
    with pytest.raises(DataError, match="no report wrote"):
        write_report([models], out)
    (out / "report.json").write_text(marker)
    (out / "notes.txt").unlink()
    write_report([out], out)  # redrawn in its place
    assert len(rows_of(out / "runs.csv")) == 2


def test_reports_into_one_folder_take_turns_also_to_read(tmp_path: Path) -> None:
    """Of two that redrew a report in its place, one read or took away what the other replaced."""
    turn = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)  # as another report into a folder of it does
    with ThreadPoolExecutor() as pool:
        report = pool.submit(write_report, [tmp_path / "models"], tmp_path / "out")
        begun = wait([report], timeout=0.3)
        write_run(tmp_path / "models" / "a")
        os.close(turn)
    assert not begun.done
    assert report.result() == []


def test_a_disk_that_locks_no_folders_takes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS wants a file that is open for writing, which a folder cannot be."""

    def refuse(_descriptor: int, _kind: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_run(tmp_path / "models" / "a")
    assert write_report([tmp_path / "models"], tmp_path / "out") == []


def test_a_report_of_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        write_report([tmp_path / "gone"], tmp_path / "new" / "below" / "out")
    assert not (tmp_path / "new").exists()
