"""The command line as people and scripts call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import SIZE, random_images
from PIL import Image

from sdpipe.cli import main
from sdpipe.runtime.artifact import open_artifact


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine grey PNGs in two folders, and a text file."""
    for at, image in enumerate(random_images(9)):
        folder = tmp_path / "pictures" / ("a" if at < 5 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{at}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("hello")
    return tmp_path / "pictures"


def call(*arguments: object, **keywords: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **keywords)  # type: ignore[arg-type]


def objects(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_probabilities_are_the_files_own(pictures: Path, model_path: Path) -> None:
    """JSON lines in input order: label and probability are those of onnxruntime on the same pixels."""
    result = call("predict", pictures, "--model", model_path, "--json", "--top-k", 3, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    artifact = open_artifact(model_path, "cpu")
    _, expected = artifact.run(random_images(9))
    lines = objects(result)
    assert [line["file"] for line in lines] == [str(path) for path in sorted(pictures.rglob("*.png"))]
    for line, row in zip(lines, expected, strict=True):
        best = int(row.argmax())
        assert line["ok"] is True
        assert line["label"] == artifact.metadata.class_names[best]
        assert line["probability"] == pytest.approx(float(row[best]), abs=1e-6)
        assert [entry["probability"] for entry in line["top"]] == pytest.approx(
            sorted(row, reverse=True), abs=1e-6
        )


def test_batch_size_changes_nothing(pictures: Path, model_path: Path) -> None:
    one, many = (
        objects(call("predict", pictures, "--model", model_path, "--json", "--batch-size", size))
        for size in (1, 64)
    )
    for first, second in zip(one, many, strict=True):
        assert first["label"] == second["label"]
        assert first["probability"] == pytest.approx(second["probability"], abs=1e-6)


def test_lines_for_people(pictures: Path, model_path: Path) -> None:
    """File, label, probability; top k under it when asked."""
    result = call("predict", pictures / "a" / "0.png", "--model", model_path)
    assert result.exit_code == 0
    name, label, probability = result.stdout.rsplit(maxsplit=2)
    assert name == f"{pictures / 'a' / '0.png'}:"
    assert label in ("cat", "dog", "eel")
    assert 1 / 3 <= float(probability) <= 1
    assert (
        len(
            call("predict", pictures / "a" / "0.png", "--model", model_path, "--top-k", 2).stdout.splitlines()
        )
        == 3
    )


def test_globs_files_and_standard_input(pictures: Path, model_path: Path) -> None:
    """A quoted glob is expanded; - is one picture's bytes; a file named like a glob is itself."""
    odd = pictures / "b" / "[x]*.png"
    (pictures / "b" / "5.png").rename(odd)
    result = call("predict", pictures / "a" / "*.png", odd, "--model", model_path, "--json")
    assert [Path(str(line["file"])).name for line in objects(result)] == [f"{at}.png" for at in range(5)] + [
        "[x]*.png"
    ]
    raw = (pictures / "a" / "0.png").read_bytes()
    from_stdin = objects(call("predict", "-", "--model", model_path, "--json", input=raw))
    from_file = objects(call("predict", pictures / "a" / "0.png", "--model", model_path, "--json"))
    assert from_stdin[0]["file"] == "-"
    assert from_stdin[0]["top"] == from_file[0]["top"]


def test_bad_pictures_fail_alone(pictures: Path, model_path: Path) -> None:
    """Exit 1, the rest predicted, in order, one plain line on standard error for each."""
    (pictures / "a" / "1.png").write_bytes(b"not a picture")
    (pictures / "empty").mkdir()
    arguments = [pictures / "a", pictures / "gone.png", pictures / "empty", pictures / "no*.png", "--json"]
    result = call("predict", *arguments, "--model", model_path)
    assert result.exit_code == 1
    lines = objects(result)
    assert [line.get("error", "ok") for line in lines] == [
        "ok", "not_an_image", "ok", "ok", "ok", "not_found", "no_pictures", "not_found",
    ]  # fmt: skip
    errors = result.stderr.splitlines()
    assert len(errors) == 4
    assert errors[0].startswith(f"error: {pictures / 'a' / '1.png'}: not a picture")
    assert "Traceback" not in result.output


def test_a_name_with_a_newline_stays_on_one_line(pictures: Path, model_path: Path) -> None:
    odd = pictures / "b" / "new\nline\x1b[31m.png"
    (pictures / "b" / "5.png").rename(odd)
    result = call("predict", odd, "--model", model_path)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "\x1b" not in result.stdout
    assert objects(call("predict", odd, "--model", model_path, "--json"))[0]["file"] == str(odd)


def test_odd_arguments(pictures: Path, model_path: Path) -> None:
    """An empty name is no folder, a link to nowhere is itself, hidden pictures stay hidden."""
    (pictures / "*.png").symlink_to(pictures / "nowhere")
    (pictures / "a" / ".hidden").mkdir()
    (pictures / "a" / "0.png").rename(pictures / "a" / ".hidden" / "0.png")
    result = call("predict", "", pictures / "*.png", pictures / "a", "--model", model_path, "--json")
    assert result.exit_code == 1
    assert [line.get("error", "ok") for line in objects(result)] == ["not_found", "not_found", *["ok"] * 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict"],
        ["predict", "x.png", "--model", "gone.onnx"],
        ["predict", "x.png"],
        ["predict", "x.png", "--device", "tpu"],
        ["predict", "x.png", "--batch-size", "0"],
        ["predict", "x.png", "--top-k", "0"],
        ["predict", "x.png", "--nonsense"],
        ["inspect", "gone.onnx"],
        ["nonsense"],
    ],
)
def test_called_wrong_is_exit_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_more_labels_than_classes_is_called_wrong(pictures: Path, model_path: Path) -> None:
    result = call("predict", pictures, "--model", model_path, "--top-k", 4)
    assert result.exit_code == 2
    assert "the model has 3 classes" in result.stderr


def test_a_damaged_model_is_one_line_and_exit_1(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("hello")
    for command in (["predict", pictures, "--model"], ["inspect"]):
        result = call(*command, tmp_path / "bad.onnx")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_the_model_comes_from_the_environment(pictures: Path, model_path: Path) -> None:
    result = call("predict", pictures / "a" / "0.png", env={"SDPIPE_MODEL": str(model_path)})
    assert result.exit_code == 0, result.output


def test_inspect_says_what_the_file_is(model_path: Path) -> None:
    facts = json.loads(call("inspect", model_path, "--json").stdout)
    assert facts["class_names"] == ["cat", "dog", "eel"]
    assert facts["operators"]["Conv"] == 19
    assert facts["image_size"] == [SIZE, SIZE]
    text = call("inspect", model_path).stdout
    assert "Conv 19" in text
    assert "p_L" in text


def test_every_command_explains_itself() -> None:
    for command in [[], *([name] for name in main.commands)]:
        result = call(*command, "--help")
        assert result.exit_code == 0
        assert len(result.stdout) > 100


def test_track_without_runs_says_so(project: Path) -> None:
    result = call("track")
    assert result.exit_code == 1
    assert "no finished run" in result.stderr


HEAVY = (
    "torch",
    "torchvision",
    "onnx",
    "mlflow",
    "dvc",
    "pydantic",
    "sklearn",
    "scipy",
    "matplotlib",
    "safetensors",
)


def test_predict_imports_nothing_of_the_training_stack(pictures: Path, model_path: Path) -> None:
    """The modules of a real prediction, listed by the interpreter; ours are the runtime's and the CLI."""
    code = (
        "import sys\n"
        "from sdpipe.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sorted({name for name in sys.modules}), file=sys.stderr)"
    )
    arguments = ["predict", str(pictures / "a" / "0.png"), "--model", str(model_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    modules = done.stderr.split()
    assert not [name for name in modules if name.split(".")[0] in HEAVY]
    assert [name for name in modules if name.startswith("sdpipe")] == [
        "sdpipe",
        "sdpipe.cli",
        "sdpipe.commands",
        "sdpipe.commands.benchmarking",
        "sdpipe.commands.evaluating",
        "sdpipe.commands.model",
        "sdpipe.commands.options",
        "sdpipe.commands.output",
        "sdpipe.commands.printing",
        "sdpipe.commands.pruning",
        "sdpipe.commands.runs",
        "sdpipe.commands.serve",
        "sdpipe.errors",
        "sdpipe.runtime",
        "sdpipe.runtime.artifact",
        "sdpipe.runtime.cores",
        "sdpipe.runtime.folders",
        "sdpipe.runtime.image",
        "sdpipe.runtime.jpeg_2000_limits",
        "sdpipe.runtime.manifest",
        "sdpipe.runtime.memory",
        "sdpipe.runtime.metadata",
        "sdpipe.runtime.onnx_file",
        "sdpipe.runtime.picture_limits",
        "sdpipe.runtime.pixel_modes",
        "sdpipe.runtime.predictor",
        "sdpipe.runtime.shapes",
        "sdpipe.runtime.sources",
        "sdpipe.runtime.tiff_limits",
        "sdpipe.version",
    ]


def test_help_and_version_import_neither_numpy_nor_onnxruntime() -> None:
    for argument in ("--help", "--version"):
        call_main = "from sdpipe.cli import main\nmain([sys.argv[1]], standalone_mode=False)"
        code = f"import sys\n{call_main}\nprint(*sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
        )
        assert not {"numpy", "onnxruntime", "PIL"} & set(done.stderr.split())


def test_python_starts_it_too() -> None:
    """Where the script is not on PATH; the usage names what was called."""
    done = subprocess.run([sys.executable, "-m", "sdpipe", "predict"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m sdpipe predict [OPTIONS] IMAGE...")


def test_a_picture_that_cannot_be_opened(pictures: Path, model_path: Path) -> None:
    """Without permission (root may read everything, so there the check is a folder named like a picture)."""
    target = pictures / "a" / "0.png"
    if os.geteuid() == 0:
        target.unlink()
        target.mkdir()
    else:
        target.chmod(0)
    result = call("predict", target, pictures / "a" / "1.png", "--model", model_path, "--json")
    assert result.exit_code == 1
    assert [line["ok"] for line in objects(result)] == [False, True]


def test_rgb_pictures_for_a_grey_model_and_other_sizes(tmp_path: Path, model_path: Path) -> None:
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "big.jpg")
    assert call("predict", tmp_path / "big.jpg", "--model", model_path).exit_code == 0
