"""All of params.yaml at once: what one stage alone cannot check."""

from typing import Any

from pydantic import Field

from sdpipe.config import Section, parse_section
from sdpipe.data.config import DATASET_SECTIONS, FetchConfig, check_apart, dataset_name
from sdpipe.deploy.config import (
    CalibrateConfig,
    DeployConfig,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
)
from sdpipe.errors import ConfigError
from sdpipe.training.config import MachineConfig, TrainConfig, parse_run

_TAKEN = ("variants", "SHA256SUMS")
_MAX_NAME_BYTES = 200  # a file's may have 255, and some of a run's are longer than the run's


class Params(Section):
    """The sections of params.yaml. `train` is checked once for each run, with the run's overrides."""

    fetch: FetchConfig
    train: dict[str, Any]
    runs: dict[str, dict[str, Any] | None] = Field(min_length=1)
    calibrate: CalibrateConfig
    export: ExportConfig
    prune: PruneConfig
    quantize: QuantizeConfig
    evaluate: EvaluateConfig
    deploy: DeployConfig
    machine: MachineConfig


def check_params(values: Any) -> None:
    """Raise ConfigError, naming the key, unless every section and every run is right."""
    params = parse_section(Params, values, "")
    for field, config in params.fetch:
        check_apart(dataset_name(field), config)
    parse_section(TrainConfig, params.train, "train")  # by itself too: runs may hide a fault of it
    trained: dict[str, str] = {}  # what is trained -> the run
    for run in params.runs:
        if not run.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"params.yaml: runs.{run}: expected letters, digits, - and _ in the name")
        if run in _TAKEN:
            raise ConfigError(f"params.yaml: runs.{run}: expected another name; models/{run} is taken")
        if len(run.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"params.yaml: runs.{run}: expected a name of at most {_MAX_NAME_BYTES} bytes")
        config = parse_run(params.train, params.runs, run)
        if (twin := trained.setdefault(config.model_dump_json(), run)) != run:
            raise ConfigError(f"params.yaml: runs.{run}: is the same training as runs.{twin}")
        if config.dataset not in DATASET_SECTIONS:
            known = ", ".join(DATASET_SECTIONS)
            raise ConfigError(f"params.yaml: train.dataset: expected one of {known}, got {config.dataset!r}")
    if params.deploy.run not in params.runs:
        raise ConfigError(
            f"params.yaml: deploy.run: expected one of {', '.join(params.runs)}, got {params.deploy.run!r}"
        )
