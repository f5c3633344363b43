"""The command line. Everything heavy is imported inside the command that needs it.

Exit 0: all went well. 1: something failed, and the rest was still done. 2: called wrong.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sdpipe.errors import SdpipeError, errors_on_one_line, training_packages
from sdpipe.version import __version__

DEFAULT_MODEL = "models/model.onnx"

model_help = f"The ONNX file. Default: {DEFAULT_MODEL}, or the environment variable SDPIPE_MODEL."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sdpipe")
def main() -> None:
    """Classify pictures with a deployed stochastic-depth network."""


def _existing_model(_context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    if not value.is_file():
        raise click.BadParameter(f"no such file: {value}. `make repro` makes {DEFAULT_MODEL}.")
    return value


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=DEFAULT_MODEL,
    envvar="SDPIPE_MODEL",
    callback=_existing_model,
    help=model_help,
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="Labels for each image."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, in input order.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time."
)
def predict(
    images: tuple[str, ...], model: Path, top_k: int, as_json: bool, device: str, batch_size: int
) -> None:
    """Predict the label of each IMAGE: a file, a folder, a glob, or - for one image on standard input."""
    from sdpipe.runtime.artifact import open_artifact
    from sdpipe.runtime.predictor import Failure, expand
    from sdpipe.runtime.predictor import predict as predict_files

    with errors_on_one_line():
        artifact = open_artifact(model, device)
        num_classes = len(artifact.metadata.class_names)
        if top_k > num_classes:
            raise click.BadParameter(
                f"{top_k}, and the model has {num_classes} classes.", param_hint="--top-k"
            )
        num_failed = 0
        results = predict_files(artifact, expand(images), top_k=top_k, batch_size=batch_size)
        for result in _with_progress(results):
            num_failed += isinstance(result, Failure)
            _print_json(result) if as_json else _print_line(result, top_k)
            if isinstance(result, Failure):
                click.echo(f"error: {_on_one_line(result.file)}: {result.message}", err=True)
    if num_failed:
        raise SystemExit(1)


def _with_progress(results: Any) -> Any:
    """A count on standard error while results go to a file or a pipe; silent otherwise."""
    if sys.stdout.isatty() or not sys.stderr.isatty():
        yield from results
        return
    num_done = 0
    for num_done, result in enumerate(results, start=1):
        yield result
        if num_done % 100 == 0:
            click.echo(f"\r{num_done:,} images", nl=False, err=True)
    click.echo(f"\r{num_done:,} images", err=True)


def _on_one_line(name: str) -> str:
    """File names may hold newlines and terminal codes; a line of output must stay one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)


def _print_json(result: Any) -> None:
    if hasattr(result, "code"):
        line = {"file": result.file, "ok": False, "error": result.code, "message": result.message}
    else:
        top = [{"label": label, "probability": probability} for label, probability in result.top]
        line = {"file": result.file, "ok": True, **top[0], "top": top}
    click.echo(json.dumps(line))


def _print_line(result: Any, top_k: int) -> None:
    if hasattr(result, "code"):
        return
    label, probability = result.top[0]
    click.echo(f"{_on_one_line(result.file)}: {_on_one_line(label)} {probability:.4f}")
    if top_k > 1:
        for label, probability in result.top:
            click.echo(f"    {_on_one_line(label):<20} {probability:.4f}")


@main.command()
@click.argument(
    "model",
    type=click.Path(path_type=Path),
    default=DEFAULT_MODEL,
    envvar="SDPIPE_MODEL",
    callback=_existing_model,
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(model: Path, as_json: bool) -> None:
    """Show what MODEL says of itself, and its operators."""
    from dataclasses import asdict

    from sdpipe.runtime.artifact import count_operators, open_artifact

    with errors_on_one_line():
        artifact = open_artifact(model, "cpu")
        facts = {"file": str(model), "bytes": model.stat().st_size, **asdict(artifact.metadata)}
        facts["operators"] = count_operators(model)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:<16} {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else _on_one_line(str(value))


@main.command()
def doctor() -> None:
    """Show versions, devices, the onnxruntime providers that really work, stores and disk space."""
    from sdpipe.doctor import report

    with errors_on_one_line():
        healthy = True
        for check in report():
            healthy &= check.ok
            click.echo(f"{'ok ' if check.ok else 'BAD'} {check.name:<24} {check.finding}")
    if not healthy:
        raise SystemExit(1)


@main.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[MODELS/RUN]...")
def track(folders: tuple[Path, ...]) -> None:
    """Send finished runs to MLflow where they are missing. Default: all of models/."""

    def send(folder: Path) -> None:
        from sdpipe.track import track as track_folder

        click.echo(f"{folder}: MLflow run {track_folder(folder)}")

    _for_each_run(folders, "track", send)


@main.group()
def recipe() -> None:
    """The papers' trainings, ready to run: list them, show one, write it to params.yaml."""


@recipe.command("list")
def recipe_list() -> None:
    """Show the names, what each trains, and the paper's test errors."""
    with errors_on_one_line(), training_packages("recipe"):
        from sdpipe.recipes import load_recipes

        for name, each in load_recipes().items():
            click.echo(f"{name:<26} {each.title}")
            if each.paper is not None:
                constant, stochastic = each.paper.constant_error, each.paper.stochastic_error
                click.echo(f"{'':<26} the paper's test error: {constant:.2%} -> {stochastic:.2%}")


seeds_option = click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each kind."
)


@recipe.command("show")
@click.argument("name")
@seeds_option
def recipe_show(name: str, seeds: int) -> None:
    """Print the params.yaml that `recipe use NAME` would write."""
    with errors_on_one_line(), training_packages("recipe"):
        from sdpipe.recipes import apply_recipe

        click.echo(apply_recipe(name, Path("params.yaml"), seeds), nl=False)


@recipe.command("use")
@click.argument("name")
@seeds_option
def recipe_use(name: str, seeds: int) -> None:
    """Write recipe NAME to params.yaml; `dvc repro` then runs it.

    Sections that no recipe concerns stay, such as where data come from. The file before is kept.
    """
    with errors_on_one_line(), training_packages("recipe"):
        from sdpipe.recipes import find_recipe, use_recipe

        backup = use_recipe(name, Path("params.yaml"), seeds)
        num_runs = seeds * len(find_recipe(name).runs)
    if backup is None:
        click.echo(f"params.yaml is {name} already")
    else:
        click.echo(f"params.yaml: {name}, {num_runs} runs; the one before is {backup}. Next: dvc repro")


@main.command("report")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="report",
    show_default=True,
    help="The folder to write, or to replace if a report wrote it.",
)
def report_command(folders: tuple[Path, ...], out: Path) -> None:
    """Redraw the paper's figures and tables from the runs in each FOLDER, or in an earlier report's.

    Default: models/. Writes PNG, CSV and index.html, one page that opens offline.
    """
    with errors_on_one_line():
        with training_packages("report"):
            from sdpipe.report.write import write_report
        problems = write_report(folders or (Path("models"),), out)
        for problem in problems:
            click.echo(f"error: left out: {_on_one_line(problem)}", err=True)
        click.echo(f"{out}/index.html")
    if problems:
        raise SystemExit(1)


@main.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[MODELS/RUN]...")
@click.option("--members", default="1,4,16", show_default=True, help="How many sub-networks are averaged.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of their draws.")
def ensemble(folders: tuple[Path, ...], members: str, seed: int) -> None:
    """Compare each run's test network with the average of sampled sub-networks. Default: all of models/.

    Writes models/RUN/ensemble.csv, which `sdpipe report` draws.
    """
    if not all(part.strip().isdigit() and int(part) for part in members.split(",")):
        raise click.BadParameter(f"expected numbers like 1,4,16, got {members!r}", param_hint="--members")
    counts = sorted({int(part) for part in members.split(",")})

    def compare(folder: Path) -> None:
        from sdpipe.data.store import open_dataset
        from sdpipe.deploy.ensemble import compare_ensemble
        from sdpipe.training.weights import load_info

        dataset = open_dataset(Path("data") / load_info(folder / "weights.safetensors").dataset)
        for row in compare_ensemble(folder, dataset, counts, seed):
            click.echo(
                f"{folder}: M = {row['members']}: error {row['ensemble_error']:.4f} (test network "
                f"{row['test_network_error']:.4f}), negative log-likelihood {row['ensemble_nll']:.4f} "
                f"({row['test_network_nll']:.4f})"
            )

    _for_each_run(folders, "ensemble", compare)


def _for_each_run(folders: tuple[Path, ...], command: str, work: Callable[[Path], None]) -> None:
    """Do it for the chosen runs, or all; a failing one is named, and the others are still done."""
    failed = False
    with errors_on_one_line(), training_packages(command):
        chosen = folders or tuple(
            sorted(path.parent for path in Path("models").glob("*/weights.safetensors"))
        )
        if not chosen:
            raise SdpipeError("models/: no finished run; `make repro` trains them")
        for folder in chosen:
            try:
                work(folder)
            except SdpipeError as error:
                failed = True
                click.echo(f"error: {error}", err=True)
    if failed:
        raise SystemExit(1)
