"""Stage export@<run>: the trained and the folded weights to ensemble.onnx and model.onnx."""

import sys
from pathlib import Path

from sdpipe.config import get_value, parse_section, read_params
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_run
from sdpipe.errors import errors_on_one_line


def main(run: str) -> None:
    config = parse_section(ExportConfig, get_value(read_params(Path("params.yaml")), "export"), "export")
    export_run(Path("models") / run, config)


if __name__ == "__main__":
    with errors_on_one_line():
        main(*sys.argv[1:])
