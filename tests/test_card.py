"""The model card says what the files say, and its code runs."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployable import add_variants, deploy, make_run, write
from encoded_pictures import encoded, png
from PIL import Image

from sdpipe.errors import DataError, ImageError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.image import decode
from sdpipe.runtime.predictor import Prediction, predict
from sdpipe.training.weights import load_weights, save_weights

TIMES = ("median_ms", "quartile_1_ms", "quartile_3_ms", "n")


def card_of(tmp_path: Path, channels: int = 1, crop_fraction: float = 1.0, variants: bool = False) -> str:
    folder = make_run(tmp_path / "models" / "stochastic", channels=channels, crop_fraction=crop_fraction)
    if variants:
        add_variants(folder)
    deploy(folder, tmp_path / "models")
    return (tmp_path / "models" / "README.md").read_text()


def code(card: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def test_every_figure_is_that_of_the_files(tmp_path: Path) -> None:
    """Numbers of tests/deployable.py, in the row that they belong to."""
    card = card_of(tmp_path, variants=True)
    for line in (
        "# animals, 20 layers, stochastic depth",
        "| run | stochastic, fingerprint 0123456789abcdef |",
        "| network | 20 layers, 4,321 parameters |",
        "| depth while training | linear_decay, p_L 0.5: 6.50 of 9 blocks active on average |",
        f"| data set | animals, SHA-256 of its arrays {'d' * 64} |",
        "| classes | 3: cat, dog, eel |",
        "| pictures | 9 x 9 x 1 (height, width, channels), uint8 |",
        # Wilson's interval by hand: (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96
        "| validation | 0.0625 | 0.0332 to 0.1145 | 144 | PyTorch, while training |",
        "| test | 0.1000 | 0.0829 to 0.1202 | 1000 | model.onnx |",
        "| dog | 0.5000 | 0.7500 | 12 |",
        "| before, T = 1 | 0.081 | 0.3 | 0.091 |",
        "| after, T = 1.25 | 0.023 | 0.25 | 0.033 |",
        "|  | batch of 1 | batch of 64 |",
        "| onnxruntime | 1.5 (1.25 to 1.75) | 42 (1.25 to 1.75) |",
        "  epochs: 9",
    ):
        assert line in card.splitlines(), line
    assert "by at most 3.5e-06, which is 2.5e-07 of their spread" in card.replace("\n", " ")
    assert "9 epochs at commit c0ffee with local changes" in card
    assert "77 s on Abacus 3000, 2 cores" in card
    assert "Measured on Sundial, 1 core." in card
    assert re.search(
        r"^\| `variants/keep-7\.int8\.onnx` \| keep-7\.int8 \| 0\.1000 \| 3 \| 11 \|", card, re.M
    )


def test_times_of_an_unknown_machine_are_said_to_be(tmp_path: Path) -> None:
    """An older evaluate did not write it."""
    folder = make_run(tmp_path / "models" / "stochastic")
    facts = json.loads((folder / "latency.json").read_text())
    del facts["hardware"]
    write(folder / "latency.json", facts)
    deploy(folder, tmp_path / "models")
    assert "Measured where `evaluate` ran." in (tmp_path / "models" / "README.md").read_text()


def test_a_class_name_cannot_break_a_table(tmp_path: Path) -> None:
    """Nor be taken for emphasis, a link or a tag; what Markdown does not read so stays as it is."""
    names = ("a|b", "c\nd", "__e_ *f* <b> g__h")
    folder = make_run(tmp_path / "models" / "stochastic", class_names=names)
    rows = "".join(f'"{name}",0.5,0.5,1\n' for name in names)
    (folder / "classes.csv").write_text(f"class,precision,recall,images\n{rows}")
    deploy(folder, tmp_path / "models")
    card = (tmp_path / "models" / "README.md").read_text().splitlines()
    assert "| a\\|b | 0.5000 | 0.5000 | 1 |" in card
    assert "| c d | 0.5000 | 0.5000 | 1 |" in card
    assert "| \\_\\_e\\_ \\*f\\* \\<b\\> g__h | 0.5000 | 0.5000 | 1 |" in card
    assert "| classes | 3: a\\|b, c d, \\_\\_e\\_ \\*f\\* \\<b\\> g__h |" in card


def test_a_class_that_was_never_named_or_shown_has_an_empty_cell(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "models" / "stochastic")
    (folder / "classes.csv").write_text("class,precision,recall,images\na,,0.5,1\nb,0.5,,0\n")
    deploy(folder, tmp_path / "models")
    card = (tmp_path / "models" / "README.md").read_text().splitlines()
    assert {"| a |  | 0.5000 | 1 |", "| b | 0.5000 |  | 0 |"} <= set(card)


def run_python(models: Path, picture: bytes) -> subprocess.CompletedProcess[str]:
    """The card's program on this picture, in the folder of the card."""
    (models / "picture.png").write_bytes(picture)
    snippet = code((models / "README.md").read_text(), "python")
    assert len(snippet.splitlines()) <= 17
    return subprocess.run(
        [sys.executable, "-c", snippet], cwd=models, capture_output=True, text=True, check=False
    )


def noise(mode: str) -> Image.Image:
    """A picture that is neither square nor of the network's size."""
    size = (41, 67, len(Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return Image.frombytes(mode, (67, 41), pixels.tobytes())


def with_transparent_colour(mode: str) -> Image.Image:
    """Half of it in one colour, which is transparent, as PNG and GIF have it without an alpha channel."""
    picture = noise(mode)
    picture.paste(9, (0, 0, 40, 41))
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)
    picture.info["transparency"] = 9
    return picture


PICTURES = {
    **{mode: noise(mode) for mode in ("L", "RGB", "LA", "RGBA")},
    **{f"{mode} with a transparent colour": with_transparent_colour(mode) for mode in ("L", "P")},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "crop_fraction", "kind"),
    [
        *product([1, 3], [1.0, 224 / 256], ["L", "RGB"]),
        *product([1, 3], [1.0], [kind for kind in PICTURES if kind not in ("L", "RGB")]),
    ],
)
def test_the_python_on_the_card_runs_and_agrees_with_predict(
    tmp_path: Path, channels: int, crop_fraction: float, kind: str
) -> None:
    """The same label, the same probability."""
    card_of(tmp_path, channels, crop_fraction)
    models = tmp_path / "models"
    done = run_python(models, encoded(PICTURES[kind]))
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(models / "model.onnx", "cpu")
    (expected,) = predict(artifact, [str(models / "picture.png")], top_k=1, batch_size=1)
    assert isinstance(expected, Prediction)
    label, probability = done.stdout.split()
    assert (label, float(probability)) == (expected.top[0][0], pytest.approx(expected.top[0][1], abs=1e-6))


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_the_python_on_the_card_refuses_what_it_would_saturate(tmp_path: Path, kind: type) -> None:
    """More than 8 bits of grey, of which Pillow by itself takes no upper 8; nor are floats `predict`'s."""
    card_of(tmp_path)
    raw = encoded(Image.fromarray(np.full((41, 67), 30_000, kind)), "TIFF")
    done = run_python(tmp_path / "models", raw)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "grey of more than 8 bits; sdpipe predict reads whole numbers up to 65535\n"
    if kind is np.uint16:
        assert decode(raw, 1, None)[0, 0, 0] == 30_000 >> 8
    else:
        with pytest.raises(ImageError, match="floating-point pixels"):
            decode(raw, 1, None)


def test_the_card_says_where_its_python_is_wrong(tmp_path: Path) -> None:
    """A transparent 1 of 0..15, where Pillow looks for a 1 among 0, 17, ..., 255."""
    card = card_of(tmp_path).replace("\n", " ")
    assert "may be wrong about the transparent grey of a PNG that has 2 or 4 bits" in card
    head = struct.pack(">2I5B", 10, 9, 4, 0, 0, 0, 0)
    raw = png(head, 9 * b"\0\x12\x13\x1f\x11\x01", struct.pack(">H", 1))
    done = run_python(models := tmp_path / "models", raw)
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(models / "model.onnx", "cpu")
    (right,) = predict(artifact, [str(models / "picture.png")], top_k=1, batch_size=1)
    assert isinstance(right, Prediction)
    assert float(done.stdout.split()[1]) != pytest.approx(right.top[0][1], abs=1e-3)


@pytest.mark.parametrize("crop_fraction", [1.0, 224 / 256])
def test_the_card_is_right_about_a_picture_of_the_network_s_size(
    tmp_path: Path, crop_fraction: float
) -> None:
    """It stays as it is only where all of it is taken."""
    card = card_of(tmp_path, crop_fraction=crop_fraction).replace("\n", " ")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    decoded = decode(tmp_path / "picture.png", 1, (9, 9), crop_fraction)
    stays = bool((decoded[..., 0] == pixels).all())
    assert ("A picture that has this size already stays as it is" in card) == stays


def test_the_card_says_where_there_was_nothing_to_fit_and_nothing_to_skip(tmp_path: Path) -> None:
    """No validation image is wrong, so T is 1 by rule; and a plain net, trained without skips."""
    folder = make_run(tmp_path / "models" / "stochastic")
    deploy(folder, tmp_path / "models")
    card = (tmp_path / "models" / "README.md").read_text().replace("\n", " ")
    assert "T was fitted on the validation part, 144 pictures." in card
    assert "A residual network that was trained with stochastic depth" in card
    weights = load_weights(folder / "weights.safetensors")
    plain = replace(weights.info.network, skip="plain", p_L=1.0)
    save_weights(folder / "weights.safetensors", replace(weights, info=replace(weights.info, network=plain)))
    facts = json.loads((folder / "calibration.json").read_text())
    write(folder / "calibration.json", facts | {"temperature": 1.0})
    deploy(folder, tmp_path / "models")
    card = (tmp_path / "models" / "README.md").read_text().replace("\n", " ")
    assert "T stays 1, since the network misclassifies none of the 144 pictures" in card
    assert "at the end of" not in card
    write(folder / "calibration.json", facts | {"temperature": 19.99994, "num_validation": 1})
    deploy(folder, tmp_path / "models")
    end = (tmp_path / "models" / "README.md").read_text().replace("\n", " ")
    assert "validation part, 1 picture. It is at the end of what is tried, 0.05 to 20: the confid" in end
    assert "A plain network, one without skips, that was trained" in card


def test_the_other_languages_name_the_tensors_of_the_file(tmp_path: Path) -> None:
    """C++ and JavaScript are not compiled here: names, type and shape are compared with the session's."""
    card = card_of(tmp_path, channels=3)
    artifact = open_artifact(tmp_path / "models" / "model.onnx", "cpu")
    (image,) = artifact.session.get_inputs()
    assert image.type == "tensor(uint8)"
    assert image.shape[1:] == [9, 9, 3]
    cpp, javascript = code(card, "cpp"), code(card, "javascript")
    for text in (cpp, javascript):
        assert image.name in text
        assert artifact.session.get_outputs()[1].name in text
        assert "1, 9, 9, 3" in text
        assert str(9 * 9 * 3) in text
    assert "CreateTensor<uint8_t>" in cpp
    assert 'Tensor("uint8"' in javascript


@pytest.mark.parametrize(
    "name", ["train.json", "timing.json", "calibration.json", "latency.json", "classes.csv"]
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "models" / "stochastic")
    (folder / name).write_text("{}" if name.endswith("json") else "name,colour\na,red\n")
    with pytest.raises(DataError, match=f"{name}: expected ") as caught:
        deploy(folder, tmp_path / "models")
    assert str(caught.value).startswith(str(folder / name))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b"cat,0.5,0.5,1\ndog,0.5,half,1\n", "recall of dog: expected a number, got 'half'"),
        (b"c\xe4t,0.5,0.5,1\n", "cannot be read: 'utf-8' codec can't decode byte 0xe4"),
        (b"cat,0.5,0.5\n", "row 1 has another number of cells than the header"),
    ],
    ids=["no number", "no text", "too few cells"],
)
def test_a_damaged_cell_is_named(tmp_path: Path, rows: bytes, said: str) -> None:
    folder = make_run(tmp_path / "models" / "stochastic")
    path = folder / "classes.csv"
    path.write_bytes(b"class,precision,recall,images\n" + rows)
    with pytest.raises(DataError) as caught:
        deploy(folder, tmp_path / "models")
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    "times",
    [
        None,
        {"onnxruntime": 3.0},
        *({"onnxruntime": {key: 3.0 for key in TIMES if key != lost}} for lost in TIMES),
        {"onnxruntime": {**dict.fromkeys(TIMES, 3.0), "median_ms": "3"}},
    ],
    ids=str,
)
def test_damaged_times_are_named(tmp_path: Path, times: Any) -> None:
    """Of one batch size beside a sound one."""
    folder = make_run(tmp_path / "models" / "stochastic")
    facts = json.loads((folder / "latency.json").read_text())
    write(folder / "latency.json", facts | {"batch_64": times})
    with pytest.raises(
        DataError, match=rf"latency\.json: expected {', '.join(TIMES)} of each that was timed"
    ):
        deploy(folder, tmp_path / "models")
