"""Models that MLflow keeps for a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Run

_ONNX = "model"  # its name in MLflow


def log_model(mlflow: Any, run_id: str, name: str, flavor: Any, **model: Any) -> Any:
    """Log a model of a flavour, such as mlflow.onnx, as its own log_model() does. Returns MLflow's ModelInfo.

    That one needs an active run, which ends anew: a training would seem to last until its evaluation.
    """
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    made = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run_id, params=run.data.params
    )
    return mlflow.models.Model.log(None, flavor, name=name, run_id=run_id, model_id=made.model_id, **model)


def has_files(mlflow: Any, address: str) -> bool:
    """Of a model, such as models:/m-0123: it may have been deleted, or its files with mlartifacts/."""
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=address))
    except mlflow.MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False


def has_onnx(mlflow: Any, run: "Run") -> bool:
    """The model.onnx that was logged last for the run is there, and its sending was not cut short."""
    from mlflow.entities import LoggedModelStatus

    newest = mlflow.MlflowClient().search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}' AND name = '{_ONNX}'",
        max_results=1,
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
    )
    return any(
        model.status == LoggedModelStatus.READY and has_files(mlflow, model.model_uri) for model in newest
    )


def log_onnx(mlflow: Any, run_id: str, path: Path) -> None:
    """Log a run's model.onnx."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(path)
    image_shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    num_classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *image_shape), "images")]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, num_classes), name)
                for name in ("logits", "probabilities")
            ]
        ),
    )
    log_model(
        mlflow,
        run_id,
        _ONNX,
        mlflow.onnx,
        onnx_model=model,
        signature=signature,
        pip_requirements=["onnxruntime", "numpy"],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,  # True would change the model and split the file
    )
