"""A request's pictures get the deployed file's answers, or one plain reason; MLflow's server stays alive."""

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import requests
from conftest import random_images
from deployable import deploy, make_run
from encoded_pictures import encoded
from load import bad_bodies, good_body, png, post, send_load, text_of
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image
from servers import running
from test_artifact import plant_nan
from test_hostile_models import edited

from sdpipe.deploy.release.registry import _signature, register
from sdpipe.deploy.release.served import ServedModel, _refuse_in_words
from sdpipe.errors import ImageError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.serving import MAX_PICTURES, answer


def test_pixels_bytes_and_base64_are_the_same_picture(rgb_model_path: Path) -> None:
    """One network, one answer; wrapped base64, too. Probabilities are the ONNX file's."""
    artifact = open_artifact(rgb_model_path, "cpu")
    (image,) = random_images(1, channels=3)
    text = text_of(png(image))
    wrapped = "\n".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n"
    answers = answer(artifact, [image, image.tolist(), png(image), text, wrapped])
    assert answers == [answers[0]] * 5
    probabilities_K = artifact.run(image[None])[1][0]
    assert list(answers[0]["probabilities"].values()) == pytest.approx(probabilities_K.tolist(), abs=1e-6)
    assert list(answers[0]["probabilities"]) == ["cat", "dog", "eel"]
    by_hand = sorted(answers[0]["probabilities"].items(), key=lambda item: -item[1])
    assert [(each["label"], each["probability"]) for each in answers[0]["top"]] == by_hand
    assert (answers[0]["label"], answers[0]["probability"]) == by_hand[0]


def test_more_pictures_than_a_batch_keep_their_order(model_path: Path) -> None:
    artifact = open_artifact(model_path, "cpu")
    images = random_images(150)
    expected = artifact.run(images)[1]
    found = [list(each["probabilities"].values()) for each in answer(artifact, list(images))]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "code"),
    [
        ("", "empty"),
        ("a", "not_base64"),
        ("é", "not_base64"),
        (text_of(b"hello"), "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "not_an_image"),
        (None, "not_pixels"),
        (3, "not_pixels"),
        ({"a": 1}, "not_pixels"),
        ([], "wrong_shape"),
        ([[[1]]], "wrong_shape"),
        ([[1, 2], [1]], "wrong_shape"),
        (np.full((9, 9, 1), 256), "out_of_range"),
        (np.full((9, 9, 1), -1), "out_of_range"),
        (np.full((9, 9, 1), 2**63, np.uint64), "out_of_range"),
        (np.full((9, 9, 1), 10**30, object).tolist(), "not_pixels"),
        (np.full((9, 9, 1), np.nan), "not_pixels"),
        (np.full((9, 9, 1), 1.0), "not_pixels"),
        (np.full((9, 9, 1), True), "not_pixels"),
        (np.full((9, 9, 1), "1"), "not_pixels"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_number(model_path: Path, picture: object, code: str) -> None:
    artifact = open_artifact(model_path, "cpu")
    with pytest.raises(ImageError, match=r"^picture 2: .") as caught:
        answer(artifact, [random_images(1)[0], picture])
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_the_number_of_pictures_is_bounded(model_path: Path) -> None:
    artifact = open_artifact(model_path, "cpu")
    with pytest.raises(ImageError, match="holds no picture"):
        answer(artifact, [])
    with pytest.raises(ImageError, match=r"1,025 pictures in one request, at most 1,024"):
        answer(artifact, ["x"] * (MAX_PICTURES + 1))


def test_a_model_that_fails_is_no_mistake_of_the_caller(tmp_path: Path, rgb_model_path: Path) -> None:
    """Status 500 and no path of the server, where a bad picture is status 400."""
    path = edited(rgb_model_path, tmp_path, plant_nan)
    served = ServedModel()
    served.load_context(SimpleNamespace(artifacts={"onnx": str(path)}))
    pixels = random_images(1, channels=3).tolist()
    for picture, status, reason in (
        (
            pixels[0],
            500,
            "the model fails: its probabilities are no numbers; a weight is damaged, or too large",
        ),
        ("", 400, "picture 1: the file is empty"),
    ):
        with pytest.raises(MlflowException) as caught:
            served.predict(None, pd.DataFrame({"image": [picture]}))
        assert (caught.value.get_http_status_code(), caught.value.message) == (status, reason)
    served.artifact = Mock(metadata=served.artifact.metadata, **{"probabilities.side_effect": MemoryError})
    with pytest.raises(MlflowException, match="the model fails: out of memory") as caught:
        served.predict(None, pd.DataFrame({"image": [pixels[0]]}))
    assert caught.value.get_http_status_code() == 500


def test_instances_are_read_like_inputs() -> None:
    """Text beside pixels, and pixels of two shapes, which MLflow itself refuses in numpy's words."""
    names = ("invocations", "infer_and_parse_data")
    server: Any = SimpleNamespace(**{name: getattr(scoring_server, name) for name in names})
    _refuse_in_words(server)
    schema = _signature().inputs
    first, second = random_images(2)
    text, pixels = text_of(png(first)), second.tolist()
    kinds: list[list[Any]] = [[text, pixels], [pixels, text], [pixels, pixels[1:]], [pixels, None], [text]]
    for pictures in kinds:
        data = {"instances": [{"image": picture} for picture in pictures]}
        assert server.infer_and_parse_data(data, schema) == {"image": pictures}
    for records in ([{"image": text}, {"img": text}], [{"image": text}, text]):
        with pytest.raises(MlflowException, match="expected a field 'image' in each of the instances"):
            server.infer_and_parse_data({"instances": records}, schema)


@pytest.fixture
def server(project: Path, mlflow_store: Path) -> Iterator[str]:
    """`mlflow models serve` on the registered model, as a user starts it, without sdpipe on its path."""
    deploy(make_run(project / "models" / "stochastic", channels=3), project / "models")
    register(project / "models")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    binaries = Path(sys.executable).parent
    env = kept | {"PATH": f"{binaries}:{kept['PATH']}", "MLFLOW_TRACKING_URI": f"sqlite:///{mlflow_store}"}

    def command(port: int) -> list[str | Path]:
        model = ("-m", "models:/sdpipe@champion", "--env-manager", "local")
        return [binaries / "mlflow", "models", "serve", *model, "--host", "127.0.0.1", "--port", str(port)]

    with running(command, "ping", env=env) as address:
        yield f"{address}/invocations"


@pytest.mark.slow
def test_mlflow_serves_good_and_bad_input_under_load(server: str, project: Path) -> None:
    """Each form by itself, each bad one by itself, then 1,000 requests, 16 at a time, a fifth of them bad.

    Every good one right, every bad one a 400 with its reason, the server alive. Large ones leave no memory.
    """
    artifact = open_artifact(project / "models" / "model.onnx", "cpu")
    images = random_images(2, channels=3)
    labels = [artifact.metadata.class_names[k] for k in artifact.run(images)[1].argmax(axis=1)]
    for form in range(7):
        response = post(server, good_body(images, form))
        assert response.status_code == 200, response.text
        assert [each["label"] for each in response.json()["predictions"]] == labels
    for reason, body in bad_bodies(images[0]).items():
        response = post(server, body)
        assert response.status_code == 400, reason
        assert reason in response.json()["message"]
    nameless = requests.post(server, data=b"{}", timeout=10)  # requests gives bytes no Content-Type
    assert nameless.status_code == 415, nameless.text
    load = send_load(server, artifact)
    print(load)
    assert load.wrong == []
    assert load.statuses == {200: 800, 400: 200}
    assert requests.get(server.replace("invocations", "ping"), timeout=10).ok
    before_mib = resident_mib(server)
    large = encoded(Image.new("RGB", (7000, 7000)), "JPEG")  # 49 million pixels
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server, {"inputs": [text_of(large)]}), range(16)))
    assert {response.status_code for response in answers} == {200}
    assert resident_mib(server) < before_mib + 200


def resident_mib(server: str) -> float:
    """Memory of the largest process that was started with this server's port."""
    port = server.rpartition(":")[2].removesuffix("/invocations")
    found = [0.0]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if port in (folder / "cmdline").read_text().split("\0"):
                (line,) = re.findall(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
                found.append(int(line) / 1024)
        except OSError:  # it has ended
            continue
    assert max(found) > 50, "no such process"
    return max(found)
