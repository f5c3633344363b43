"""A user's own pictures: names that file systems, archives and disks make differ, and what is left out."""

import unicodedata
from pathlib import Path

import pytest
from loopback import Files
from test_imagefolder import draw, folder_config, make_tree

from sdpipe.data.fetch import fetch
from sdpipe.data.imagefolder import list_pictures
from sdpipe.errors import DataError

GROESSE = "Gr\u00f6\u00dfe"
DECOMPOSED = unicodedata.normalize("NFD", GROESSE)
NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}


@pytest.mark.parametrize("part", NAMES)
def test_a_part_has_any_of_its_names(tmp_path: Path, part: str) -> None:
    """In letters of either size."""
    for name in NAMES[part]:
        folder = tmp_path / f"as-{name}" / name.capitalize()
        make_tree(folder.parent, (folder.name, *(NAMES.keys() - {part})), num=1)
        listing = list_pictures(folder.parent)
        assert listing.splits.keys() == NAMES.keys()
        assert [path.parent.parent for path, _ in listing.splits[part]] == [folder] * 3


def test_an_ending_has_letters_of_either_size(tmp_path: Path) -> None:
    """As cameras write it; of 24 pictures 8."""
    tree = make_tree(tmp_path / "mine")
    for path in sorted((tree / "bee").iterdir()):
        path.rename(path.with_suffix(".PNG"))
    listing = list_pictures(tree)
    assert [label for _, label in listing.splits["train"]] == [0] * 8 + [1] * 8 + [2] * 8
    assert listing.num_ignored == 0


def test_a_link_to_nowhere_may_have_been_a_class(tmp_path: Path) -> None:
    """As of a disk that is not mounted: without it there would be a class less, and nothing said."""
    for place in ("eel", "bee/more"):
        tree = make_tree(tmp_path / place.replace("/", "-"))
        (tree / place).symlink_to(tmp_path / "not-mounted")
        with pytest.raises(DataError, match=f"{place}: a link to nowhere"):
            fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path) -> None:
    """A copy by way of a Mac may have the accent as a letter of its own."""
    tree = tmp_path / "mine"
    for split, name in (("train", GROESSE), ("test", DECOMPOSED)):
        draw(tree / split / name / "0.png", (0, 0, 0))
        draw(tree / split / "other" / "0.png", (90, 0, 0))
    meta = fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    assert meta["class_names"] == [GROESSE, "other"]
    assert meta["test_images_per_class"] == [1, 1]
    draw(tree / "train" / DECOMPOSED / "1.png", (0, 9, 0))
    with pytest.raises(DataError, match=f"a second folder of the class {GROESSE}"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_a_class_without_a_picture_says_what_is_there(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine")
    for path in sorted((tree / "cow").iterdir()):
        path.rename(path.with_suffix(".HEIC"))
    (tree / "cow" / "0.HEIC").rename(tree / "cow" / "0")
    with pytest.raises(DataError, match="cow: .* its files are 7 .HEIC, 1 without ending"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    for path in (tree / "cow").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="cow: .* it is empty"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_pictures_in_no_class_folder_are_counted_as_left_out(tmp_path: Path, splits: tuple[str, ...]) -> None:
    tree = make_tree(tmp_path / "around" / "mine", splits)
    for folder in {tree.parent, tree, *(tree / split for split in splits)}:
        draw(folder / "loose.png", (0, 0, 0))
    meta = fetch("imagefolder", folder_config(tree.parent), tmp_path / "out", tmp_path / "dl")
    assert meta["source"]["num_ignored_files"] == 2 + len([split for split in splits if split])


def test_what_a_server_sent_in_place_of_an_archive_is_named_by_its_address(
    tmp_path: Path, files: Files
) -> None:
    """Such as a page that asks for a password; a query may be one, and is not shown."""
    files.content["/pictures.zip?key=secret"] = b"<html>sign in</html>"
    config = folder_config(f"{files.url}pictures.zip?key=secret")
    with pytest.raises(DataError) as caught:
        fetch("imagefolder", config, tmp_path / "out", tmp_path / "dl")
    assert str(caught.value).startswith(f"{files.url}pictures.zip: damaged, truncated or no archive")
    assert str(tmp_path) not in str(caught.value)
    assert not list((tmp_path / "dl").rglob("pictures.zip")), "it would be downloaded again"
