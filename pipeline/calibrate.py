"""Stage calibrate@<run>: the temperature of the probabilities, from the validation part."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import open_dataset
from sdpipe.deploy.calibrate import calibrate_run
from sdpipe.deploy.config import CalibrateConfig


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_section(CalibrateConfig, get_value(params, "calibrate"), "calibrate")
    dataset = open_dataset(Path("data") / get_value(params, "train.dataset"))
    calibrate_run(Path("models") / run, dataset, config)


if __name__ == "__main__":
    run_stage(main)
