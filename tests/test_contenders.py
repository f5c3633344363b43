"""Which weights PyTorch runs beside a deployed file."""

from dataclasses import replace
from pathlib import Path

from conftest import make_weights

from sdpipe.deploy.timing.contenders import matching_weights, weights_files
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import save_weights


def test_weights_match_by_run_and_scales(tmp_path: Path, model_path: Path) -> None:
    """A pruned file's are those without the same blocks, also of a size that was asked for later."""
    removed = {"weights": (), "pruned/keep-7": (4, 7), "pruned-extra/keep-6": (4, 5, 7)}
    sizes = {
        tmp_path / "run" / f"{name}.safetensors": make_weights(removed=ells) for name, ells in removed.items()
    }
    for path, weights in sizes.items():
        path.parent.mkdir(exist_ok=True)
        save_weights(path, weights)
        path.with_suffix(".onnx").touch()
    damaged = tmp_path / "damaged" / "weights.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"x")
    assert weights_files(tmp_path) == [damaged, *sizes]
    candidates = [tmp_path / "gone.safetensors", *weights_files(tmp_path)]
    metadata = open_artifact(model_path, "cpu").metadata
    for path, weights in sizes.items():
        described = replace(metadata, scales=list(weights.info.scales))
        assert matching_weights(described, candidates) == path
    assert matching_weights(replace(metadata, fingerprint="e" * 16), candidates) is None
