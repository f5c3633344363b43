"""MLflow and its store where this machine has too little for them."""

import errno
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_tracking import RECORD

from sdpipe.errors import TrackingError
from sdpipe.training.mlflow_store import connected
from sdpipe.training.tracking import LiveTracker, publish


class Broken(ModuleType):
    """A module from which nothing can be imported: that raises `error`."""

    error: Exception

    def __getattr__(self, name: str) -> object:
        raise self.error


@pytest.mark.parametrize("error", [ImportError("no symbol"), OSError(errno.EMFILE, "many"), MemoryError()])
def test_an_mlflow_that_cannot_be_imported_is_one_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Memory or open files are short, or a library does not fit; but an interruption stays one."""
    broken = Broken("sqlalchemy.exc")
    broken.error = error
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    LiveTracker(RECORD).close("FINISHED")
    told = capsys.readouterr().err
    assert told.startswith(f"warning: MLflow cannot be imported: {type(error).__name__}: {error}; nothing")
    assert told.count("\n") == 1
    error.__cause__ = KeyboardInterrupt()
    with pytest.raises(type(error)):
        publish(RECORD)


def test_a_lack_of_memory_is_named(mlflow_store: Path) -> None:
    """Python's own error has no text."""
    with pytest.raises(TrackingError, match="^MLflow: sqlite:.*: MemoryError$"), connected():
        raise MemoryError
