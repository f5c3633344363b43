"""Stage export@<run>: folded.safetensors to model.onnx."""

import sys
from pathlib import Path

from sdpipe.config import get_value, parse_section, read_params
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_file
from sdpipe.errors import errors_on_one_line


def main(run: str) -> None:
    config = parse_section(ExportConfig, get_value(read_params(Path("params.yaml")), "export"), "export")
    folder = Path("models") / run
    export_file(folder / "folded.safetensors", folder / "model.onnx", config)


if __name__ == "__main__":
    with errors_on_one_line():
        main(*sys.argv[1:])
