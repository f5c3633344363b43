"""`sdpipe evaluate`: a deployed file on new pictures of known class. Classes are cat, dog, eel."""

import json
import shlex
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import export_to, make_weights, random_images
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from test_sources import calls_200_deep  # noqa: F401  a fixture

from sdpipe.cli import main
from sdpipe.data.imagefolder import list_pictures
from sdpipe.errors import DataError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.interval import error_interval
from sdpipe.runtime.labelled import list_labelled

NAMES = ["cat", "dog", "eel"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, with a head by whose bias the pictures here are of different classes."""
    folder, weights = tmp_path_factory.mktemp("model"), make_weights()
    logits_NK = open_artifact(export_to(folder / "all-dogs.onnx", weights), "cpu").run(random_images(30))[0]
    weights.state["head.bias"] -= torch.from_numpy(logits_NK.mean(axis=0))
    return export_to(folder / "model.onnx", weights)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Thirty noisy pictures in two class folders, some of them a folder deeper; none is an eel."""
    for at, image in enumerate(random_images(30)):
        folder = tmp_path / "new" / NAMES[at % 3 == 0] / ("more" if at > 20 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{at:02}.png")
    return tmp_path / "new"


def by_hand(labelled: Path, model_path: Path) -> tuple[list[str], list[str]]:
    """What each picture is, and what onnxruntime takes it for."""
    paths = sorted(labelled.rglob("*.png"))
    pixels_NHWC = np.stack([np.asarray(Image.open(path))[..., None] for path in paths])
    probabilities_NK = open_artifact(model_path, "cpu").run(pixels_NHWC)[1]
    return [path.relative_to(labelled).parts[0] for path in paths], [
        NAMES[k] for k in probabilities_NK.argmax(axis=1)
    ]


def test_the_figures_are_scikit_learns(labelled: Path, model_path: Path) -> None:
    """Of the classes by folder and onnxruntime's; where there is nothing to divide by, there is no figure."""
    result = call(labelled, "--model", model_path, "--json", "--batch-size", 7)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    true, said = by_hand(labelled, model_path)
    assert len(set(said)) > 1
    assert facts["test_error"] == pytest.approx(np.mean([a != b for a, b in zip(true, said, strict=True)]))
    assert facts["confusion"] == confusion_matrix(true, said, labels=NAMES).tolist()
    for name, function in (("precision", precision_score), ("recall", recall_score)):
        expected = function(true, said, labels=NAMES, average=None, zero_division=np.nan)
        found = [np.nan if row[name] is None else row[name] for row in facts["classes"]]
        np.testing.assert_allclose(found, expected)
    assert [row["images"] for row in facts["classes"]] == [20, 10, 0]
    assert (facts["num_test"], facts["num_failed"]) == (30, 0)


def test_mistakes_are_named_with_what_they_are_taken_for(labelled: Path, model_path: Path) -> None:
    result = call(labelled, "--model", model_path, "--mistakes")
    true, said = by_hand(labelled, model_path)
    expected = [
        f"{path}: {one}, taken for {other} "
        for path, one, other in zip(sorted(labelled.rglob("*.png")), true, said, strict=True)
        if one != other
    ]
    lines = result.stdout.splitlines()
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=False))
    assert lines[len(expected)].split()[:2] == ["class", "pictures"]
    assert f": {len(expected)} of 30 pictures (95 % interval" in lines[-1]
    for at, name in enumerate(("cat", "dog"), start=1):
        others = Counter(other for one, other in zip(true, said, strict=True) if one == name != other)
        (most,) = (f"{other} ({count})" for other, count in others.most_common(1))
        assert lines[len(expected) + at].split() == [name, ANY, ANY, ANY, *most.split()]


def test_what_cannot_be_read_is_named_and_not_counted(labelled: Path, model_path: Path) -> None:
    (labelled / "dog" / "00.png").write_bytes(b"not a picture")
    result = call(labelled, "--model", model_path, "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {labelled / 'dog' / '00.png'}: not a picture")
    facts = json.loads(result.stdout)
    assert (facts["num_test"], facts["num_failed"]) == (29, 1)


def test_folders_that_are_no_classes_are_refused(labelled: Path, model_path: Path, tmp_path: Path) -> None:
    """Before anything is predicted: a misspelt class would count as nothing but mistakes."""
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "cat").symlink_to("nowhere")
    (labelled / "cat" / "round").symlink_to("..")
    (tmp_path / "other" / "dogs").mkdir(parents=True)
    for folder, words in (
        (tmp_path / "other", "dogs: not one of the network's 3 classes (cat, dog, eel)"),
        (labelled / "cat" / "more", "expected folders named like the network's classes (cat, dog, eel)"),
        (tmp_path / "gone", f"{tmp_path / 'gone'}: no such folder"),
        (model_path, f"{model_path}: expected a folder of class folders, found a file"),
        (tmp_path / "empty", f"{tmp_path / 'empty'}: no picture there could be judged"),
        (tmp_path / "file", f"{tmp_path / 'file' / 'cat'}: named like a class; expected a folder"),
        (labelled, f"{labelled / 'cat' / 'round'}: a link to a folder that it lies in"),
    ):
        result = call(folder, "--model", model_path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert words in result.stderr.splitlines()[-1]
    for argument in ("", "http://127.0.0.1:9/new"):
        assert call(argument, "--model", model_path).exit_code == 2


def test_what_is_left_out_is_said(labelled: Path, model_path: Path) -> None:
    """Beside the classes and in them; what archivers add is not worth a word."""
    (labelled / "dog" / "IMG_1.HEIC").touch()
    (labelled / "stray.png").write_bytes((labelled / "dog" / "00.png").read_bytes())
    (labelled / "__MACOSX").mkdir()
    (labelled / "eel").mkdir()
    result = call(labelled, "--model", model_path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["num_test"] == 30
    assert "were left out: " in result.stderr
    assert {"1 .heic", "1 .png"} == set(result.stderr.strip().rpartition(": ")[2].split(", "))


def test_folders_are_read_as_for_training(labelled: Path, tmp_path: Path) -> None:
    """Links to folders included; each picture has the class that `fetch` would give it."""
    (tmp_path / "elsewhere").mkdir()
    (labelled / "dog" / "00.png").rename(tmp_path / "elsewhere" / "x.png")
    (labelled / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    listing = list_pictures(labelled)
    expected = {(listing.class_names[k], str(path)) for path, k in listing.splits["train"]}
    assert set(list_labelled(labelled, NAMES)) == expected
    assert len(expected) == 30


def test_a_link_that_leads_round_is_named_as_for_training(labelled: Path) -> None:
    """The link itself, which a training walked through to a folder behind it."""
    (labelled / "cat" / "round").symlink_to("..")
    for walk in (list_pictures, lambda root: list(list_labelled(root, NAMES))):
        with pytest.raises(DataError, match="/cat/round: a link to a folder that it lies in"):
            walk(labelled)


@pytest.mark.usefixtures("calls_200_deep")
def test_a_picture_many_folders_deep_counts_as_for_training(labelled: Path) -> None:
    """Deeper than Python's calls may be: os.walk() ended in a traceback."""
    deep = labelled / "cat" / "/".join(["d"] * 300)
    subprocess.run(["mkdir", "-p", deep], check=True)
    (deep / "x.png").touch()
    (path,) = [path for path, _ in list_pictures(labelled).splits["train"] if path.name == "x.png"]
    assert ("cat", str(path)) in set(list_labelled(labelled, NAMES))


def test_names_that_are_no_plain_folders(tmp_path: Path) -> None:
    """Fashion-MNIST has T-shirt/top; an accent is a letter of its own, or not, as the file system likes."""
    names = ["T-shirt/top", "T-shirt/long", "caf\u00e9", ".hidden"]
    for folder in ("T-shirt/top", "T-shirt/long", "cafe\u0301", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.png").touch()
    found = dict(list_labelled(tmp_path, names))
    assert found.keys() == set(names)
    assert found["T-shirt/top"] == str(tmp_path / "T-shirt" / "top" / "0.png")
    both = ["caf\u00e9", "cafe\u0301", "T-shirt/top", "T-shirt/long", ".hidden"]
    assert "caf\u00e9" not in dict(list_labelled(tmp_path, both))
    (tmp_path / "forms" / "\u1eb9\u0302").mkdir(parents=True)
    two_forms = [unicodedata.normalize(form, "\u1ec7") for form in ("NFC", "NFD")]
    with pytest.raises(DataError, match="not one of the network's 2 classes"):
        list(list_labelled(tmp_path / "forms", two_forms))
    (tmp_path / "T-shirt" / "short").mkdir()
    with pytest.raises(DataError, match="short: not one of the network's 4 classes"):
        list(list_labelled(tmp_path, names))


def test_a_closed_standard_output_is_an_error(labelled: Path, model_path: Path) -> None:
    command = [sys.executable, "-m", "sdpipe", "evaluate", str(labelled), "--model", str(model_path)]
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(command)} >&-"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: standard output is closed\n")


@pytest.mark.parametrize(
    ("num_wrong", "num_images"), [(0, 1), (1, 1), (0, 30), (10, 360), (7, 7), (500, 9999)]
)
def test_the_interval_is_scipys(num_wrong: int, num_images: int) -> None:
    expected = binomtest(num_wrong, num_images).proportion_ci(0.95, method="wilson")
    assert error_interval(num_wrong, num_images) == pytest.approx((expected.low, expected.high), abs=1e-12)
