"""Stage prune@<run>: smaller networks from the same training."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.store import open_dataset
from sdpipe.deploy.config import ExportConfig, PruneConfig
from sdpipe.deploy.pruning.prune import prune_run


def main(run: str) -> None:
    params = read_params(Path("params.yaml"))
    config = parse_section(PruneConfig, get_value(params, "prune"), "prune")
    export = parse_section(ExportConfig, get_value(params, "export"), "export")
    dataset = open_dataset(Path("data") / get_value(params, "train.dataset"))
    prune_run(Path("models") / run, dataset, config, export)


if __name__ == "__main__":
    run_stage(main)
