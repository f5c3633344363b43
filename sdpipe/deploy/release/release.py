"""Deploy: the chosen run's files become models/model.onnx and models/variants/, after their gates held.

Beside them then stand README.md (the model card), variants.csv (their figures), deployed.json (for programs)
and SHA256SUMS.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdpipe.deploy.config import DeployConfig
from sdpipe.deploy.files_of_run import FLOAT16, INT8, MODEL, files_of_run
from sdpipe.deploy.release.carried import carried_digest
from sdpipe.errors import DataError, GateError
from sdpipe.files import read_json, sha256_of, sync_folder, work_folder, write_csv, write_json, write_synced
from sdpipe.runtime.artifact import ENSEMBLE
from sdpipe.runtime.variants import COLUMNS, read_table
from sdpipe.runtime.variants import NAME as TABLE

VARIANTS, CARD, FACTS, SUMS = "variants", "README.md", "deployed.json", "SHA256SUMS"

_OF_METRICS = (
    "parity", "max_abs_logit_diff", "relative_logit_diff", "argmax_disagreements", "test_error",
    "test_error_pytorch", "num_test", "model_sha256", "fingerprint",
)  # fmt: skip
_ROUNDING = 1e-9  # errors are fractions; a difference of two is exact only up to this


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What is deployed, as deployed.json says it."""

    run: str
    fingerprint: str
    sha256: str  # of model.onnx
    code_sha256: str  # of what a version in MLflow's registry carries beside it
    test_error: float  # fraction
    registered_model: str  # its name in MLflow's registry
    variants: dict[str, str]  # name, such as int8 or keep-17.int8, to the file's name in variants/


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a run has to ship, judged."""

    run_folder: Path
    metrics: Mapping[str, Any]
    variants: Mapping[str, Path]  # whose gates held
    left_out: Mapping[str, str]  # the others, and why


def judge(folder: Path, config: DeployConfig) -> Candidate:
    """Hold models/<run>/ against the gates.

    model.onnx must be the file that metrics.json is about, with parity, and a test error of at most
    `max_test_error`; a variant likewise, its error at most `max_error_increase` (int8, fp16) or
    `max_pruned_error_increase` (fewer blocks) over that of model.onnx. Raises GateError naming what did not
    hold of model.onnx, DataError without a readable metrics.json.
    """
    model_path = folder / MODEL
    metrics = _read_metrics(folder / "metrics.json")
    if not model_path.is_file():
        raise GateError(f"{model_path}: no such file")
    faults = []
    if metrics.get("model_sha256") != sha256_of(model_path):
        faults.append("metrics.json is about another file")
    if metrics.get("parity") is not True:
        faults.append("parity with PyTorch did not hold")
    error = metrics.get("test_error")
    if not isinstance(error, int | float) or not error <= config.max_test_error:
        faults.append(f"test error {_short(error)} is over deploy.max_test_error {config.max_test_error}")
    if faults:
        raise GateError(f"{model_path} is not deployed: " + "; ".join(faults))
    found = _variant_files(folder)
    verdicts = {name: _variant_fault(name, path, metrics, config) for name, path in found.items()}
    return Candidate(
        run_folder=folder,
        metrics=metrics,
        variants={name: path for name, path in found.items() if verdicts[name] is None},
        left_out={name: fault for name, fault in verdicts.items() if fault is not None},
    )


def _short(error: Any) -> Any:
    """A fraction with digits that tell one image of 100,000; anything else as it is."""
    return f"{error:.6g}" if isinstance(error, float) else error


def _read_metrics(path: Path) -> dict[str, Any]:
    metrics = read_json(path, _OF_METRICS)
    variants = metrics.get("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(facts, dict) for facts in variants.values()):
        raise DataError(f"{path}: variants: expected the figures of each by its name; run `dvc repro`")
    return metrics


def _variant_files(folder: Path) -> dict[str, Path]:
    """The other ONNX files that the stages made of a run, by name: of the whole network, then the pruned."""
    _, *others = (one for one in files_of_run(folder) if not one.is_extra)
    found = {one.name: one.path for one in others}
    whole = [name for name in (INT8, FLOAT16, ENSEMBLE) if name in found]
    pruned = sorted(found.keys() - whole, key=lambda name: (found[name].parent.name, name))
    return {name: found[name] for name in (*whole, *pruned)}


def _variant_fault(name: str, path: Path, metrics: Mapping[str, Any], config: DeployConfig) -> str | None:
    """Why a variant is not shipped; None if it is."""
    facts = metrics.get("variants", {}).get(name)
    if facts is None:
        return "metrics.json says nothing of it"
    if facts.get("sha256") != sha256_of(path):
        return "metrics.json is about another file"
    if facts.get("parity") is not True:
        return "its parity did not hold"
    if name == ENSEMBLE:  # its error is that of the draws that a user asks for
        return None
    key = "max_error_increase" if name in (INT8, FLOAT16) else "max_pruned_error_increase"
    error, allowed = facts.get("test_error"), getattr(config, key)
    base = metrics["test_error"]
    if not isinstance(error, int | float) or not error <= base + allowed + _ROUNDING:
        return f"test error {_short(error)} is over {_short(base)} by more than deploy.{key} {allowed}"
    return None


def write_release(candidate: Candidate, models: Path, card: str, config: DeployConfig) -> Deployed:
    """Put the files that passed into `models`, with the card and the sums of everything.

    They are written beside first, and then renamed, the sums last: a failure before that changes nothing, and
    one within it (a lost power supply) is seen by `sha256sum --check`.
    """
    with _beside(models) as staged:
        _copy(candidate.run_folder / MODEL, staged / MODEL)
        (staged / VARIANTS).mkdir()
        for path in candidate.variants.values():
            _copy(path, staged / VARIANTS / path.name)
        _write_table(candidate, staged / TABLE)
        write_synced(staged / CARD, card.encode())
        deployed = Deployed(
            run=candidate.run_folder.name,
            fingerprint=candidate.metrics["fingerprint"],
            sha256=sha256_of(staged / MODEL),
            code_sha256=carried_digest(),
            test_error=candidate.metrics["test_error"],
            registered_model=config.registered_model,
            variants={name: path.name for name, path in candidate.variants.items()},
        )
        write_json(staged / FACTS, asdict(deployed))
        shipped = [f"{VARIANTS}/{path.name}" for path in candidate.variants.values()]
        names = [MODEL, *shipped, TABLE, CARD, FACTS]
        sums = "".join(f"{sha256_of(staged / name)}  {name}\n" for name in sorted(names))
        write_synced(staged / SUMS, sums.encode())
        sync_folder(staged / VARIANTS)
        # A folder cannot be renamed over one that holds files.
        if (models / VARIANTS).exists():
            (models / VARIANTS).replace(staged / "before")
        for name in (VARIANTS, MODEL, TABLE, CARD, FACTS, SUMS):
            (staged / name).replace(models / name)
        sync_folder(models)
    return deployed


@contextmanager
def _beside(models: Path) -> Iterator[Path]:
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(work_folder() / "release.lock"):
        for left in models.glob(".release.*"):  # of a process that was killed
            shutil.rmtree(left)
        staged = Path(tempfile.mkdtemp(prefix=".release.", dir=models))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)
    with destination.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_table(candidate: Candidate, path: Path) -> None:
    """The rows of the run's variants.csv that are about what is deployed, with its place below `models`.

    Raises DataError if one of them is missing or about another training.
    """
    places = {"fp32": MODEL, **{name: f"{VARIANTS}/{file.name}" for name, file in candidate.variants.items()}}
    table = candidate.run_folder / TABLE
    rows = [
        {**row, "path": places[row["variant"]]}
        for row in (read_table(table) if table.is_file() else ())
        if row["variant"] in places and row["fingerprint"] == candidate.metrics["fingerprint"]
    ]
    if missing := places.keys() - {row["variant"] for row in rows}:
        raise DataError(f"{table}: expected a row for {min(missing)}; run `dvc repro evaluate` again")
    write_csv(path, COLUMNS, [[row[column] for column in COLUMNS] for row in rows])


def read_deployed(models: Path) -> Deployed:
    """What `models` holds. Raises DataError if it was not deployed there whole."""
    facts = read_json(models / FACTS)
    if set(facts) != {column.name for column in fields(Deployed)}:
        raise DataError(f"{models / FACTS}: not written by this sdpipe; run `dvc repro deploy`")
    deployed = Deployed(**facts)
    if not (models / MODEL).is_file() or sha256_of(models / MODEL) != deployed.sha256:
        raise DataError(f"{models / MODEL}: is not the file that {FACTS} is about")
    return deployed
