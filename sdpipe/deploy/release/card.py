"""The model card, models/README.md: what is deployed, from the facts that the stages left, and nothing else.

The same files give the same card: it holds no time of writing and no path of the machine.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sdpipe.deploy.confidence import HIGHEST, LOWEST, is_at_bound
from sdpipe.deploy.files_of_run import FP32, MODEL, WEIGHTS
from sdpipe.deploy.release.loading import loading_section
from sdpipe.deploy.release.release import VARIANTS, Candidate
from sdpipe.errors import DataError
from sdpipe.files import read_json, sha256_of
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.interval import error_interval
from sdpipe.runtime.metadata import Metadata
from sdpipe.training.run_files import read_cells
from sdpipe.training.weights import ModelInfo, load_info

_FEW_CLASSES = 20  # a table with a row for each
_OF_TRAINING = (
    "num_parameters", "expected_depth", "num_blocks", "validation_error", "num_validation", "best_epoch",
    "num_train", "num_epochs",
)  # fmt: skip
_OF_CALIBRATION = (
    "temperature", "num_validation",
    *(f"validation_{what}_{when}" for what in ("ece", "nll") for when in ("uncalibrated", "calibrated")),
)  # fmt: skip
_OF_CLASSES = {"class", "precision", "recall", "images"}
_OF_TIMES = ("median_ms", "quartile_1_ms", "quartile_3_ms", "n")


def write_card(candidate: Candidate) -> str:
    """The card of a run that passed its gates, as Markdown.

    Reads models/<run>/: weights.safetensors, train.json, timing.json, calibration.json, latency.json,
    classes.csv. Raises DataError or ModelError naming one that is missing or damaged.
    """
    folder = candidate.run_folder
    metadata = open_artifact(folder / MODEL, device="cpu").metadata
    info = load_info(folder / WEIGHTS)
    train = read_json(folder / "train.json", _OF_TRAINING)
    timing = read_json(folder / "timing.json", ("train_s", "hardware"))
    sections = [
        _head(candidate, metadata, info, train),
        loading_section(metadata),
        _errors(candidate, folder, train),
        _parity(candidate.metrics),
        _confidence(read_json(folder / "calibration.json", _OF_CALIBRATION), candidate.metrics),
        _speed(folder / "latency.json", timing),
        _variants(candidate),
        _pictures(metadata),
        _recipe(info, train, timing),
        _limits(metadata),
    ]
    return "\n".join(section for section in sections if section)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())


def _as_text(name: str) -> str:
    """A name of the user's, of which Markdown takes nothing for its own."""
    return re.sub(r"[\\`*<>\[\]&|~]|\b_+|_+\b", lambda found: "".join(f"\\{c}" for c in found[0]), name)


def _error(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _interval(error: Any, num_images: Any) -> str:
    """Where the error on any number of such pictures would be, by what was found on these."""
    is_known = isinstance(error, int | float) and 0 <= error <= 1
    if not is_known or not isinstance(num_images, int) or num_images < 1:
        return ""
    low, high = error_interval(round(error * num_images), num_images)
    return f"{low:.4f} to {high:.4f}"


def _head(candidate: Candidate, metadata: Metadata, info: ModelInfo, train: Mapping[str, Any]) -> str:
    kind = "stochastic" if metadata.p_L < 1 else "constant"
    network = "plain network, one without skips," if info.network.skip == "plain" else "residual network"
    size = " x ".join(str(side) for side in (*metadata.image_size, metadata.channels))
    names = metadata.class_names
    more = "" if len(names) <= _FEW_CLASSES else ", ... (all are in the file's metadata)"
    rows = [
        ["run", f"{_as_text(candidate.run_folder.name)}, fingerprint {metadata.fingerprint}"],
        ["network", f"{metadata.depth} layers, {train['num_parameters']:,} parameters"],
        [
            "depth while training",
            f"{metadata.rule}, p_L {metadata.p_L:g}: {train['expected_depth']:.2f} of "
            f"{train['num_blocks']} blocks active on average",
        ],
        ["data set", f"{metadata.data_set}, SHA-256 of its arrays {metadata.data_digest}"],
        ["classes", f"{len(names)}: {', '.join(map(_as_text, names[:_FEW_CLASSES]))}{more}"],
        ["pictures", f"{size} (height, width, channels), uint8"],
        [MODEL, f"SHA-256 {candidate.metrics['model_sha256']}"],
        ["made by", f"sdpipe {metadata.sdpipe_version}"],
    ]
    return f"""# {metadata.data_set}, {metadata.depth} layers, {kind} depth

A {network} that was trained with {kind} depth (Huang et al. 2016, arXiv 1603.09382), folded into
its full-depth test network and exported as one ONNX file. Pixels go in as they are; normalisation is in the
graph. The stage `deploy` wrote this page from what the run left.

{table(["", ""], rows)}
`sha256sum --check SHA256SUMS` in this folder checks every file.
"""


def _errors(candidate: Candidate, folder: Path, train: Mapping[str, Any]) -> str:
    metrics = candidate.metrics
    measured = [
        ["validation", train["validation_error"], train["num_validation"], "PyTorch, while training"],
        ["test", metrics["test_error"], metrics["num_test"], MODEL],
        ["test", metrics["test_error_pytorch"], metrics["num_test"], "PyTorch"],
    ]
    rows = [[part, _error(error), _interval(error, n), n, who] for part, error, n, who in measured]
    text = "## Errors\n\n" + table(["part", "error", "95 % interval", "pictures", "computed by"], rows)
    text += f"""
One training (n = 1), at epoch {train["best_epoch"]:g}, of lowest validation error. The interval (Wilson's) is
what so few pictures leave open; of other trainings it says nothing.
"""
    classes = _read_classes(folder / "classes.csv")
    if len(classes) <= _FEW_CLASSES:
        text += "\n" + table(["class", "precision", "recall", "test pictures"], classes)
    return text


def _read_classes(path: Path) -> list[list[str]]:
    rows = read_cells(path)
    if any(not row.keys() >= _OF_CLASSES for row in rows):
        raise DataError(f"{path}: expected rows of {', '.join(sorted(_OF_CLASSES))}")
    shares = [[_share(path, row, name) for name in ("precision", "recall")] for row in rows]
    return [[_as_text(row["class"]), *its, row["images"]] for row, its in zip(rows, shares, strict=True)]


def _share(path: Path, row: Mapping[str, str], name: str) -> str:
    """A class without pictures has no recall, one that was never named no precision."""
    cell = row[name]
    try:
        return _error(float(cell)) if cell else ""
    except ValueError as error:
        raise DataError(f"{path}: {name} of {row['class']}: expected a number, got {cell[:40]!r}") from error


def _parity(metrics: Mapping[str, Any]) -> str:
    return f"""## Parity with PyTorch

Over all {metrics["num_test"]:,} test pictures the logits of {MODEL} differ from those of the trained
network in PyTorch by at most {metrics["max_abs_logit_diff"]:.2g}, which is
{metrics["relative_logit_diff"]:.2g} of their spread; {metrics["argmax_disagreements"]} pictures get
another class.
"""


def _confidence(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    rows = []
    temperatures = {"uncalibrated": ("before", 1.0), "calibrated": ("after", facts["temperature"])}
    for name, (when, temperature) in temperatures.items():
        ending = "_uncalibrated" if name == "uncalibrated" else ""  # others in metrics.json bear none
        rows.append(
            [
                f"{when}, T = {temperature:.4g}",
                facts[f"validation_ece_{name}"],
                facts[f"validation_nll_{name}"],
                metrics.get(f"expected_calibration_error{ending}", ""),
            ]
        )
    header = [
        "",
        "validation: expected calibration error",
        "negative log-likelihood",
        "test: expected calibration error",
    ]
    pictures = f"{(num := facts['num_validation']):,} picture{'s' * (num != 1)}"
    how = f"T was fitted on the validation part,\n{pictures}."
    if is_at_bound(facts["temperature"]):
        how += f" It is at the end of\nwhat is tried, {LOWEST:g} to {HIGHEST:g}: the confidence says little."
    if facts["temperature"] == 1:
        how = f"T stays 1, since the network\nmisclassifies none of the {pictures} of the validation part."
    return f"""## Confidence

`probabilities` are softmax(`logits` / T). {how}

{table(header, rows)}"""


def _speed(path: Path, timing: Mapping[str, Any]) -> str:
    latency = read_json(path)
    sizes = {name: facts for name, facts in latency.items() if name.startswith("batch_")}
    if not all(map(_is_timed, sizes.values())):
        raise DataError(f"{path}: expected {', '.join(_OF_TIMES)} of each that was timed; run `dvc repro`")
    contenders = list(dict.fromkeys(contender for facts in sizes.values() for contender in facts))
    rows = []
    for contender in contenders:
        measured = [facts.get(contender) for facts in sizes.values()]
        rows.append([contender, *("" if one is None else _quartiles(one) for one in measured)])
    counts = [one["n"] for facts in sizes.values() for one in facts.values()]
    if not counts:
        raise DataError(f"{path}: expected times of at least one batch size; run `dvc repro`")
    header = ["", *(f"{name.replace('_', ' of ')}" for name in sizes)]
    hardware = latency.get("hardware")
    where = f"Measured on {hardware}." if hardware else "Measured where `evaluate` ran."
    return f"""## Speed

Milliseconds a call, median (quartiles), n = {min(counts)} calls of each in turns. {where}
The training took {timing["train_s"]:.0f} s on {timing["hardware"]}.

{table(header, rows)}"""


def _is_timed(facts: Any) -> bool:
    """Whether an entry is of a batch size: contenders with their times, which are numbers."""
    return isinstance(facts, dict) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), int | float) for name in _OF_TIMES)
        for one in facts.values()
    )


def _quartiles(one: Mapping[str, Any]) -> str:
    return f"{one['median_ms']:.3g} ({one['quartile_1_ms']:.3g} to {one['quartile_3_ms']:.3g})"


def _variants(candidate: Candidate) -> str:
    if not candidate.variants:
        return ""
    shipped = {FP32: candidate.run_folder / MODEL, **candidate.variants}
    facts = {FP32: candidate.metrics, **candidate.metrics.get("variants", {})}
    rows = [
        [
            f"`{path.name if name == FP32 else f'{VARIANTS}/{path.name}'}`",
            name,
            _error(facts[name].get("test_error")),
            facts[name].get("disagreements_with_fp32", ""),
            f"{path.stat().st_size:,}",
            sha256_of(path)[:16],
        ]
        for name, path in shipped.items()
    ]
    header = ["file", "variant", "test error", "other classes than fp32", "bytes", "SHA-256 begins"]
    return f"""## Variants

{table(header, rows)}
int8: weights and activations of 8 bits. fp16: for GPUs. keep-N: N residual blocks are left. ensemble: a
second input switches blocks on and off, for sub-networks at random.
"""


def _pictures(metadata: Metadata) -> str:
    height, width = metadata.image_size
    colours = "grey" if metadata.channels == 1 else "RGB"
    is_whole = metadata.crop_fraction == 1
    part = "it" if is_whole else f"{metadata.crop_fraction:.4g} of each side, at the centre,"
    unchanged = "A picture that has this size already stays as it is.\n" if is_whole else ""
    return f"""## How a picture is prepared

Its EXIF orientation is applied; of more than 8 bits the upper 8 count; transparency is laid over white; it
becomes {colours}. The largest centred box with the aspect ratio {width} : {height} is found; {part}
is cut out and resized to {width} x {height} (width x height), bilinear with antialiasing.
{unchanged}`sdpipe predict` does all of it; the Python above does, too, but refuses grey of more
than 8 bits, and damaged EXIF data, and may be wrong about the transparent grey of a PNG that has 2 or 4
bits, or names it behind its pixels; in C++ and JavaScript it is yours to do.
"""


def _recipe(info: ModelInfo, train: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    YAML().dump({"train": info.train_params}, stream)
    commit = timing.get("git_commit")
    made = f" at commit {commit}{' with local changes' if timing.get('git_dirty') else ''}" if commit else ""
    return (
        f"## Recipe\n\n{train['num_train']:,} training pictures, {train['num_epochs']} epochs{made}:\n\n"
        f"```yaml\n{stream.getvalue()}```\n"
    )


def _limits(metadata: Metadata) -> str:
    return f"""## Use and limits

For pictures like those of {metadata.data_set}, each showing one of the {len(metadata.class_names)} classes.
The figures on this page are of its test part; nothing here promises anything about other pictures. The
network names one of its classes for every picture, also for one that shows none of them, and its
probabilities are calibrated for pictures like the validation part only. It was not examined for fairness,
nor against pictures that were made to deceive it. Do not use it alone where a wrong class does harm.
"""
