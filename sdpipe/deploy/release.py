"""Deploy: the chosen run's file becomes models/model.onnx, after its gates held."""

from pathlib import Path

from sdpipe.deploy.config import DeployConfig
from sdpipe.errors import GateError
from sdpipe.files import read_json, replacing, sha256_of


def release(folder: Path, destination: Path, config: DeployConfig) -> None:
    """Copy models/<run>/model.onnx to `destination` if everything asked of it holds.

    Gates: metrics.json is about this very file, parity held, and the test error is at most
    `max_test_error`. Raises GateError naming those that did not hold, DataError
    without a readable metrics.json; `destination` stays as it was.
    """
    model_path = folder / "model.onnx"
    metrics = read_json(folder / "metrics.json")
    if not model_path.is_file():
        raise GateError(f"{model_path}: no such file")
    faults = []
    if metrics.get("model_sha256") != sha256_of(model_path):
        faults.append("metrics.json is about another file")
    if metrics.get("parity") is not True:
        faults.append("parity with PyTorch did not hold")
    error = metrics.get("test_error")
    if not isinstance(error, int | float) or not error <= config.max_test_error:
        faults.append(f"test error {error} is over deploy.max_test_error {config.max_test_error}")
    if faults:
        raise GateError(f"{model_path} is not deployed: " + "; ".join(faults))
    with replacing(destination) as beside:
        beside.write_bytes(model_path.read_bytes())
