"""The MLflow store: where runs are kept, opened so that one that is down or odd is one line, and soon."""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from sdpipe.errors import (
    SdpipeError,
    TrackingError,
    errors_on_one_line,
    interruption_behind,
    without_passwords,
)
from sdpipe.files import work_folder
from sdpipe.training.sqlite_store import (
    BESIDE_TAG,
    artifacts,
    create_database,
    follow_artifacts,
    from_the_root,
    is_own,
    look_at,
)

EXPERIMENT = "sdpipe"  # MLFLOW_EXPERIMENT_NAME overrides it

# MLflow's own variables; its defaults would block for minutes on a server that is down.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def connected() -> Iterator[tuple[Any, str]]:
    """MLflow itself, with its store set and open, and the experiment's id.

    Raises TrackingError if it cannot be imported, or if the store refuses, within the block too.
    """
    mlflow, of_the_store = imported()
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised, too
    try:
        yield mlflow, _open_store(mlflow)
    except SdpipeError:
        raise
    except Exception as error:
        # ImportError: a database's driver.
        fault = str(error) or type(error).__name__
        if not isinstance(error, (*of_the_store, OSError, ImportError, MemoryError)):
            if is_server(store_uri()) and _arose_in("mlflow", error):
                kind = "an answer that makes no sense"  # of a server that is none of MLflow's
            elif _arose_in("alembic", error):
                kind = "its tables cannot be made"  # as where another MLflow makes them, or is newer
            else:
                raise  # a bug, ours or MLflow's
            fault = f"{kind}: {type(error).__name__}: {error}"
        text = " ".join(f"{store_uri()}: {fault}".split())
        raise TrackingError(f"MLflow: {without_passwords(text)[:300]}") from error


def imported() -> tuple[Any, tuple[type[Exception], ...]]:
    """MLflow, and the errors in which it and its libraries tell of a store.

    Raises TrackingError if it cannot be imported.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
        from google.protobuf.json_format import Error as JsonError  # type: ignore[import-untyped]
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except Exception as error:
        # Of any kind: behind an import that broke off half-way, the next trips over what is there already.
        if interruption_behind(error):
            raise
        raise TrackingError(f"MLflow cannot be imported: {type(error).__name__}: {error}") from error
    return mlflow, (MlflowException, SQLAlchemyError, JsonError)


def _arose_in(package: str, error: Exception) -> bool:
    """A package trips over what it finds in ways that no list of errors has."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith(f"{package}.") for frame, _line in frames)


def store_uri() -> str:
    """Where runs are kept: MLFLOW_TRACKING_URI, else mlflow.db in the project's root."""
    return from_the_root(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


def is_server(uri: str) -> bool:
    """Whether it is MLflow's own server, or one of its kind, which makes its tables itself."""
    return uri.startswith(("http", "databricks"))


def _open_store(mlflow: Any) -> str:
    """Set the store, create what is missing. Returns the experiment's id."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    uri = store_uri()
    try:
        urlsplit(uri)
    except ValueError as error:
        raise TrackingError(f"MLflow: {without_passwords(uri)} is no address: {error}") from error
    mlflow.set_tracking_uri(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    turns = FileLock(work_folder() / "mlflow.lock")
    # Who calls a server that hangs shall keep no other process from MLflow, which may have another store.
    with nullcontext() if is_server(uri) else turns:
        if uri.startswith(tuple(DATABASE_ENGINES)):  # a server is not asked this way
            create_database(mlflow, uri)
            look_at(uri)
            follow_artifacts(uri)
        return _experiment_id(mlflow, uri, name)


def _experiment_id(mlflow: Any, uri: str, name: str) -> str:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name) or _create_experiment(mlflow, client, uri, name)
    is_beside = is_own(uri) and experiment.artifact_location == artifacts().as_uri()
    if is_beside and BESIDE_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, BESIDE_TAG, "true")
    return str(experiment.experiment_id)


def _create_experiment(mlflow: Any, client: Any, uri: str, name: str) -> Any:
    # A server knows where its artifacts go; for a database in a file we say it.
    location = artifacts().as_uri() if uri.startswith("sqlite") else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    except mlflow.MlflowException:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment  # another project made it meanwhile


def reach() -> None:
    """Open the store once, made where there is none. Raises TrackingError if it refuses."""
    with connected():
        pass


def prepare() -> None:
    """Make the store where there is none, and bring its artifacts along where the project was moved.

    `make ui` does so first: a server of MLflow would make the tables while a training does, and crash both.
    """
    with errors_on_one_line():
        reach()


if __name__ == "__main__":
    prepare()
