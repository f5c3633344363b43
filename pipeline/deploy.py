"""Stage deploy: the chosen run becomes models/model.onnx, if its gates held."""

from pathlib import Path

from sdpipe.config import get_value, parse_section, read_params
from sdpipe.deploy.config import DeployConfig
from sdpipe.deploy.release import release
from sdpipe.errors import errors_on_one_line


def main() -> None:
    config = parse_section(DeployConfig, get_value(read_params(Path("params.yaml")), "deploy"), "deploy")
    destination = Path("models/model.onnx")
    release(Path("models") / config.run, destination, config)
    print(f"{destination} is run {config.run}")


if __name__ == "__main__":
    with errors_on_one_line():
        main()
