"""What a benchmark measures with: percentiles, cores, and contenders who take turns."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_benchmark_command import CORES

from sdpipe.runtime.benchmark import (
    WARMUP,
    Contender,
    summary,
    time_contenders,
)
from sdpipe.runtime.cores import num_cores, num_threads
from sdpipe.runtime.turns import play_rounds


def test_percentiles_and_throughput_by_hand() -> None:
    """0 to 100 ms: the p-th percentile is p ms; 101 calls of 2 images took 5.05 s together."""
    found = summary(np.arange(101) / 1000, 2)
    assert found == pytest.approx(
        {"n": 101, "p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "images_per_s": 202 / 5.05}
    )


def control_groups(folder: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self/cgroup of one line, and a mount with these files."""
    (folder / "cgroup").write_text(line)
    for name, text in files.items():
        (folder / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mount" / name).write_text(text)
    return folder / "cgroup", folder / "mount"


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/\n", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "275000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "900000 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/only/on/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        ("5:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ("5:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 3),
        ("5:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "1000\n", "cpu/a/cpu.cfs_period_us": "1000\n"}, 1),
        ("5:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1000\n", "cpu/cpu.cfs_period_us": "1000\n"}, 4),
    ],
)
def test_cores_by_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], expected: int
) -> None:
    """The smaller of 4 cores and the quota over the period, of any group above the process, rounded down."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2, 3})
    assert num_cores(*control_groups(tmp_path, line, files)) == expected


def test_threads_of_one_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors 0 and 4 share a core, and so do 1 and 5; where the system tells nothing, each is a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 4, 5})
    groups = control_groups(tmp_path, "0::/\n", {})
    assert num_threads(*groups, tmp_path / "nothing") == 4
    for number in (0, 1, 4, 5):
        (tmp_path / f"cpu{number}" / "topology").mkdir(parents=True)
        siblings = f"{number % 4},{number % 4 + 4}\n"
        (tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert num_threads(*groups, tmp_path) == 2
    quota = control_groups(tmp_path, "0::/\n", {"cpu.max": "150000 100000\n"})
    assert num_threads(*quota, tmp_path) == 1


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert num_cores(tmp_path / "none", tmp_path) == CORES


def contender(name: str, log: list[str], fail_at: int = -1) -> Contender:
    def run(images_NHWC: np.ndarray) -> None:
        assert (images_NHWC.shape, images_NHWC.dtype) == ((2, 5, 5, 1), np.uint8)
        log.append(name)
        if len(log) == fail_at:
            raise KeyboardInterrupt

    return Contender(file=name, engine="onnxruntime", image_shape=(5, 5, 1), run=run)


def test_contenders_take_turns() -> None:
    """Round after round, each beginning with another one; the warm-up does not count."""
    log: list[str] = []
    timings: list[dict[str, Any]] = []
    contenders = [contender(name, log) for name in "abc"]
    time_contenders(contenders, batch_size=2, threads=1, numbers=range(WARMUP + 3), timings=timings)
    assert "".join(log) == "abcbcacabcbaacbbac"
    assert [(row["file"], row["n"], row["batch_size"]) for row in timings] == [
        ("a", 3, 2), ("b", 3, 2), ("c", 3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("fail_at", "counted"), [(2 * WARMUP + 4, 1), (2 * WARMUP - 1, None)])
def test_an_interruption_leaves_the_whole_rounds(fail_at: int, counted: int | None) -> None:
    """Ctrl-C in the second counted round leaves one of each; in the warm-up it leaves nothing."""
    log: list[str] = []
    timings: list[dict[str, Any]] = []
    contenders = [contender(name, log, fail_at) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        time_contenders(contenders, batch_size=2, threads=1, numbers=range(20), timings=timings)
    assert [row["n"] for row in timings] == ([] if counted is None else [counted] * 2)


def test_rounds_keep_the_contenders_in_place() -> None:
    """Whoever was first in a round, its seconds stand under its own name."""
    turns = {"a": lambda: 1.0, "b": lambda: 2.0}
    assert list(play_rounds(turns, range(3))) == [{"a": 1.0, "b": 2.0}] * 3
