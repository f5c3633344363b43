"""The variants of a deployed file in `sdpipe inspect`."""

import csv
import json
import os
import shutil
import time
from pathlib import Path

import onnx
import pytest
from test_benchmark_command import FINGERPRINT, call

from sdpipe.runtime.variants import COLUMNS


def write_variants(path: Path) -> None:
    """Three variants."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        ["fp32", "model.onnx", FINGERPRINT, "0.0525", "12345", "1.25", "40.04", "0", "True"],
        ["int8", "model.int8.onnx", FINGERPRINT, "0.06", "4000", "0.5", "20", "3", "True"],
        ["keep-7", "pruned/keep-7.onnx", FINGERPRINT, "0.1", "9000", "", "", "12", "true"],
    ]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


@pytest.fixture
def deployed(project: Path, model_path: Path) -> Path:
    """models/ as deploy leaves it, with a variant."""
    (project / "models" / "variants").mkdir(parents=True)
    shutil.copy(model_path, "models/model.onnx")
    shutil.copy(model_path, "models/variants/keep-7.onnx")
    return project


def test_inspect_shows_the_variants_side_by_side(deployed: Path) -> None:
    """Beside the file, in variants/ and from there, with a star at the file in question."""
    write_variants(Path("models/variants/variants.csv"))
    text = call("inspect", "models/model.onnx").stdout
    table = text.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["variant", "fp32", "int8", "keep-7"]
    assert table[1].split() == ["fp32", "*", "5.25%", "12", "1.25", "40.0", "0", "True"]
    assert "*" not in table[2] + table[3]
    facts = json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert facts["variants"][2] == {
        "variant": "keep-7", "path": "pruned/keep-7.onnx", "fingerprint": FINGERPRINT, "test_error": 0.1,
        "bytes": 9000, "batch_1_ms": None, "batch_64_ms": None, "disagreements_with_fp32": 12, "parity": True,
    }  # fmt: skip
    Path("models/variants/variants.csv").rename("models/variants.csv")
    assert "int8" in call("inspect", "models/variants/keep-7.onnx").stdout


def test_a_table_of_something_else_is_passed_over(deployed: Path) -> None:
    """Whoever brings the file elsewhere may have a variants.csv of his own there, or above."""
    for raw in (b"name,colour\na,red\n", "name\n\u20ac\n".encode("utf-16"), b"a\n" * 2**20, b""):
        Path("models/variants.csv").write_bytes(raw)
        result = call("inspect", "models/model.onnx")
        assert result.exit_code == 0
        assert "unlike fp32" not in result.stdout
    write_variants(Path("models/variants/variants.csv"))
    assert "int8" in call("inspect", "models/model.onnx").stdout


def test_a_table_of_another_training_is_not_shown(deployed: Path) -> None:
    """As models/variants.csv stands above models/<run>/, which has none until it was evaluated."""
    write_variants(Path("models/variants.csv"))
    run = Path("models/constant/model.onnx")
    run.parent.mkdir()
    model = onnx.load("models/model.onnx")
    for entry in model.metadata_props:
        entry.value = json.dumps("another") if entry.key == "sdpipe.fingerprint" else entry.value
    onnx.save(model, run)
    assert "variants" in json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert "variants" not in json.loads(call("inspect", str(run), "--json").stdout)


def test_without_variants_inspect_is_as_before(deployed: Path) -> None:
    facts = json.loads(call("inspect", "models/model.onnx", "--json").stdout)
    assert "variants" not in facts


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("keep-7,x,f,0.1,many,,,12,true", "line 4: bytes: expected a number, got 'many'"),
        ("keep-7,x,f,nan,9,,,12,true", "line 4: test_error: expected a number, got 'nan'"),
        ("keep-7,x,f,-inf,9,,,12,true", "line 4: test_error: expected a number, got '-inf'"),
        ("keep-7,x,f,0.1,9,,,12,yes", "line 4: parity: expected true or false, got 'yes'"),
        ("keep-7,x,f,0.1", "line 4: too few cells"),
        ('keep-7,"x', "line 4: unexpected end of data"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_damaged_table_of_variants_leaves_the_facts(
    deployed: Path, row: str, says: str, flags: tuple[str, ...]
) -> None:
    """As one that was cut off while it was copied; the model beside it is whole."""
    expected = call("inspect", "models/model.onnx", *flags).stdout
    table = Path("models/variants.csv").resolve()
    write_variants(table)
    table.write_text("\n".join([*table.read_text().splitlines()[:3], row]))
    result = call("inspect", "models/model.onnx", *flags)
    assert (result.exit_code, result.stdout) == (1, expected)
    assert result.stderr == f"error: {table}: {says}\n"


def test_a_table_of_variants_without_end_is_not_read_whole(deployed: Path) -> None:
    """It may come with a model from anywhere; 2**30 zeros stand on no disk, but would in memory."""
    table = Path("models/variants.csv")
    header = ",".join(COLUMNS).encode() + b"\n"
    said = f"error: {table.resolve()}: over 1,048,576 characters, no table of variants\n"
    for start, expected in ((header, (1, said)), (b"", (0, ""))):
        table.write_bytes(start)
        os.truncate(table, 2**30)
        started = time.monotonic()
        result = call("inspect", "models/model.onnx")
        assert time.monotonic() - started < 2
        assert (result.exit_code, result.stderr) == expected


def test_the_table_is_beside_the_name_where_the_file_is_a_link(deployed: Path) -> None:
    """As DVC makes it with cache.type symlink: the cache has no table."""
    cache = Path(".dvc/cache/files/md5/ab")
    cache.mkdir(parents=True)
    shutil.move("models/model.onnx", cache / "cdef")
    Path("models/model.onnx").symlink_to((cache / "cdef").resolve())
    write_variants(Path("models/variants.csv"))
    assert "int8" in call("inspect", "models/model.onnx").stdout
    Path("link.onnx").symlink_to("models/variants/keep-7.onnx")
    assert "int8" in call("inspect", "link.onnx").stdout
