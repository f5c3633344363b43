"""A load on a server of models: many requests at a time, bad ones among the good, each answer checked.

python tests/load.py http://127.0.0.1:5001/invocations models/model.onnx
"""

import base64
import io
import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from sdpipe.runtime.artifact import Artifact, open_artifact


def png(pixels_HWC: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC.squeeze()).save(stream, "PNG")
    return stream.getvalue()


def text_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def good_body(images_NHWC: np.ndarray, form: int) -> dict[str, Any]:
    """The same pictures in one of the forms that are understood."""
    pixels, texts = images_NHWC.tolist(), [text_of(png(image)) for image in images_NHWC]
    forms: list[dict[str, Any]] = [
        {"inputs": pixels},
        {"instances": [{"image": each} for each in [*pixels[:1], *texts[1:]]]},
        {"inputs": texts},
        {"inputs": {"image": texts}},
        {"instances": [{"image": each} for each in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[each] for each in texts]}},
        {"dataframe_records": [{"image": each} for each in [*texts[:1], *pixels[1:]]]},
    ]
    return forms[form % len(forms)]


def bad_bodies(image_HWC: np.ndarray) -> dict[str, Any]:
    """What must be refused, and a word of the reason; bytes are sent as they are."""
    pixels, raw = image_HWC.astype(int), png(image_HWC)
    bomb = png(np.zeros((9000, 9000), np.uint8))
    return {
        "base64": {"inputs": ["?" * 40]},
        "not a picture": {"inputs": [text_of(b"hello")]},
        "damaged": {"inputs": [text_of(raw[:60])]},
        "the file is empty": {"inputs": [""]},
        "at most 64,000,000 are decoded": {"inputs": [text_of(bomb)]},
        "no picture": {"inputs": []},
        "got shape": {"inputs": [pixels[:-1].tolist()]},
        "several lengths": {"inputs": [[[[1, 2, 3]], [[1, 2]]]]},
        "got 256 to 256": {"inputs": [(0 * pixels + 256).tolist()]},
        "got -1 to -1": {"inputs": [(0 * pixels - 1).tolist()]},
        "got float64": {"inputs": [(pixels / 255).tolist()]},
        "NaN or infinity": {"inputs": [(pixels * np.nan).tolist()]},
        "got object": {"inputs": [np.full(pixels.shape, 10**30, object).tolist()]},
        "got NoneType": {"inputs": [None]},
        "at most 1,024": {"inputs": [text_of(raw)] * 1025},
        "missing inputs": {"inputs": {"picture": [text_of(raw)]}},
        "in each of the instances": {"instances": [{"image": text_of(raw)}, {"img": text_of(raw)}]},
        "valid JSON": b"{",
        "recursion depth": b"[" * 100_000,
        "4300 digits": b'{"inputs": [' + b"9" * 5000 + b"]}",
        "exactly one of the input fields": {"inputs": [], "instances": []},
    }


def post(url: str, body: Any) -> requests.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()  # requests would refuse NaN
    return requests.post(url, data=raw, headers={"Content-Type": "application/json"}, timeout=60)


@dataclass(kw_only=True)
class Load:
    """What a load saw."""

    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    times_s: list[float] = field(default_factory=list)  # of the good requests
    seconds: float = 0.0

    def __str__(self) -> str:
        p50, p90, p99 = np.percentile(self.times_s, [50, 90, 99]) * 1000
        return (
            f"{sum(self.statuses.values())} requests in {self.seconds:.1f} s, {dict(self.statuses)}; "
            f"good ones: p50 {p50:.0f} ms, p90 {p90:.0f} ms, p99 {p99:.0f} ms, n = {len(self.times_s)}; "
            f"{len(self.wrong)} wrong answers"
        )


def send_load(url: str, artifact: Artifact, *, num: int = 1000, at_a_time: int = 16) -> Load:
    """Every fifth request is bad; the good ones hold 1 to 3 pictures, their answers those of the file."""
    metadata, rng = artifact.metadata, np.random.default_rng(0)
    shape = (3, *metadata.image_size, metadata.channels)
    batches = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(20)]
    expected = [artifact.run(batch)[1] for batch in batches]
    bad = list(bad_bodies(batches[0][0]).items())
    load = Load()

    def one(number: int) -> None:
        started = time.perf_counter()
        if number % 5 == 0:
            reason, body = bad[number // 5 % len(bad)]
            response = post(url, body)
            if not (response.status_code == 400 and reason in response.json()["message"]):
                load.wrong.append(f"{reason}: {response.status_code} {response.text[-300:]}")
        else:
            which, count = number % len(batches), number % 3 + 1
            response = post(url, good_body(batches[which][:count], number))
            load.times_s.append(time.perf_counter() - started)
            if not _is_right(response, expected[which][:count], metadata.class_names):
                load.wrong.append(f"request {number}: {response.status_code} {response.text[-300:]}")
        load.statuses[response.status_code] += 1

    numbers = list(range(num))
    random.Random(0).shuffle(numbers)
    started = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as threads:
        list(threads.map(one, numbers))
    load.seconds = time.perf_counter() - started
    return load


def _is_right(response: requests.Response, expected_NK: np.ndarray, names: list[str]) -> bool:
    if response.status_code != 200:
        return False
    answers = response.json()["predictions"]
    found_NK = [[answer["probabilities"][name] for name in names] for answer in answers]
    labels = [answer["label"] for answer in answers]
    return (
        labels == [names[k] for k in expected_NK.argmax(axis=1)]
        and all(answer["top"][0]["label"] == answer["label"] for answer in answers)
        and np.allclose(found_NK, expected_NK, rtol=1e-4, atol=1e-6)
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    done = send_load(sys.argv[1], open_artifact(Path(sys.argv[2]), "cpu"))
    print(done, *done.wrong[:5], sep="\n")
    sys.exit(bool(done.wrong))
