"""What MLflow shall hold of a run, and a note of it on disk until MLflow has its end.

`.sdpipe/runs/<fingerprint>.<run>.json` is written when a training starts, and taken away when MLflow has its
end. What is left over is of a process that was killed, or of a store that did not answer. `sdpipe track`
sends it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from sdpipe.config import describe
from sdpipe.errors import DataError
from sdpipe.files import project_root, replacing, work_folder

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""Of a run, in MLflow's words."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What MLflow shall hold of one run.

    epochs: metrics by name for each epoch, in order; summary: metrics of the whole run.
    started_ms, ended_ms: since 1970; None is as noted, else by written_ms, else when MLflow hears of it.
    written_ms: when the files of a finished training were written, train_s of the summary after its start.
    """

    name: str
    fingerprint: str
    status: Status
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    epochs: Sequence[Mapping[str, float]] = ()
    summary: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[Path] = ()
    model: Path | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    written_ms: int | None = None


_NOTE = TypeAdapter(RunRecord)


def write_note(record: RunRecord) -> None:
    """Note what MLflow may not have yet. RUNNING is a process that was killed, if it has ended."""
    with replacing(note_path(record)) as beside:
        beside.write_bytes(_NOTE.dump_json(record, indent=2))


def remove_note(path: Path) -> None:
    """MLflow has the end of this run. Where it cannot be removed, it is only sent once more."""
    with suppress(OSError):
        path.unlink()


def read_note(path: Path) -> RunRecord:
    """Raises DataError if it is missing or damaged."""
    try:
        return _NOTE.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise DataError(f"{path}: cannot be read: {describe(error)}") from error


def times_of(record: RunRecord) -> tuple[int | None, int | None]:
    """When the training began and ended: as the record says, the note of one that finished, or its files."""
    if record.status == "FINISHED" and record.ended_ms is None:
        with suppress(DataError):  # mostly there is none
            noted = read_note(note_path(record))
            if noted.status == "FINISHED":
                return noted.started_ms, noted.ended_ms
        if record.written_ms is not None and "train_s" in record.summary:
            return record.written_ms - int(record.summary["train_s"] * 1000), record.written_ms
    return record.started_ms, record.ended_ms


def notes() -> list[Path]:
    """Of runs whose end MLflow does not have, and of those that are being trained."""
    return sorted(project_root().glob(".sdpipe/runs/[!.]*.json"))


def note_path(record: RunRecord) -> Path:
    """Beside the run's checkpoints and its lock, which are named by the fingerprint alone."""
    return work_folder() / "runs" / f"{record.fingerprint}.{record.name}.json"
