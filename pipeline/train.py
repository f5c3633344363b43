"""Stage train@<run>: from data/<dataset>/ to the weights of the epoch with the lowest validation error."""

import os
import shlex
import sys
from pathlib import Path

from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import open_dataset
from sdpipe.errors import ConfigError, errors_on_one_line
from sdpipe.provenance import code_digest
from sdpipe.training.config import MachineConfig, parse_run
from sdpipe.training.session import train_run


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_run(get_value(params, "train"), get_value(params, "runs"), run)
    machine = parse_section(MachineConfig, get_value(params, "machine"), "machine")
    if machine.launch is not None and "WORLD_SIZE" not in os.environ:
        launch(machine.launch, run)
    deps = get_value(read_params(Path("dvc.yaml")), "stages.train.do.deps")
    code = code_digest(Path(), [path for path in deps if path.endswith(".py")])
    dataset = open_dataset(Path("data") / config.dataset)
    train_run(run, config, machine, dataset, code, Path("models") / run)


def launch(launcher: str, run: str) -> None:
    """Become the launcher; it starts this stage again in each of its processes."""
    words = [*shlex.split(launcher), "-m", "pipeline.train", run]
    try:
        os.execvp(words[0], words)  # noqa: S606
    except OSError as error:
        raise ConfigError(f"params.yaml: machine.launch: {words[0]}: {error.strerror}") from error


if __name__ == "__main__":
    with errors_on_one_line():
        main(*sys.argv[1:])
