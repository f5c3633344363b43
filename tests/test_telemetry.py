"""What the libraries would report to their makers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT
from PIL import Image


def test_a_prediction_leaves_and_reports_nothing(model_path: Path, tmp_path: Path) -> None:
    """onnxruntime's telemetry writes to the home folder what it will send, and warns where it cannot."""
    picture, home = tmp_path / "0.png", tmp_path / "home"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    home.mkdir()
    for name in (home, tmp_path / "gone"):
        done = subprocess.run(
            [sys.executable, "-m", "sdpipe", "predict", str(picture), "--model", str(model_path)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(name)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        assert not list(home.iterdir())
