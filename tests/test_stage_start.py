"""A stage's start: what it imports is not looked through for garbage, and what it does then is."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = """
import gc
import pipeline
print(gc.isenabled())
"""
STAGE = """
import gc
import pipeline
pipeline.run_stage(lambda run: print(run, gc.isenabled(), gc.get_freeze_count() > 0))
"""


def output(project: Path, *command: str) -> list[str]:
    """Of a stage in a package of its own, as those in pipeline/ are."""
    (project / "stages").mkdir()
    (project / "stages" / "__init__.py").write_text(PACKAGE)
    (project / "stages" / "some.py").write_text(STAGE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{project}"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_nothing_is_collected_before_a_stage_runs(project: Path) -> None:
    assert output(project, "-m", "stages.some", "plain") == ["False", "plain True True"]


def test_who_imports_a_stage_collects_as_before(project: Path) -> None:
    assert output(project, "-c", "import stages") == ["True"]
