"""Stage evaluate@<run>: prove every ONNX file of the run; metrics, figures, latency."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import open_dataset
from sdpipe.deploy.config import EvaluateConfig
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.track import track_quietly
from sdpipe.training.run_files import read_rows


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_section(EvaluateConfig, get_value(params, "evaluate"), "evaluate")
    dataset = open_dataset(Path("data") / get_value(params, "train.dataset"))
    folder = Path("models") / run
    num_bins = get_value(params, "calibrate.num_bins")
    evaluate_run(folder, dataset, read_rows(folder / "history.csv"), config, num_bins)
    track_quietly(folder)


if __name__ == "__main__":
    run_stage(main)
