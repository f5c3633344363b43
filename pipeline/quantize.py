"""Stage quantize@<run>: model.onnx and the pruned files as int8, and float16."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import open_dataset
from sdpipe.deploy.config import QuantizeConfig
from sdpipe.deploy.quantize import quantize_run


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_section(QuantizeConfig, get_value(params, "quantize"), "quantize")
    dataset = open_dataset(Path("data") / get_value(params, "train.dataset"))
    quantize_run(Path("models") / run, dataset, config)


if __name__ == "__main__":
    run_stage(main)
