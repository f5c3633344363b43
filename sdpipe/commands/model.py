"""Commands that need the base install only."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from sdpipe.commands.printing import aligned, on_one_line
from sdpipe.errors import errors_on_one_line

DEFAULT_MODEL = "models/model.onnx"

model_help = f"The ONNX file. Default: {DEFAULT_MODEL}, or the environment variable SDPIPE_MODEL."


def _existing_model(_context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    if not value.is_file():
        raise click.BadParameter(f"no such file: {value}. `make repro` makes {DEFAULT_MODEL}.")
    return value


@click.command()
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
@click.option(
    "--uncertainty",
    "num_members",
    type=click.IntRange(min=2),
    metavar="M",
    help="Also ask M sub-networks (ensemble.onnx, beside the model or in variants/): label and probability "
    "stay the model's, +- is the standard deviation of that label's probability over the M.",
)
def predict(
    images: tuple[str, ...],
    model: Path,
    top_k: int,
    as_json: bool,
    device: str,
    batch_size: int,
    num_members: int | None,
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
        ensemble = None
        if num_members is not None:
            from sdpipe.runtime.uncertainty import open_ensemble

            ensemble = open_ensemble(artifact, num_members, device)
        num_failed = 0
        results = predict_files(
            artifact, expand(images), top_k=top_k, batch_size=batch_size, ensemble=ensemble
        )
        for result in _with_progress(results):
            num_failed += isinstance(result, Failure)
            _print_json(result) if as_json else _print_line(result, top_k)
            if isinstance(result, Failure):
                click.echo(f"error: {on_one_line(result.file)}: {result.message}", err=True)
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


def _print_json(result: Any) -> None:
    if hasattr(result, "code"):
        line = {"file": result.file, "ok": False, "error": result.code, "message": result.message}
    else:
        top = [{"label": label, "probability": probability} for label, probability in result.top]
        line = {"file": result.file, "ok": True, **top[0], "top": top}
        if result.uncertainty is not None:
            line["uncertainty"] = vars(result.uncertainty)
    click.echo(json.dumps(line))


def _print_line(result: Any, top_k: int) -> None:
    if hasattr(result, "code"):
        return
    label, probability = result.top[0]
    spread = "" if result.uncertainty is None else f" {_spread(result.uncertainty)}"
    click.echo(f"{on_one_line(result.file)}: {on_one_line(label)} {probability:.4f}{spread}")
    if top_k > 1:
        for label, probability in result.top:
            click.echo(f"    {on_one_line(label):<20} {probability:.4f}")


def _spread(uncertainty: Any) -> str:
    num_agreeing = round(uncertainty.agreement * uncertainty.members)
    return f"+- {uncertainty.probability_std:.4f} ({num_agreeing} of {uncertainty.members})"


@click.command()
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
    from sdpipe.runtime.variants import read_variants

    with errors_on_one_line():
        artifact = open_artifact(model, "cpu")
        facts = {"file": str(model), "bytes": model.stat().st_size, **asdict(artifact.metadata)}
        facts["operators"] = count_operators(model)
        variants = read_variants(model)
    if as_json:
        click.echo(json.dumps({**facts, "variants": variants} if variants else facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:<16} {_readable(value)}")
    if variants:
        click.echo("\n".join(["", *_variants_table(variants, artifact.metadata.variant)]))


def _variants_table(variants: list[dict[str, Any]], this: str) -> list[str]:
    """All variants of the network side by side; a star marks the file in question."""
    header = ["variant", "test error", "KB", "batch 1 ms", "batch 64 ms", "unlike fp32", "parity"]
    formats = {"test_error": "{:.2%}", "bytes": "{:,.0f}", "batch_1_ms": "{:.2f}", "batch_64_ms": "{:.1f}"}
    rows = []
    for row in variants:
        found = {**row, "bytes": row["bytes"] and row["bytes"] / 1e3}
        name = f"{row['variant']} *" if row["variant"] == this else str(row["variant"])
        names = (*formats, "disagreements_with_fp32", "parity")
        cells = [(formats.get(key, "{}"), found[key]) for key in names]
        rows.append([name, *("" if value is None else form.format(value) for form, value in cells)])
    return aligned(header, rows)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else on_one_line(str(value))


@click.command()
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
