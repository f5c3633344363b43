"""Stage train@<run>: from data/<dataset>/ to the weights of the epoch with the lowest validation error."""

import sys
from pathlib import Path

from sdpipe.config import get_value, read_params
from sdpipe.data.store import open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.provenance import code_digest
from sdpipe.training.config import parse_run
from sdpipe.training.session import train_run


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_run(get_value(params, "train"), get_value(params, "runs"), run)
    deps = get_value(read_params(Path("dvc.yaml")), "stages.train.do.deps")
    code = code_digest(Path(), [path for path in deps if path.endswith(".py")])
    train_run(run, config, open_dataset(Path("data") / config.dataset), code, Path("models") / run)


if __name__ == "__main__":
    with errors_on_one_line():
        main(*sys.argv[1:])
