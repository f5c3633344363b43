"""A user's own pictures: layouts, archives, and what is wrong with them."""

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_fetch import left_behind, tar_of
from test_sources import calls_200_deep  # noqa: F401  a fixture

from sdpipe.data import imagefolder
from sdpipe.data.config import ImageFolderConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.store import open_dataset
from sdpipe.errors import DataError
from sdpipe.runtime.folders import files_of_class
from sdpipe.runtime.image import decode


def folder_config(source: Path | str, **overrides: object) -> ImageFolderConfig:
    values = {
        "source": str(source),
        "sha256": None,
        "image_size": 8,
        "channels": 3,
        "test_fraction": 0.25,
        "seed": 0,
    }
    return ImageFolderConfig(**(values | overrides))


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_tree(root: Path, splits: tuple[str, ...] = ("",), num: int = 8) -> Path:
    for number, split in enumerate(splits):
        for k, name in enumerate(("ant", "bee", "cow")):
            for at in range(num):
                draw(root / split / name / f"{at}.png", (80 * k, 10 * at, 40 * number), (5 + at, 9))
    return root


def test_one_tree_is_split_stratified_and_the_same_each_time(tmp_path: Path) -> None:
    """A quarter of 8 pictures of each class is 2; any size becomes the configured one."""
    tree = make_tree(tmp_path / "mine")
    metas = [
        fetch("imagefolder", folder_config(tree), tmp_path / f"out{at}", tmp_path / "dl") for at in range(2)
    ]
    assert metas[0]["class_names"] == ["ant", "bee", "cow"]
    assert metas[0]["train_images_per_class"] == [6, 6, 6]
    assert metas[0]["test_images_per_class"] == [2, 2, 2]
    assert metas[0] == metas[1]
    other = fetch("imagefolder", folder_config(tree, seed=1), tmp_path / "out2", tmp_path / "dl")
    assert other["sha256"] != metas[0]["sha256"]


def test_no_more_threads_decode_than_there_are_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process, which a container may give fewer than the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    decoded_by: set[str] = set()

    def slow(*arguments: Any) -> np.ndarray:
        decoded_by.add(threading.current_thread().name)
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(imagefolder, "decode", slow)
    fetch("imagefolder", folder_config(make_tree(tmp_path / "mine", ("train",))), tmp_path / "out", tmp_path)
    assert len(decoded_by) == 2, "one for each part of the data"


def test_given_splits_are_kept(tmp_path: Path) -> None:
    """The validation folder becomes a part of the training images, which the split uses as it is."""
    tree = make_tree(tmp_path / "mine", ("train", "val", "test"), num=4)
    fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.train_parts == (("train", 12), ("validation", 12))
    assert len(dataset.test_labels_N) == 12
    # Blue tells the split: train 0, val 40, test 80.
    assert {int(image[0, 0, 2]) for image in dataset.train_images[12:]} == {40}
    assert {int(image[0, 0, 2]) for image in dataset.test_images_NHWC} == {80}


def test_a_lone_train_folder_is_split_too(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ("train",))
    assert fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")["num_test"] == 6


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_of_a_tree(tmp_path: Path, kind: str) -> None:
    tree = make_tree(tmp_path / "mine", ("train", "test"))
    members = {f"pictures/{p.relative_to(tree)}": p.read_bytes() for p in sorted(tree.rglob("*.png"))}
    path = tmp_path / f"pictures.{kind}"
    if kind == "tar":
        path.write_bytes(tar_of(members))
    else:
        with zipfile.ZipFile(path, "w") as zip_file:
            for name, content in members.items():
                zip_file.writestr(name, content)
    meta = fetch("imagefolder", folder_config(path), tmp_path / "out", tmp_path / "dl")
    assert (meta["num_train"], meta["num_test"]) == (24, 24)


def test_a_zip_that_would_escape_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zip_file:
        zip_file.writestr("../escaped.png", b"x")
    with pytest.raises(DataError, match=r"x\.zip: refused, its member '\.\./escaped\.png'"):
        fetch("imagefolder", folder_config(tmp_path / "x.zip"), tmp_path / "data" / "out", tmp_path / "dl")
    assert left_behind(tmp_path) == ["data", "x.zip"]


def test_an_unreadable_picture_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine")
    (tree / "bee" / "3.png").write_bytes((tree / "bee" / "3.png").read_bytes()[:40])
    (tree / "cow" / "x.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"bee/3\.png: .*; .*cow/x\.jpg: not a picture"):
        fetch("imagefolder", folder_config(tree), tmp_path / "data" / "out", tmp_path / "dl")
    assert left_behind(tmp_path / "data") == []


def test_unreadable_pictures_of_all_parts_are_named_at_once(tmp_path: Path) -> None:
    """Those of the test part would else be told when the others are mended."""
    tree = make_tree(tmp_path / "mine", ("train", "test"))
    for split in ("train", "test"):
        (tree / split / "cow" / "x.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"train/cow/x\.jpg: .*; .*test/cow/x\.jpg: not a picture"):
        fetch("imagefolder", folder_config(tree), tmp_path / "data" / "out", tmp_path / "dl")


def test_other_files_are_counted_not_read(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine")
    (tree / "bee" / "notes.txt").write_text("hello")
    (tree / "bee" / ".DS_Store").write_text("junk")
    meta = fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    assert meta["source"]["num_ignored_files"] == 1


def test_a_class_that_one_split_lacks_is_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ("train", "test"))
    for path in sorted((tree / "test" / "cow").iterdir()):
        path.unlink()
    with pytest.raises(DataError, match="test/cow: class folder without a picture"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    (tree / "test" / "cow").rmdir()
    with pytest.raises(DataError, match="test/cow: class folder missing"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    draw(tree / "test" / "cow" / "0.png", (0, 0, 0))
    draw(tree / "test" / "dog" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="test/dog: a class that the training part does not have"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_no_folder_and_no_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        fetch("imagefolder", folder_config(tmp_path / "nowhere"), tmp_path / "out", tmp_path / "dl")
    draw(tmp_path / "flat" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="flat: expected a folder for each of at least 2 classes"):
        fetch("imagefolder", folder_config(tmp_path / "flat"), tmp_path / "out", tmp_path / "dl")


def test_images_in_both_parts_are_counted(tmp_path: Path) -> None:
    """Two of the test pictures are, pixel for pixel, training pictures, under other names."""
    for split, shades in (("train", [0, 1, 2, 3]), ("test", [2, 3, 4])):
        for k, name in enumerate(("ant", "bee")):
            for shade in shades:
                draw(
                    tmp_path / "mine" / split / name / f"{split}{shade}.png",
                    (100 * k, 9 * shade, 7 if k else 0),
                )
    draw(tmp_path / "mine" / "test" / "ant" / "again.png", (0, 18, 0))  # ant's shade 2
    meta = fetch("imagefolder", folder_config(tmp_path / "mine"), tmp_path / "out", tmp_path / "dl")
    # ant 2, ant 3, bee 2, bee 3, and ant 2 again.
    assert meta["test_images_also_in_train"] == 5
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta


def test_an_unfinished_data_set_is_not_opened(tmp_path: Path) -> None:
    make_tree(tmp_path / "mine")
    fetch("imagefolder", folder_config(tmp_path / "mine"), tmp_path / "out", tmp_path / "dl")
    (tmp_path / "out" / "test_labels.npy").unlink()
    with pytest.raises(DataError, match="out: no whole data set"):
        open_dataset(tmp_path / "out")


@pytest.mark.usefixtures("calls_200_deep")
def test_folders_around_folders_are_gone_into_however_many(tmp_path: Path) -> None:
    """More than Python has calls in each other."""
    deep = tmp_path / "/".join(["a"] * 300)
    subprocess.run(["mkdir", "-p", deep], check=True)
    make_tree(deep)
    meta = fetch("imagefolder", folder_config(tmp_path / "a"), tmp_path / "out", tmp_path / "dl")
    assert meta["class_names"] == ["ant", "bee", "cow"]


def test_splits_without_a_training_part_are_no_classes(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ("test", "val"))
    with pytest.raises(DataError, match="mine/train: no such folder, beside test"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ("train", "val", "validation"))
    with pytest.raises(DataError, match="validation: the validation part is .*/val already"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_hidden_copies_are_not_read_and_links_to_nowhere_are_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine")
    draw(tree / "bee" / ".ipynb_checkpoints" / "0.png", (0, 0, 0))
    assert fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")["num_train"] == 18
    (tree / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="bee/gone.png: a link to nowhere"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_a_digest_for_a_folder_is_refused(tmp_path: Path) -> None:
    config = folder_config(make_tree(tmp_path / "mine"), sha256="0" * 64)
    with pytest.raises(DataError, match="expected null for a folder"):
        fetch("imagefolder", config, tmp_path / "out", tmp_path / "dl")


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """Of a class, and inside of one; what leads round in a circle is named."""
    tree = make_tree(tmp_path / "mine")
    make_tree(tmp_path / "other")
    (tree / "ant" / "more").symlink_to(tmp_path / "other" / "ant")
    (tree / "dog").symlink_to(tmp_path / "other" / "bee")
    meta = fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    assert meta["class_names"] == ["ant", "bee", "cow", "dog"]
    assert meta["num_train"] + meta["num_test"] == 16 + 8 + 8 + 8
    (tmp_path / "project" / "more").mkdir(parents=True)
    (tree / "ant" / "project").symlink_to(tmp_path / "project")
    with pytest.MonkeyPatch.context() as elsewhere:  # `..` leads out of where the link leads to
        elsewhere.chdir(tmp_path / "project")
        assert len(list(files_of_class(Path("../mine/ant"), pytest.fail))) == 16
    (tree / "ant" / "round").symlink_to(tree / "ant")
    with pytest.raises(DataError, match=r"ant/round: a link to a folder that it lies in"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


def test_a_class_may_be_called_like_a_python_name(tmp_path: Path) -> None:
    """What macOS packs beside the pictures is none."""
    tree = make_tree(tmp_path / "mine")
    (tree / "cow").rename(tree / "__background__")
    (tree / "__MACOSX").mkdir()
    meta = fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")
    assert meta["class_names"] == ["__background__", "ant", "bee"]


UNREADABLE = """
import sys
from pathlib import Path
from sdpipe.data.imagefolder import list_pictures
from sdpipe.errors import errors_on_one_line
with errors_on_one_line():
    print(len(list_pictures(Path(sys.argv[1])).splits["train"]))
"""
NO_SUPERUSER = (
    "setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ant", "ant/more"])
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, name: str) -> None:
    tree = make_tree(tmp_path / "mine")
    (tree / name).mkdir(exist_ok=True)
    (tree / name).chmod(0)
    words = [*(NO_SUPERUSER if os.geteuid() == 0 else ()), sys.executable, "-c", UNREADABLE, str(tree)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    (tree / name).chmod(0o755)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tree / name}: cannot be listed: Permission denied\n"


def test_pictures_of_an_archive_are_named_by_it(tmp_path: Path) -> None:
    """Not by the place where it was unpacked, which is gone."""
    path = tmp_path / "pictures.tar"
    path.write_bytes(tar_of({f"{name}/{at}.png": b"x" for name in ("ant", "bee") for at in range(8)}))
    with pytest.raises(DataError, match=rf"^{path}/ant/\d\.png: "):
        fetch("imagefolder", folder_config(path), tmp_path / "out", tmp_path / "dl")
