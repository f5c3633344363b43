"""Commands that need the base install only."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click

from sdpipe.commands.options import (
    MAX_MEMBERS,
    batch_size_option,
    device_option,
    model_argument,
    model_option,
    verify_option,
)
from sdpipe.commands.printing import aligned
from sdpipe.errors import ModelError, on_one_line


def _drawable(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is None:
        return None
    name = on_one_line(str(value))
    if value.suffix.lower() != ".png":
        raise click.BadParameter(f"expected a name that ends in .png, got {name}.")
    if not value.parent.is_dir():
        raise click.BadParameter(f"no such folder: {on_one_line(str(value.parent))}.")
    if value.exists() or value.is_symlink():
        from sdpipe.runtime.contact_sheet import is_contact_sheet

        if not value.is_file() or not is_contact_sheet(value):
            raise click.BadParameter(f"{name} exists and is no contact sheet; it is left alone.")
    from sdpipe.commands.writable import check_can_be_written

    check_can_be_written(value.resolve())  # now, not after all the pictures
    return value


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_option
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="Labels for each image."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, in input order.")
@click.option("--csv", "as_csv", is_flag=True, help="A header and one row an image, in input order.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    callback=_drawable,
    metavar="FILE.png",
    help="Draw the images with what they are, 60 at most.",
)
@click.option("--allow-url", is_flag=True, help="Fetch IMAGEs that begin with http:// or https://.")
@device_option
@batch_size_option
@click.option(
    "--uncertainty",
    "num_members",
    type=click.IntRange(min=2, max=MAX_MEMBERS),
    metavar="M",
    help="Also ask M sub-networks (ensemble.onnx, beside the model or in variants/): label and probability "
    "stay the model's, +- is the standard deviation of that label's probability over the M.",
)
@verify_option
def predict(
    images: tuple[str, ...],
    model: Path,
    top_k: int,
    as_json: bool,
    as_csv: bool,
    show: Path | None,
    allow_url: bool,
    device: str,
    batch_size: int,
    num_members: int | None,
    verify: bool,
) -> None:
    """Predict the label of each IMAGE: a file, a folder, a glob, a URL, or - for one on standard input."""
    from sdpipe.commands import output
    from sdpipe.runtime.artifact import open_artifact
    from sdpipe.runtime.predictor import predict as predict_files
    from sdpipe.runtime.sources import ending_of, expand

    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both.")
    with output.only_our_lines():
        artifact = open_artifact(model, device, verify=verify)
        num_classes = len(artifact.metadata.class_names)
        if top_k > num_classes:
            raise click.BadParameter(
                f"{top_k}, and the model has {num_classes} classes.", param_hint="--top-k"
            )
        ensemble = None
        if num_members is not None:
            from sdpipe.runtime.uncertainty import open_ensemble

            ensemble = open_ensemble(artifact, num_members, device, verify=verify)
        sheet = _new_sheet() if show else None
        print_result = output.choose_printer(as_json, as_csv, top_k, with_uncertainty=ensemble is not None)
        names = partial(expand, images, allow_url=allow_url, but=show)
        progress = output.Progress(lambda: sum(1 for _ in names()))
        endings: Counter[str] = Counter()
        results = predict_files(
            artifact,
            names(passed_over=lambda name: endings.update([ending_of(name)])),
            top_k=top_k,
            batch_size=batch_size,
            num_thumbnails=sheet.limit if sheet else 0,
            ensemble=ensemble,
        )
        num_failed = 0
        for result in progress.over(results):
            print_result(result)
            if output.is_failure(result):
                num_failed += 1
                file = on_one_line(output.without_user(result.file))
                progress.note(f"error: {file}: {result.message}")
            if sheet:
                sheet.add(result)
        if endings:
            progress.note(output.passed_over(endings))
        if sheet and show:
            _save(sheet, show)
    if num_failed:
        raise SystemExit(1)


def _new_sheet() -> Any:
    from sdpipe.runtime.contact_sheet import ContactSheet

    return ContactSheet()


def _save(sheet: Any, path: Path) -> None:
    """A sheet before it stays until the new one is whole."""
    from sdpipe.files import replacing

    with replacing(path.resolve()) as beside:
        sheet.save(beside)


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@verify_option
def inspect(model: Path, as_json: bool, verify: bool) -> None:
    """Show what MODEL says of itself, and its operators."""
    from dataclasses import asdict

    from sdpipe.runtime.artifact import open_artifact
    from sdpipe.runtime.variants import read_variants

    artifact = open_artifact(model, "cpu", verify=verify)
    facts = {"file": str(model), "bytes": model.stat().st_size, **asdict(artifact.metadata)}
    facts["operators"] = artifact.operators
    variants: list[dict[str, Any]] = []
    damage: ModelError | None = None  # of the table, which leaves the file's own facts
    try:
        variants = read_variants(model, artifact.metadata.fingerprint)
    except ModelError as error:
        damage = error
    if verify:
        facts["verified"] = True
    if as_json:
        click.echo(json.dumps({**facts, "variants": variants} if variants else facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<16} {_readable(value)}")
        if variants:
            click.echo("\n".join(["", *_variants_table(variants, artifact.metadata.variant)]))
    if damage:
        raise damage


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

    healthy = True
    for check in report():
        healthy &= check.ok
        click.echo(f"{'ok ' if check.ok else 'BAD'} {check.name:<24} {on_one_line(check.finding)}")
    if not healthy:
        raise SystemExit(1)
