"""The rules of the house that matter, as tests."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from imports import imported_names, our_imports, reached, stage_files
from ruamel.yaml import YAML

SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("sdpipe", "pipeline") for path in (ROOT / folder).rglob("*.py")
)

ALL = SOURCES + sorted(
    path.relative_to(ROOT) for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)

# Data flows left to right, and a part imports only what stands before it. The runtime stands first: it
# imports nothing of the training side, while data shares its image decoder and export its metadata.
LAYERS = [
    ("sdpipe/version.py", "sdpipe/errors.py", "sdpipe/__init__.py"),
    ("sdpipe/config.py", "sdpipe/files.py", "sdpipe/drawing.py", "sdpipe/colours.py"),
    ("sdpipe/runtime",),
    ("sdpipe/data",),
    ("sdpipe/architecture.py", "sdpipe/dropout.py", "sdpipe/segment.py", "sdpipe/network.py"),
    ("sdpipe/provenance.py",),
    ("sdpipe/training",),
    ("sdpipe/deploy",),
    ("sdpipe/params.py", "sdpipe/track.py", "sdpipe/doctor.py", "sdpipe/recipes.py"),
    ("sdpipe/report",),
    ("sdpipe/commands",),
    ("sdpipe/cli.py",),
    ("sdpipe/__main__.py",),
    ("pipeline",),
]
RUNTIME_MAY = {"sdpipe/version.py", "sdpipe/errors.py", "sdpipe/__init__.py"}
STAGES = ("check", "fetch", "train", "fold", "calibrate", "export", "prune", "quantize", "evaluate", "deploy")


def layer(path: Path) -> int:
    (found,) = [
        number
        for number, names in enumerate(LAYERS)
        if any(str(path) == name or str(path).startswith(f"{name}/") for name in names)
    ]
    return found


def dvc_yaml() -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / "dvc.yaml")


def stage_body(stage: str) -> dict[str, Any]:
    definition = dvc_yaml()["stages"][stage]
    return definition.get("do", definition)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    for imported in our_imports(path):
        assert layer(imported) <= layer(path), f"{path} imports {imported}"


@pytest.mark.slow
def test_no_import_cycles() -> None:
    for path in SOURCES:
        for imported in our_imports(path) - {path}:
            assert path not in reached(imported), f"{path} and {imported} import each other"


def test_the_runtime_imports_nothing_of_the_training_side() -> None:
    for path in SOURCES:
        if str(path).startswith("sdpipe/runtime/"):
            others = {str(found) for found in reached(path) if not str(found).startswith("sdpipe/runtime/")}
            assert others <= RUNTIME_MAY, path


def test_few_files_import_mlflow() -> None:
    """The store, runs, registered models, and the file that MLflow itself runs when it serves one."""
    importing = [
        str(path) for path in SOURCES if any(name.split(".")[0] == "mlflow" for name in imported_names(path))
    ]
    assert importing == [
        "sdpipe/deploy/release/registry.py",
        "sdpipe/deploy/release/served.py",
        "sdpipe/training/logged_models.py",
        "sdpipe/training/mlflow_store.py",
        "sdpipe/training/tracking.py",
    ]


def test_a_served_model_carries_what_it_imports() -> None:
    """A registered model runs without sdpipe installed, out of its own copy of these files."""
    from sdpipe.deploy.release.carried import SHIPPED

    needed = {str(path) for path in reached(Path("sdpipe/deploy/release/served.py"))}
    folders = ("sdpipe/deploy", "sdpipe/deploy/release")
    own = {"sdpipe/deploy/release/served.py", *(f"{folder}/__init__.py" for folder in folders)}
    assert {f"sdpipe/{name}" for name in SHIPPED} == needed - own


def test_a_served_model_asks_for_the_versions_of_the_base_install() -> None:
    """Of numpy, Pillow and onnxruntime. With AVIF among its formats, Pillow before 11.2.1 opens no WebP."""
    from sdpipe.deploy.release.carried import REQUIREMENTS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {each.replace("-gpu", "") for each in project["dependencies"]}
    assert {"Pillow>=11.2.1", "pandas"} < set(REQUIREMENTS) <= base | {"pandas"}


def test_only_the_stages_read_params_yaml() -> None:
    """In the library the name stands in messages only, never in a call that reads it."""
    for path in SOURCES:
        calls = [
            node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)
        ]
        reads = [call for call in calls if getattr(call.func, "id", "") == "read_params"]
        assert not reads or path.parts[0] == "pipeline", path


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_deps_equal_the_imports(stage: str) -> None:
    """DVC follows no imports: a file that is missing here would leave a stale result.

    As of what a registered model carries, which `deploy` copies and does not import.
    """
    declared = {dep for dep in stage_body(stage)["deps"] if dep.endswith(".py")}
    assert declared == {str(path) for path in stage_files(stage)}


def test_the_stages_are_these() -> None:
    assert tuple(dvc_yaml()["stages"]) == STAGES


def keys_read(stage: str) -> set[str]:
    """The keys of params.yaml that a stage asks for, from its calls of get_value(params, key)."""
    keys = set()
    for node in ast.walk(ast.parse((ROOT / "pipeline" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "get_value":
            keys.add(
                ast.literal_eval(node.args[1])
                if isinstance(node.args[1], ast.Constant)
                else ast.unparse(node.args[1])
            )
    return keys


@pytest.mark.parametrize("stage", STAGES)
def test_params_declared_equal_params_read(stage: str) -> None:
    """`runs.${key}` is read through parse_run, which takes one run out; check reads the whole file.

    `machine` is not declared on purpose: a training that goes on elsewhere must not begin again.
    """
    declared = set(stage_body(stage).get("params", []))
    read = keys_read(stage)
    expected = {
        "check": (set(), set()),
        "fetch": ({"fetch.${item}"}, {"f'fetch.{dataset}'"}),
        "train": ({"train", "runs.${key}"}, {"train", "runs", "machine", "stages.train.do.deps"}),
        "fold": (set(), set()),
        "calibrate": ({"calibrate", "train.dataset"}, {"calibrate", "train.dataset"}),
        "export": ({"export"}, {"export"}),
        "prune": ({"prune", "export", "train.dataset"}, {"prune", "export", "train.dataset"}),
        "quantize": ({"quantize", "train.dataset"}, {"quantize", "train.dataset"}),
        "evaluate": (
            {"evaluate", "calibrate.num_bins", "train.dataset"},
            {"evaluate", "calibrate.num_bins", "train.dataset"},
        ),
        "deploy": ({"deploy"}, {"deploy"}),
    }[stage]
    assert (declared, read) == expected
    assert stage != "check" or "params.yaml" in stage_body(stage)["deps"]


def test_every_output_is_ignored_by_git() -> None:
    """By hand: DVC takes its own lines out of .gitignore when a later stage fails."""
    outputs = []
    for stage in STAGES:
        body = stage_body(stage)
        for kind in ("outs", "metrics", "plots"):
            outputs += [next(iter(out)) if isinstance(out, dict) else out for out in body.get(kind, [])]
    names = [re.sub(r"\$\{\w+\}", "x", output) for output in outputs] + [
        "mlflow.db",
        ".sdpipe/x",
        "mlartifacts/x",
    ]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == names


def test_all_outputs_are_cached() -> None:
    """Else `dvc exp show` has no figures of earlier experiments, and the stage no run cache."""
    outs = [
        out
        for stage in STAGES
        for kind in ("outs", "metrics", "plots")
        for out in stage_body(stage).get(kind, [])
    ]
    settings = [next(iter(out.values())) for out in outs if isinstance(out, dict)]
    assert not [found for found in settings if found.get("cache") is False]


@pytest.mark.parametrize("path", ALL, ids=str)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 60, node.name


def test_config_sections_hold_no_defaults() -> None:
    """params.yaml is the one home of every number."""
    code = (
        "from sdpipe.params import Params\n"
        "from sdpipe.training.config import TrainConfig\n"
        "def walk(model):\n"
        "    for name, field in model.model_fields.items():\n"
        "        assert field.is_required(), (model, name)\n"
        "        if hasattr(field.annotation, 'model_fields'): walk(field.annotation)\n"
        "walk(Params); walk(TrainConfig)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_command_stands_in_the_readme() -> None:
    from sdpipe.cli import main

    readme = (ROOT / "README.md").read_text()
    for command in main.commands:
        assert f"sdpipe {command}" in readme
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in set(targets) - {"help"}:
        assert f"make {target}" in readme + (ROOT / "CONTRIBUTING.md").read_text(), target


def test_make_ui_works_where_the_folder_has_a_space(tmp_path: Path) -> None:
    """MLflow's address of the store stays one word, and is the project's."""
    folder = tmp_path / "my project"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "-n", "--no-print-directory", "-o", ".venv/installed", "ui"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert shlex.split(said)[-2:] == ["--backend-store-uri", "sqlite:///mlflow.db"]
    # Its store is made and brought along first, whatever other store is asked for.
    assert said.startswith("MLFLOW_TRACKING_URI= python -m sdpipe.training.mlflow_store\n")
