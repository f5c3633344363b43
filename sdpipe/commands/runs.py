"""Commands about trainings: recipes, runs, reports. They need the training packages."""

from collections.abc import Callable
from pathlib import Path

import click

from sdpipe.commands.options import MAX_MEMBERS, MAX_SEED, MAX_SEEDS, whole_numbers
from sdpipe.errors import SdpipeError, is_of_the_world, on_one_line, training_packages


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[MODELS/RUN]...")
def track(folders: tuple[Path, ...]) -> None:
    """Send runs, and what is deployed, to MLflow where they are missing.

    Default: all of models/, and trainings that did not finish.
    """

    def is_deployment(folder: Path) -> bool:
        return (folder / "deployed.json").is_file()

    def load() -> Callable[[Path], None]:
        from sdpipe.deploy.release.registry import register
        from sdpipe.files import project_root
        from sdpipe.track import track as track_run
        from sdpipe.track import track_note
        from sdpipe.training.tracking import awaited

        def send(path: Path) -> None:
            if path.suffix == ".json":
                if path.resolve().parent != (project_root() / ".sdpipe" / "runs").resolve():
                    raise SdpipeError(f"{path}: expected a folder, or a note in .sdpipe/runs")
                sent = track_note(path)
                if sent is None:
                    click.echo(f"{path}: its training goes on, or has ended, and sends it itself")
                else:
                    record, run_id = sent
                    click.echo(f"run {record.name}, {record.status.lower()}: MLflow run {run_id}")
            elif is_deployment(path):
                with awaited():
                    version = register(path)
                click.echo(f"{path}: version {version} in MLflow's registry")
            else:
                click.echo(f"{path}: MLflow run {track_run(path)}")

        return send

    def all_there_is() -> tuple[Path, ...]:
        from sdpipe.training.run_record import notes

        models = Path("models")
        return (*notes(), *_finished_runs(), *([models] if is_deployment(models) else []))

    _for_each_run(folders, "track", load, all_there_is)


@click.group()
def recipe() -> None:
    """The papers' trainings, ready to run: list them, show one, write it to params.yaml."""


@recipe.command("list")
def recipe_list() -> None:
    """Show the names, what each trains, and the paper's test errors."""
    with training_packages("recipe"):
        from sdpipe.recipes import load_recipes

        for name, each in load_recipes().items():
            click.echo(f"{name:<26} {each.title}")
            for epochs, paper in each.results.items():
                text = paper.constant_error_in_text
                constant = f"{paper.constant_error:.2%}" + (f" (text {text:.2%})" if text else "")
                click.echo(
                    f"{'':<26} the paper's test error after {epochs} epochs: "
                    f"{constant} -> {paper.stochastic_error:.2%}"
                )


seeds_option = click.option(
    "--seeds",
    type=click.IntRange(min=1, max=MAX_SEEDS),
    default=1,
    show_default=True,
    help="Runs of each kind.",
)


@recipe.command("show")
@click.argument("name")
@seeds_option
def recipe_show(name: str, seeds: int) -> None:
    """Print the params.yaml that `recipe use NAME` would write."""
    with training_packages("recipe"):
        from sdpipe.recipes import apply_recipe

        click.echo(apply_recipe(name, Path("params.yaml"), seeds), nl=False)


@recipe.command("use")
@click.argument("name")
@seeds_option
def recipe_use(name: str, seeds: int) -> None:
    """Write recipe NAME to params.yaml; `dvc repro` then runs it.

    Sections that no recipe concerns stay, such as where data come from. The file before is kept.
    """
    with training_packages("recipe"):
        from sdpipe.recipes import find_recipe, use_recipe

        backup = use_recipe(name, Path("params.yaml"), seeds)
        num_runs = seeds * len(find_recipe(name).runs)
    if backup is None:
        click.echo(f"params.yaml is {name} already")
    else:
        click.echo(f"params.yaml: {name}, {num_runs} runs; the one before is {backup}. Next: dvc repro")


@click.command("report")
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
    with training_packages("report"):
        from sdpipe.report.write import write_report
    problems = write_report(folders or (Path("models"),), out)
    for problem in problems:
        click.echo(f"error: left out: {on_one_line(problem)}", err=True)
    click.echo(f"{out}/index.html")
    if problems:
        raise SystemExit(1)


def _member_counts(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int]:
    numbers = whole_numbers(value)
    if numbers is None or numbers[0] < 1 or numbers[-1] > MAX_MEMBERS:
        raise click.BadParameter(f"expected numbers from 1 to {MAX_MEMBERS} like 1,4,16, got {value!r}")
    return numbers


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[MODELS/RUN]...")
@click.option(
    "--members",
    default="1,4,16",
    show_default=True,
    callback=_member_counts,
    help="How many sub-networks are averaged.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=MAX_SEED),
    default=0,
    show_default=True,
    help="Of their draws.",
)
def ensemble(folders: tuple[Path, ...], members: list[int], seed: int) -> None:
    """Compare each run's test network with the average of sampled sub-networks.

    Default: all of models/ but those of constant depth, which have no sub-networks. Writes
    models/RUN/ensemble.csv, which `sdpipe report` draws.
    """

    def load() -> Callable[[Path], None]:
        from sdpipe.data.store import open_dataset
        from sdpipe.deploy.ensemble import compare_ensemble
        from sdpipe.training.weights import load_info

        def compare(folder: Path) -> None:
            info = load_info(folder / "weights.safetensors")
            if not folders and info.network.p_L == 1:
                click.echo(f"{folder}: constant depth has no sub-networks; passed over")
                return
            dataset = open_dataset(Path("data") / info.dataset)
            for row in compare_ensemble(folder, dataset, members, seed):
                click.echo(
                    f"{folder}: M = {row['members']}: error {row['ensemble_error']:.4f} (test network "
                    f"{row['test_network_error']:.4f}), negative log-likelihood {row['ensemble_nll']:.4f} "
                    f"({row['test_network_nll']:.4f})"
                )

        return compare

    _for_each_run(folders, "ensemble", load)


def _finished_runs() -> tuple[Path, ...]:
    return tuple(sorted(path.parent for path in Path("models").glob("*/weights.safetensors")))


def _for_each_run(
    folders: tuple[Path, ...],
    command: str,
    load: Callable[[], Callable[[Path], None]],
    find_all: Callable[[], tuple[Path, ...]] = _finished_runs,
) -> None:
    """Load a command's work and do it for the chosen runs, or all.

    A failing run is named, and the others are still done. What is not installed is said first.
    """
    failed = False
    with training_packages(command):
        work = load()
        chosen = folders or find_all()
        if not chosen:
            raise SdpipeError("models/: no finished run; `make repro` trains them")
        for folder in chosen:
            try:
                work(folder)
            except (SdpipeError, OSError) as error:
                if isinstance(error, BrokenPipeError) or not is_of_the_world(error):
                    raise  # who read our output has gone, or it is our bug
                failed = True
                click.echo(f"error: {on_one_line(str(error))}", err=True)
    if failed:
        raise SystemExit(1)
