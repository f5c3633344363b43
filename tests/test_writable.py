"""Whether a file can be written is seen before the work for it, and leaves nothing."""

from pathlib import Path

import pytest

from sdpipe.commands.writable import check_can_be_written


def test_what_can_be_written_stays_as_it_is(tmp_path: Path) -> None:
    """A file that is there, one that is not, and one in folders that are not."""
    (tmp_path / "old").write_text("old")
    for path in ("old", "new", "a/b/new", "a/../b/new"):
        check_can_be_written(tmp_path / path)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path: Path) -> None:
    """Whatever was tried under another name in its folder."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    long = tmp_path / "a" / ("x" * 255)
    for path in (Path("/proc/net.onnx"), tmp_path / "file" / "x", long, tmp_path / "folder"):
        with pytest.raises(OSError, match="Errno") as caught:
            check_can_be_written(path)
        assert caught.value.filename == str(path)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}
