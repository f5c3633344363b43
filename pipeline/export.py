"""Stage export@<run>: the trained and the folded weights to ensemble.onnx and model.onnx."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_run


def main(run: str) -> None:
    config = parse_section(ExportConfig, get_value(read_params(Path("params.yaml")), "export"), "export")
    export_run(Path("models") / run, config)


if __name__ == "__main__":
    run_stage(main)
