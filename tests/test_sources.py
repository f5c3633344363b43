"""Folders, globs and links of bad will: a line each, and the others are answered."""

import glob
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpipe.runtime.sources import Failure, expand


def names(*arguments: object) -> list[str]:
    """Of files alone."""
    found = list(expand(str(argument) for argument in arguments))
    assert not any(isinstance(each, Failure) for each in found)
    return [str(each) for each in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """a.png, b/c.png and b/d/e.png; links in circles from everywhere to everywhere; hidden ones."""
    root = tmp_path / "tree"
    (root / "b" / "d").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("a.png", "b/c.png", "b/d/e.png", "b/notes.txt", ".hidden/f.png", "b/.g.png"):
        (root / name).write_bytes(b"x")
    for place in (root, root / "b", root / "b" / "d"):
        (place / "up").symlink_to(root)
        (place / "down").symlink_to(root / "b")
    return root


def test_globs_end_where_links_lead_round(tree: Path) -> None:
    """Two links that lead to each other's folder have endless paths between them; ** follows none."""
    everything = [f"{tree}/{name}" for name in ("a.png", "b/c.png", "b/d/e.png")]
    assert names(tree) == everything
    assert names(f"{tree}/**") == everything
    assert names(f"{tree}/**/*.png") == everything
    assert names(f"{tree}/**/**/**/*.png") == everything
    assert names(f"{tree}/**/d/*.png") == everything[2:]
    assert names(f"{tree}/up/*.png") == [f"{tree}/up/a.png"]


def test_other_globs_are_as_pythons(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for folders, which are searched through."""
    monkeypatch.chdir(tree)
    for place in ("", f"{tree}/"):
        for pattern in (
            "*.png",
            "?.png",
            "[!b]*.png",
            "b/*.png",
            "*/*.png",
            "b/.*",
            "*/d/e.png",
            "../*/*.png",
        ):
            expected = [name for name in glob.glob(place + pattern) if not Path(name).is_dir()]  # noqa: PTH207
            assert names(place + pattern) == sorted(expected) != [], pattern
    assert names("**/*.png") == ["a.png", "b/c.png", "b/d/e.png"]
    assert names("**") == ["a.png", "b/c.png", "b/d/e.png"]
    assert names("b*/") == ["b/c.png", "b/d/e.png"]
    assert [each for each in expand(["*.jpg", "a.png/*", "**/x\0*"]) if not isinstance(each, Failure)] == []


@pytest.fixture
def calls_200_deep() -> Iterator[None]:
    """Of Python's 1,000 calls in each other: a tree of 1,000 folders takes seconds to make and remove."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)
    yield
    sys.setrecursionlimit(limit)


def test_a_glob_gives_each_picture_once(tree: Path) -> None:
    """`**/*` matches a picture and all folders above it; the folder without pictures is said once, too."""
    pictures = [f"{tree}/{name}" for name in ("a.png", "b/c.png", "b/d/e.png")]
    (tree / "b" / "d" / "empty.png").mkdir()
    found = list(expand([f"{tree}/**/*"]))
    assert [each for each in found if each in pictures] == pictures
    assert len(found) == len(set(found))
    assert names(f"{tree}/a.png", f"{tree}/[a].png", f"{tree}/a.png") == [f"{tree}/a.png"] * 3


def test_a_name_has_one_spelling_in_a_glob(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`./**/*` matches ./b/c.png, and ./b, which b/c.png lies in. `..` stays: it may lead elsewhere."""
    monkeypatch.chdir(tree)
    for same in ("./**/*", ".//././**/./*"):
        assert names(same) == names("**/*")
    assert names("./**") == names("./**/*.png") == ["a.png", "b/c.png", "b/d/e.png"]
    assert names("*/.") == names("./*/") == names("*/")
    assert names("b/d/../*.png") == ["b/d/../c.png"]
    assert names("b/d/up/../*") == [f"b/d/up/../tree/{name}" for name in ("a.png", "b/c.png", "b/d/e.png")]


def test_what_is_passed_over_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file once, if it is in a folder and no match itself; hidden ones are not meant to be seen."""
    monkeypatch.chdir(tree)
    (tree / "b" / "IMG_1.HEIC").write_bytes(b"x")
    (tree / "b" / "d" / "clip.mp4").write_bytes(b"x")
    for link in [*tree.rglob("up"), *tree.rglob("down")]:
        link.unlink()

    def passed_over(pattern: str) -> list[str]:
        found: list[str] = []
        given = list(expand([pattern], passed_over=found.append))
        assert not set(found) & set(given)
        return found

    everything = ["b/IMG_1.HEIC", "b/notes.txt", "b/d/clip.mp4"]
    for pattern in (".", "**", "*", "./*", "*/"):
        assert passed_over(pattern) == everything, pattern
    assert passed_over("**/*") == []
    assert passed_over("**/d*") == passed_over("**/d") == ["b/d/clip.mp4"]
    assert passed_over("**/[bdn]*") == ["b/IMG_1.HEIC", "b/d/clip.mp4"]


def test_folders_in_folders_in_folders(tmp_path: Path, calls_200_deep: None) -> None:
    """Deeper than Python's calls may be; beyond the system's longest name, one line says so."""
    deep = f"{tmp_path}/deep" + "/d" * 300
    subprocess.run(["mkdir", "-p", deep], check=True)
    Path(deep, "a.png").write_bytes(b"x")
    assert names(tmp_path) == names(f"{tmp_path}/**/*.png") == [f"{deep}/a.png"]
    step = "x" * 250
    command = (
        f"mkdir long && cd long && for _ in {{1..20}}; do mkdir {step} && cd -P {step}; done; touch a.png"
    )
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    (found,) = expand([f"{tmp_path}/long"])
    assert isinstance(found, Failure)
    assert (found.code, found.message) == ("unreadable", "cannot be listed: File name too long")
    (found,) = expand([f"{tmp_path}/long/**/*.png"])
    assert isinstance(found, Failure)


def test_links_that_cannot_be_followed(tmp_path: Path) -> None:
    """A target whose name is too long, and a circle: the decoder's to explain, as one entry among others."""
    (tmp_path / "good.png").write_bytes(b"x")
    (tmp_path / "long.png").symlink_to("x" * 300)
    (tmp_path / "loop.png").symlink_to("loop.png")
    everything = [str(tmp_path / name) for name in ("good.png", "long.png", "loop.png")]
    assert names(*everything) == names(tmp_path) == names(f"{tmp_path}/*") == everything


def test_a_file_of_that_name_is_not_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes(b"x")
    assert names("?") == ["./-"]
    assert names("-") == ["-"]
