"""Finding runs: in folders of runs such as models/, and in folders that a report wrote."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdpipe.errors import DataError, SdpipeError, on_one_line
from sdpipe.files import read_json
from sdpipe.report.cells import read_table
from sdpipe.report.runs import Numbers, Run, check_numbers, check_params, checked, from_row, unique
from sdpipe.training.run_files import read_cells, read_rows, run_name
from sdpipe.training.weights import ModelInfo, load_info

_OF_A_RUN = ("weights.safetensors", "history.csv", "timing.csv", "train.json", "timing.json", "metrics.json")
_CIFAR10 = frozenset(
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)

_CIFAR10_IMAGES = 60_000  # with its test images


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs of all folders, each fingerprint once, and a line for each that was left out.

    A folder holds runs, or is a run, or was written by a report. Raises DataError if there is no run at all.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for folder in folders:
        readers = list(_readers(folder))
        if not readers:
            problems.append(f"{folder}: neither a finished run nor a report in it")
        for reader in readers:
            try:
                runs += reader()
            except (OSError, SdpipeError) as error:
                problems.append(str(error))
    if not runs:
        raise DataError(
            "no finished run: looked for RUN/weights.safetensors with its history.csv, timing.csv, "
            f"train.json and timing.json, and for a report's runs.csv. {'; '.join(problems)}"
        )
    return unique(runs), [on_one_line(problem) for problem in problems]


def _readers(folder: Path) -> Iterable[Callable[[], list[Run]]]:
    """One for each part of a folder that can fail alone."""
    if (folder / "runs.csv").exists():
        yield from _report_readers(folder)
    elif _looks_like_run(folder):
        yield partial(_read_run, folder)
    elif folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and _looks_like_run(path):
                yield partial(_read_run, path)


def _looks_like_run(folder: Path) -> bool:
    try:
        return any((folder / name).exists() for name in _OF_A_RUN) and not (folder / "runs.csv").exists()
    except PermissionError:
        return True  # it is one of those left out


def _read_run(folder: Path) -> list[Run]:
    info = load_info(folder / "weights.safetensors")
    check_params(info.train_params, str(folder))
    train, timing = read_json(folder / "train.json"), read_json(folder / "timing.json")
    if train.get("fingerprint") != info.fingerprint:
        raise DataError(f"{folder}: train.json and weights.safetensors are of different trainings")
    check_numbers(train, f"{folder / 'train.json'}")
    check_numbers(timing, f"{folder / 'timing.json'}")
    try:
        run = Run(
            run=run_name(folder),
            fingerprint=info.fingerprint,
            dataset_digest=info.dataset_digest,
            pictures=_pictures(info, train["num_train"] + train["num_validation"]),
            image_size=info.image_size,
            **{name: train[name] for name in ("test_error", "validation_error", "best_epoch")},
            **{name: train[name] for name in ("num_train", "num_validation", "num_parameters")},
            expected_depth=train["expected_depth"],
            **{name: timing[name] for name in ("train_s", "images_per_s", "hardware")},
            compute=timing.get("compute", "unknown"),
            git_commit=timing.get("git_commit"),
            git_dirty=timing.get("git_dirty"),
            params=info.train_params,
            history=_history(folder, train["num_epochs"]),
            ensemble=_ensemble(folder / "ensemble.csv", info.fingerprint),
        )
    except KeyError as error:
        raise DataError(f"{folder}: train.json or timing.json lacks {error}") from error
    return [checked(run, str(folder))]


def _pictures(info: ModelInfo, num_images: int) -> str:
    """CIFAR-10's pictures in class folders are CIFAR-10's: the paper's numbers stand beside them.

    CINIC-10 has its classes and size, and more of them.
    """
    is_cifar10 = frozenset(info.class_names) == _CIFAR10 and info.image_size == (32, 32)
    is_cifar10 = is_cifar10 and num_images <= _CIFAR10_IMAGES
    return "cifar10" if info.dataset == "imagefolder" and is_cifar10 else info.dataset


def _history(folder: Path, num_epochs: float) -> list[Numbers]:
    history, timing = _checked_rows(folder / "history.csv"), _checked_rows(folder / "timing.csv")
    if [row.get("epoch") for row in history] != [row.get("epoch") for row in timing]:
        raise DataError(f"{folder}: history.csv and timing.csv have different epochs")
    if history and history[-1].get("epoch") != num_epochs:
        raise DataError(f"{folder}: history.csv ends at another epoch than the {num_epochs} of train.json")
    return [_plain({**row, **times}) for row, times in zip(history, timing, strict=True)]


def _checked_rows(path: Path) -> list[dict[str, float]]:
    rows = read_rows(path)
    for row in rows:
        check_numbers(row, str(path))
    return rows


def _plain(row: Mapping[str, float]) -> Numbers:
    """Whole numbers without a point."""
    return {name: int(value) if float(value).is_integer() else value for name, value in row.items()}


def _ensemble(path: Path, fingerprint: str) -> list[Numbers]:
    """The rows of this training; those of an earlier one with the same name are stale."""
    if not path.exists():
        return []
    try:
        rows = [row for row in read_cells(path) if row.pop("fingerprint") == fingerprint]
        ensemble = [{name: _number(value) for name, value in row.items()} for row in rows]
    except KeyError as error:
        raise DataError(f"{path}: expected a column fingerprint") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return _check_ensemble(ensemble, str(path))


def _number(text: str) -> float:
    """A whole one without a point, and exact: a seed may have more digits than a float."""
    value = float(text)
    if text.isdecimal():
        return int(text)
    return int(value) if value.is_integer() else value


_ENSEMBLE = ("members", "ensemble_error", "test_network_error", "ensemble_nll", "test_network_nll")


def _check_ensemble(rows: list[Numbers], where: str) -> list[Numbers]:
    if any(column not in row for row in rows for column in _ENSEMBLE):
        raise DataError(f"{where}: expected the columns {', '.join(_ENSEMBLE)}")
    for row in rows:
        check_numbers(row, where)
    return rows


def _report_readers(folder: Path) -> Iterable[Callable[[], list[Run]]]:
    try:
        rows = read_table(folder / "runs.csv")
        history = _by_run(folder / "history.csv")
        ensemble = _by_run(folder / "ensemble.csv") if (folder / "ensemble.csv").exists() else {}
    except SdpipeError as error:
        yield partial(_fail, error)
        return
    for row in rows:
        name = str(row.get("run"))
        yield partial(_from_row, row, history.get(name, []), ensemble.get(name, []), folder / "runs.csv")


def _fail(error: SdpipeError) -> list[Run]:
    raise error


def _from_row(row: dict[str, Any], history: list[Numbers], ensemble: list[Numbers], path: Path) -> list[Run]:
    _check_ensemble(ensemble, f"{path.with_name('ensemble.csv')}: {row.get('run')}")
    for numbers in history:
        check_numbers(numbers, f"{path.with_name('history.csv')}: {row.get('run')}")
    return [from_row(row, history, ensemble, path)]


def _by_run(path: Path) -> dict[str, list[Numbers]]:
    """The numbers of a long table, by its column `run`."""
    found: dict[str, list[Numbers]] = {}
    for row in read_table(path):
        name = str(row.pop("run", ""))
        if bad := [key for key, value in row.items() if isinstance(value, str | bool | list | dict | None)]:
            raise DataError(f"{path}: {name}: {bad[0]}: expected a number, got {row[bad[0]]!r}")
        found.setdefault(name, []).append(row)
    return found
