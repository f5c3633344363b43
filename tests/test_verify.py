"""`--verify`: files as their manifest has them."""

import hashlib
import subprocess
from pathlib import Path

import onnx
import pytest

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.manifest import check_against_manifest


@pytest.fixture
def deployed(tmp_path: Path, model_path: Path) -> Path:
    """models/ with a file, a variant and a manifest as sha256sum writes it."""
    folder = tmp_path / "models"
    (folder / "variants").mkdir(parents=True)
    for name in ("model.onnx", "variants/model.int8.onnx"):
        (folder / name).write_bytes(model_path.read_bytes())
    listed = subprocess.run(
        ["sha256sum", "model.onnx", "--binary", "variants/model.int8.onnx"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (folder / "SHA256SUMS").write_text(listed.stdout)
    return folder


def test_verified_files_open(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the manifest in its folder or the one above, by any spelling of the path."""
    open_artifact(deployed / "model.onnx", "cpu", verify=True)
    open_artifact(deployed / "variants" / "model.int8.onnx", "cpu", verify=True)
    open_artifact(deployed / "variants" / ".." / "model.onnx", "cpu", verify=True)
    monkeypatch.chdir(deployed / "variants")
    open_artifact(Path("model.int8.onnx"), "cpu", verify=True)
    open_artifact(Path("../model.onnx"), "cpu", verify=True)


def test_one_flipped_bit_in_a_weight_is_noticed_by_the_manifest_alone(deployed: Path) -> None:
    path = deployed / "model.onnx"
    raw = bytearray(path.read_bytes())
    weight = max(onnx.load(path).graph.initializer, key=lambda tensor: len(tensor.raw_data)).raw_data
    raw[raw.find(weight) + 20] ^= 1
    path.write_bytes(raw)
    open_artifact(path, "cpu")
    with pytest.raises(ModelError, match="not the file that was deployed") as caught:
        open_artifact(path, "cpu", verify=True)
    assert "\n" not in str(caught.value)


def test_what_no_manifest_vouches_for_is_refused(deployed: Path) -> None:
    """Not listed, no manifest, a damaged one, two digests for one name."""
    manifest, path = deployed / "SHA256SUMS", deployed / "model.onnx"
    listed = manifest.read_text()
    for text, expected in (
        (listed.splitlines()[1] + "\n", "does not list model.onnx"),
        (listed.replace("*model", "*other/model"), "does not list model.onnx"),
        ("hello\n", "line 1 is not as sha256sum writes it"),
        (listed + "0" * 64 + "  ./model.onnx\n", "line 3 gives ./model.onnx a second digest"),
        ("\0" * 2**21, "no list of digests"),
    ):
        manifest.write_text(text)
        with pytest.raises(ModelError, match=expected):
            check_against_manifest(path, path.read_bytes())
    manifest.write_bytes(b"\xff\n")
    with pytest.raises(ModelError, match="cannot be read"):
        check_against_manifest(path, path.read_bytes())
    manifest.unlink()
    with pytest.raises(ModelError, match="no SHA256SUMS"):
        check_against_manifest(path, path.read_bytes())


def test_lines_may_end_as_on_windows(deployed: Path) -> None:
    """As `sha256sum --check` takes them."""
    manifest = deployed / "SHA256SUMS"
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r\n"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=deployed, check=True)
    open_artifact(deployed / "model.onnx", "cpu", verify=True)


def test_names_are_unescaped_as_sha256sum_escapes_them(tmp_path: Path) -> None:
    odd = tmp_path / "a\\b\nc.onnx"
    odd.write_bytes(b"x")
    listed = subprocess.run(["sha256sum", odd.name], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / "SHA256SUMS").write_text(listed.stdout)
    assert check_against_manifest(odd, b"x") == tmp_path / "SHA256SUMS"
    assert hashlib.sha256(b"x").hexdigest() in listed.stdout
