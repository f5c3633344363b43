"""The command that judges a deployed file on new pictures whose classes are known."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click

from sdpipe.commands.options import batch_size_option, device_option, model_option, verify_option
from sdpipe.commands.printing import aligned
from sdpipe.errors import DataError, on_one_line


@click.command()
@click.argument("pictures")
@model_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with the counts of all confusions.")
@click.option(
    "--mistakes",
    is_flag=True,
    help="First a line for each picture taken for another class; on standard error beside --json.",
)
@device_option
@batch_size_option
@verify_option
def evaluate(
    pictures: str, model: Path, as_json: bool, mistakes: bool, device: str, batch_size: int, verify: bool
) -> None:
    """Measure the error on new PICTURES of known class: a folder with a folder for each class.

    What cannot be read is named and not counted; exit 1 then.
    """
    from sdpipe.commands import output
    from sdpipe.runtime.artifact import open_artifact
    from sdpipe.runtime.labelled import Scores, list_labelled, predict_labelled
    from sdpipe.runtime.sources import ending_of, is_url

    if not pictures or is_url(pictures):
        raise click.UsageError(f"PICTURES: expected a folder, got {'a URL' if pictures else 'nothing'}.")
    output.check_is_read()
    with output.only_our_lines():
        artifact = open_artifact(model, device, verify=verify)
        scores = Scores(artifact.metadata.class_names)
        files = partial(list_labelled, Path(pictures), artifact.metadata.class_names)
        progress = output.Progress(lambda: sum(1 for _ in files()))
        endings: Counter[str] = Counter()
        found = files(passed_over=lambda name: endings.update([ending_of(name)]))
        for one in progress.over(predict_labelled(artifact, found, batch_size=batch_size)):
            scores.add(one)
            if output.is_failure(one.result):
                progress.note(f"error: {on_one_line(one.result.file)}: {one.result.message}")
            elif mistakes and one.is_wrong:
                (progress.note if as_json else click.echo)(_mistake(one))
        if endings:
            progress.note(output.passed_over(endings))
        if not scores.num_images:
            raise DataError(f"{pictures}: no picture there could be judged")
        facts = {"model": str(model), "fingerprint": artifact.metadata.fingerprint, **_figures(scores)}
        click.echo(json.dumps(facts) if as_json else "\n".join(_lines(facts)))
    if scores.num_failed:
        raise SystemExit(1)


def _mistake(one: Any) -> str:
    label, probability = one.result.top[0]
    names = f"{on_one_line(one.label)}, taken for {on_one_line(label)} {probability:.4f}"
    return f"{on_one_line(one.result.file)}: {names}"


def _figures(scores: Any) -> dict[str, Any]:
    """Under the names that metrics.json and classes.csv have."""
    from sdpipe.runtime.interval import error_interval

    return {
        "test_error": scores.num_wrong / scores.num_images,
        "test_error_interval": error_interval(scores.num_wrong, scores.num_images),
        "num_wrong": scores.num_wrong,
        "num_test": scores.num_images,
        "num_failed": scores.num_failed,
        "classes": [
            {
                "class": name,
                "precision": scores.precision(k),
                "recall": scores.recall(k),
                "images": int(scores.counts_KK[k].sum()),
            }
            for k, name in enumerate(scores.class_names)
        ],
        "confusion": scores.counts_KK.tolist(),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """For people: a row for each class, then the error."""
    names = [row["class"] for row in facts["classes"]]
    rows = [
        [
            row["class"],
            f"{row['images']:,}",
            *("" if row[name] is None else f"{row[name]:.4f}" for name in ("precision", "recall")),
            _most_confused(names, counts, k),
        ]
        for k, (row, counts) in enumerate(zip(facts["classes"], facts["confusion"], strict=True))
    ]
    low, high = facts["test_error_interval"]
    return [
        *aligned(["class", "pictures", "precision", "recall", "most often taken for"], rows),
        f"error {facts['test_error']:.4f}: {facts['num_wrong']:,} of {facts['num_test']:,} pictures "
        f"(95 % interval {low:.4f} to {high:.4f})",
    ]


def _most_confused(names: list[str], counts: list[int], k: int) -> str:
    wrong = [(count, name) for at, (count, name) in enumerate(zip(counts, names, strict=True)) if at != k]
    most = max(wrong, key=lambda each: each[0], default=(0, ""))
    return f"{most[1]} ({most[0]:,})" if most[0] else ""
