"""`sdpipe doctor`."""

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from conftest import ROOT
from test_cli import call

from sdpipe import doctor


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


def test_doctor_names_each_package_once_that_a_command_needs() -> None:
    """Also filelock and its like, without which a training ends as without PyTorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    shown = [line.split()[1] for line in call("doctor").stdout.splitlines()]
    assert shown[1 : 1 + len(needed)] == [each.split(">=")[0] for each in needed]
    assert len(set(shown[: 1 + len(needed)])) == 1 + len(needed)
    assert shown[1 + len(needed)] == "processor"


@pytest.mark.parametrize(
    ("requirements", "shown"),
    [
        (
            ["a>=1", "b.c>=0.18; extra == 'train'", 'd[x]; python_version < "4" and extra == "train"'],
            "a b.c d",
        ),
        (None, "click numpy Pillow onnxruntime-gpu torch torchvision onnx onnxscript safetensors mlflow dvc"),
    ],
    ids=["installed", "not installed"],
)
def test_doctor_asks_for_what_the_installed_sdpipe_needs(
    monkeypatch: pytest.MonkeyPatch, requirements: list[str] | None, shown: str
) -> None:
    def requires(_name: str) -> list[str]:
        if requirements is None:
            raise PackageNotFoundError
        return requirements

    monkeypatch.setattr(doctor, "requires", requires)
    assert [check.name for check in doctor._packages()] == shown.split()


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


def dvc_line() -> str:
    (line,) = [line for line in call("doctor").stdout.splitlines() if line[4:].startswith("DVC ")]
    return line


def make_repro_begins() -> subprocess.CompletedProcess[str]:
    """What `make repro` asks before it installs anything."""
    command = [str(shutil.which("make", path=os.defpath)), "--no-print-directory", ".repository"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(project: Path) -> Path:
    """As in a downloaded archive of the project: without git's folder."""
    (project / "sdpipe").mkdir()
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").touch()
    shutil.copy(ROOT / "Makefile", project)
    return project


def test_where_dvc_refuses_doctor_and_make_say_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = f"BAD DVC                      {checkout} is not a git repository, which DVC needs; "
    assert dvc_line() == f"{needs}`git init` makes one"
    assert call("doctor").exit_code == 1
    said = "make repro needs a git repository, here or in a folder above; "
    done = make_repro_begins()
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"{said}git init makes one"
    programs = checkout.parent / "without_git"
    programs.mkdir()
    for name in ("sh", "find", "grep"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    assert dvc_line() == f"{needs}install git, and `git init` makes one"
    assert make_repro_begins().stderr.splitlines()[0] == f"{said}install git, and git init makes one"


@pytest.mark.parametrize("place", ["here", "above", "nowhere"])
def test_where_dvc_works_doctor_and_make_agree(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In a git repository, in a folder of one, and without one where core.no_scm says so."""
    root = checkout
    if place == "nowhere":
        (root / ".dvc" / "config").write_text("[core]\n    no_scm = TRUE\n")
    elif place == "above":
        root = checkout / "a $b" / "project"
        root.mkdir(parents=True)
        for name in (".dvc", "Makefile", "sdpipe"):
            (checkout / name).rename(root / name)
        monkeypatch.chdir(root)
    if place != "nowhere":
        subprocess.run(["git", "init", "-q", checkout], check=True)
    assert make_repro_begins().returncode == 0
    for folder in (root, root / "sdpipe"):
        monkeypatch.chdir(folder)
        assert dvc_line() == f"ok  DVC                      repository {root}"


def test_other_faults_of_dvc_are_said_in_its_words(checkout: Path) -> None:
    """Where it has no repository there is nothing to refuse."""
    (checkout / ".dvc" / "config").write_text("no setting\n")
    assert dvc_line().startswith("BAD DVC                      config file error: ")
    (checkout / ".dvc" / "config").write_text("")
    subprocess.run(["git", "init", "-q", checkout], check=True)
    (checkout / ".git" / "config").write_text("[core\n")
    assert dvc_line().startswith("BAD DVC                      ")
    shutil.rmtree(checkout / ".dvc")
    assert dvc_line() == "ok  DVC                      no DVC repository here"


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
