"""Stage deploy: the chosen run becomes what models/ offers, if its gates held; MLflow registers it."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.deploy.config import DeployConfig
from sdpipe.deploy.release.card import write_card
from sdpipe.deploy.release.registry import register_quietly
from sdpipe.deploy.release.release import judge, write_release
from sdpipe.files import project_root


def main() -> None:
    config = parse_section(DeployConfig, get_value(read_params(Path("params.yaml")), "deploy"), "deploy")
    models = Path("models")
    candidate = judge(models / config.run, config)
    for name, reason in candidate.left_out.items():
        print(f"{name} is left out: {reason}")
    deployed = write_release(candidate, models, write_card(candidate), config)
    print(f"{models}/model.onnx is run {config.run}, with {len(deployed.variants)} variants beside it")
    if project_root() == Path.cwd().resolve():
        register_quietly(models)
    else:  # `dvc exp run --temp`, `--queue`: what is served is what the project has
        print("not registered: an experiment in a copy of the project, which `dvc exp apply` takes over")


if __name__ == "__main__":
    run_stage(main)
