"""What is measured side by side does not disturb each other."""

import time
import tracemalloc
from pathlib import Path

import numpy as np

from sdpipe.deploy.timing.latency import measure_latency
from sdpipe.runtime.artifact import open_artifact


def test_a_session_that_waits_leaves_the_processor_to_others(model_path: Path) -> None:
    """Runs with 10 ms between them: what onnxruntime computes in these is less than a tenth of a core.

    Its threads would else go on for longer than that, and take a whole core each.
    """
    artifact = open_artifact(model_path, "cpu", threads=2)
    images_NHWC = np.zeros((4, *artifact.metadata.image_size, artifact.metadata.channels), dtype=np.uint8)
    waited_s = computed_s = 0.0
    for _ in range(30):
        artifact.run(images_NHWC)
        started, used = time.perf_counter(), time.process_time()
        time.sleep(0.01)
        computed_s += time.process_time() - used
        waited_s += time.perf_counter() - started
    assert computed_s < 0.1 * waited_s


def test_the_contenders_take_turns() -> None:
    """Each begins once before another begins again, so none always comes behind the same other one."""
    log: list[str] = []
    calls = {name: lambda _, name=name: log.append(name) for name in "abc"}
    latency = measure_latency(calls, np.zeros((5, 2, 2, 1), dtype=np.uint8), [1, 8], repeats=4)
    assert "".join(log) == 2 * "abcbcacabcbaacbbac"
    assert {batch: {name: one["n"] for name, one in found.items()} for batch, found in latency.items()} == {
        "batch_1": dict.fromkeys("abc", 4), "batch_8": dict.fromkeys("abc", 4),
    }  # fmt: skip


def test_of_a_test_part_on_disk_only_the_batch_is_read(tmp_path: Path) -> None:
    """The first images, from the front again where there are too few; 8 MB beside them stay on disk."""
    for num_images, batch_size in ((8000, 3), (3, 8)):
        path, shape = tmp_path / f"{num_images}.npy", (num_images, 32, 32, 1)
        stored_NHWC = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        stored_NHWC[:3] = np.arange(3).reshape(3, 1, 1, 1)
        seen: list[np.ndarray] = []
        tracemalloc.start()
        measure_latency({"a": seen.append}, stored_NHWC, [batch_size], repeats=1)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 1e6
        expected_NHWC = np.resize(stored_NHWC[:3], (batch_size, 32, 32, 1))
        np.testing.assert_array_equal(seen[0], expected_NHWC)
