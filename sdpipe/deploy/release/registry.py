"""The deployed model in MLflow's registry: a version for each file and code, an alias on the deployed one."""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sdpipe.deploy.files_of_run import MODEL
from sdpipe.deploy.release.carried import PACKAGE, REQUIREMENTS, SERVED, SHIPPED, carried_digest
from sdpipe.deploy.release.release import Deployed, read_deployed
from sdpipe.errors import tell
from sdpipe.files import work_folder
from sdpipe.training.logged_models import has_files, log_model
from sdpipe.training.mlflow_store import connected
from sdpipe.training.records import record_of_times
from sdpipe.training.tracking import publish, quietly

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
"""Of the deployed version; it moves only after the gates held."""


def register(models: Path) -> str:
    """Register what `models` holds under its name, and give that version the alias.

    A version of that very file and of the code that was deployed with it is taken again. Returns the version.
    Raises TrackingError if the store refuses, DataError if `models` is not whole.
    """
    deployed = read_deployed(models)
    run = record_of_times(deployed.run, deployed.fingerprint, models / deployed.run)
    run_id = publish(run)  # finds it; in an empty store `sdpipe track` fills it later
    with connected() as (mlflow, _), FileLock(work_folder() / "registry.lock"):
        client = mlflow.MlflowClient()
        version = _find(mlflow, client, deployed) or _add(mlflow, client, deployed, models / MODEL, run_id)
        if _champion(client, deployed.registered_model) != version:
            client.set_registered_model_alias(deployed.registered_model, ALIAS, version)
    return version


def register_quietly(models: Path) -> None:
    """The same, for a stage: a store that is down costs seconds and a warning."""
    quietly(lambda: register(models))


def _find(mlflow: Any, client: "MlflowClient", deployed: Deployed) -> str | None:
    """The newest version of the file and of the code with which it was deployed.

    Where the code has changed since and no such version is left, the newest of the file: what was not
    deployed shall not be served.
    """
    versions = client.search_model_versions(f"name = '{deployed.registered_model}'")
    newest_first = sorted(versions, key=lambda each: -int(each.version))
    of_the_file = [each for each in newest_first if each.tags.get("sha256") == deployed.sha256]
    same = [each for each in of_the_file if each.tags.get("code_sha256") == deployed.code_sha256]
    if deployed.code_sha256 != carried_digest():
        tell("the code that is served has changed since the deployment; `dvc repro deploy` registers it")
        same += of_the_file
    return next((str(each.version) for each in same if has_files(mlflow, str(each.source))), None)


def _champion(client: "MlflowClient", name: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(ALIAS)
    return None if version is None else str(version)


def _add(mlflow: Any, client: "MlflowClient", deployed: Deployed, model_path: Path, run_id: str) -> str:
    if not client.search_registered_models(f"name = '{deployed.registered_model}'"):
        client.create_registered_model(deployed.registered_model)
    tags = {
        "code_sha256": carried_digest(),
        "fingerprint": deployed.fingerprint,
        "run": deployed.run,
        "sha256": deployed.sha256,
        "test_error": repr(deployed.test_error),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in SHIPPED:
            copied = Path(folder) / "sdpipe" / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / name, copied)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*input example", category=UserWarning
            )  # it would run it
            logged = log_model(
                mlflow,
                run_id,
                "served",
                mlflow.pyfunc,
                python_model=str(SERVED),
                artifacts={"onnx": str(model_path)},
                code_paths=[str(Path(folder) / "sdpipe")],
                signature=_signature(),
                pip_requirements=REQUIREMENTS,
            )
    version = client.create_model_version(
        deployed.registered_model, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
    )
    return str(version.version)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Map, Object, Property

    picture: Any = AnyType()  # type: ignore[no-untyped-call]  # base64 text, or pixels
    label = Property("label", DataType.string)
    probability = Property("probability", DataType.double)
    return ModelSignature(
        inputs=Schema([ColSpec(picture, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "label"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Array(Object([label, probability])), "top"),
                ColSpec(Map(DataType.double), "probabilities"),
            ]
        ),
    )
