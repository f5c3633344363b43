"""The model that `mlflow models serve` answers with: MLflow runs this file out of the registered model.

It stands beside the ONNX file there, with a copy of sdpipe.runtime, and needs nothing else of sdpipe.
A request's field is `image`: for each picture its encoded bytes in base64, or its pixels.
"""

import logging
import sys
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from mlflow.pyfunc.model import PythonModel

import sdpipe
from sdpipe.errors import ImageError, ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.memory import give_memory_back
from sdpipe.runtime.serving import answer

FIELD = "image"


class ServedModel(PythonModel):
    """MLflow's shell around `answer`: HTTP status 400 where a caller did wrong, 500 where the model fails."""

    def load_context(self, context: Any) -> None:
        """Open the ONNX file that was registered."""
        if "mlflow.pyfunc.scoring_server.app" in sys.modules:  # it is MLflow's server that loads it
            _refuse_in_words(sys.modules["mlflow.pyfunc.scoring_server"])
            give_memory_back()
        model_path = Path(context.artifacts["onnx"])
        _warn_of_other_code(model_path.parent.parent / "code" / "sdpipe")  # as MLflow lays a model out
        self.artifact = open_artifact(model_path)

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> list[dict[str, Any]]:
        """One answer a picture; MlflowException if a picture is not one, or the network fails."""
        pictures = list(model_input[FIELD])
        # MLflow turns {"inputs": ["...", "..."]} into one cell that holds all texts.
        if (
            len(pictures) == 1
            and isinstance(pictures[0], list)
            and all(isinstance(each, str) for each in pictures[0])
        ):
            pictures = pictures[0]
        try:
            return answer(self.artifact, pictures)
        except ImageError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        except ModelError as error:
            reason = str(error).removeprefix(f"{self.artifact.path}: ")  # the path is no caller's business
            raise MlflowException(f"the model fails: {reason}", INTERNAL_ERROR) from error
        except MemoryError as error:
            raise MlflowException("the model fails: out of memory", INTERNAL_ERROR) from error


def _warn_of_other_code(carried: Path) -> None:
    """Where sdpipe was imported before, that answers, and not the copy that the model carries."""
    imported = Path(sdpipe.__file__).parent

    def is_imported(path: Path) -> bool:
        there = imported / path.relative_to(carried)
        return there.is_file() and there.read_bytes() == path.read_bytes()

    if not all(map(is_imported, carried.rglob("*.py"))):
        logging.getLogger("sdpipe").warning(
            "sdpipe was imported before, from %s: that code answers in place of the model's own, which is "
            "other; load the model in a process of its own",
            imported,
        )


def _refuse_in_words(server: ModuleType) -> None:
    """Answer status 4xx, with the reason, to requests at which MLflow's server trips (MLflow 3.17).

    With a 500, if they have no Content-Type, or JSON that is too deep or holds too long a number; with fewer
    answers than pictures, if one of the `instances` lacks its picture; with numpy's words, if they are text
    and pixels, or pixels of two shapes.
    """
    invocations, parse = server.invocations, server.infer_and_parse_data

    @wraps(invocations)
    def refusing(data: bytes, content_type: str | None, *rest: Any) -> Any:
        try:
            return invocations(data, content_type or "", *rest)
        except (RecursionError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(f"the request cannot be parsed: {error}") from error

    @wraps(parse)
    def complete(data: dict[str, Any], *rest: Any, **options: Any) -> Any:
        records = data["instances"] if [*data] == ["instances"] else None
        if isinstance(records, list) and any(isinstance(each, dict) for each in records):
            if not all(isinstance(each, dict) and FIELD in each for each in records):
                raise MlflowException.invalid_parameter_value(
                    f"expected a field {FIELD!r} in each of the instances"
                )
            data = {"inputs": {FIELD: [each[FIELD] for each in records]}}  # which MLflow leaves as they are
        return parse(data, *rest, **options)

    server.invocations = refusing  # type: ignore[attr-defined]
    server.infer_and_parse_data = complete  # type: ignore[attr-defined]


set_model(ServedModel())
