"""`sdpipe doctor`."""

import subprocess
from pathlib import Path

import pytest
from test_cli import call


def test_doctor_finds_the_model_and_the_packages(model_path: Path) -> None:
    result = call("doctor", env={"SDPIPE_MODEL": str(model_path)})
    assert result.exit_code == 0, result.output
    for word in (
        "onnxruntime-gpu",
        "torch",
        "CPUExecutionProvider works",
        "disk",
        f"{model_path} runs on",
    ):
        assert word in result.stdout
    (model_path.parent / "bad.onnx").write_bytes(b"x")
    result = call("doctor", env={"SDPIPE_MODEL": str(model_path.parent / "bad.onnx")})
    assert result.exit_code == 1
    assert "BAD model" in result.stdout


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("folder", "BAD model                    folder: expected a model file, found a folder"),
        ("", "ok  model                    models/model.onnx is not there yet; `make repro` makes it"),
        ("gone", "BAD model                    SDPIPE_MODEL: gone: no such file"),
        ("x" * 300, "BAD model                    [Errno 36] File name too long"),
    ],
)
def test_doctor_says_what_stands_in_place_of_a_model(project: Path, name: str, finding: str) -> None:
    (project / "folder").mkdir()
    result = call("doctor", env={"SDPIPE_MODEL": name})
    assert finding in result.stdout
    assert result.exit_code == int(finding.startswith("BAD"))


def test_doctor_sees_that_git_is_missing(project: Path) -> None:
    """As in a downloaded archive of the project: DVC refuses it."""
    assert "ok  DVC                      no DVC repository here" in call("doctor").stdout
    (project / ".dvc").mkdir()
    result = call("doctor")
    assert "BAD DVC                      no git repository here" in result.stdout
    assert result.exit_code == 1
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    assert "ok  DVC                      this folder is a DVC repository" in call("doctor").stdout


def test_doctor_shows_no_password(project: Path) -> None:
    """Its output goes into bug reports."""
    uri = "postgresql://user:p@ss/word@db.example.org/runs?sslmode=require&password=word2"
    result = call("doctor", env={"MLFLOW_TRACKING_URI": uri})
    (line,) = [line for line in result.stdout.splitlines() if "MLflow store" in line]
    assert line.endswith(" postgresql://***@db.example.org/runs?sslmode=require&password=*** (not tried)")


@pytest.mark.parametrize("content", [b"x" * 100, None])
def test_doctor_sees_a_store_that_is_no_database(project: Path, content: bytes | None) -> None:
    store = project / "mlflow.db"
    if content is None:
        store.mkdir()
    else:
        store.write_bytes(content)
    result = call("doctor")
    assert f"BAD MLflow store             {store} is no SQLite database" in result.stdout
    assert result.exit_code == 1


def test_doctor_calls_an_empty_store_not_made_yet(project: Path) -> None:
    """The first run makes it."""
    (project / "mlflow.db").touch()
    result = call("doctor")
    assert "ok  MLflow store             not made yet" in result.stdout
