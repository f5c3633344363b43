"""The files of runs side by side: the front, the choice and the names, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from sdpipe.deploy.pruning.family import ParetoRow, mark_front, pick_by_error, pick_by_latency, run_names
from sdpipe.errors import SdpipeError


def variant(name: str, validation: float, test: float, ms: float) -> ParetoRow:
    return ParetoRow(
        run="r", variant=name, path=Path(name), blocks=1, num_blocks=2, validation_error=validation,
        test_error=test, latency_ms={1: ms, 64: 64 * ms}, speedup=1.0, num_bytes=1, on_front=False,
        parity=None,
    )  # fmt: skip


# By validation error a is the best, by test error b; d is slower and worse than c.
FOUR = [variant("a", 0.10, 0.13, 4), variant("b", 0.11, 0.11, 3), variant("c", 0.2, 0.2, 1),
        variant("d", 0.25, 0.25, 2)]  # fmt: skip


def test_the_pareto_front_by_hand() -> None:
    """b beats a in both, c beats d in both."""
    front = {one.variant: one.on_front for one in mark_front(FOUR, 1)}
    assert front == {"a": False, "b": True, "c": True, "d": False}


def test_picking_by_hand() -> None:
    """The validation part decides; a limit may be met exactly; without a match the nearest is named."""
    assert pick_by_latency(FOUR, 5, 1).variant == "a"
    assert pick_by_latency(FOUR, 3, 1).variant == "b"
    assert pick_by_latency(FOUR, 64, 64).variant == "c"
    assert pick_by_error(FOUR, 0.11, 1).variant == "b"
    assert pick_by_error(FOUR, 0.5, 1).variant == "c"
    with pytest.raises(SdpipeError, match=r"at most 0\.5 ms at batch 1; the fastest, c, takes 1 ms"):
        pick_by_latency(FOUR, 0.5, 1)
    with pytest.raises(SdpipeError, match=r"at most 0\.05; the best, a, has 0\.1000"):
        pick_by_error(FOUR, 0.05, 1)


def test_the_batch_size_that_is_asked_for_decides() -> None:
    """At 64 the first of these two is slower, and at 1 it is faster."""
    first, second = variant("a", 0.1, 0.1, 1), variant("b", 0.1, 0.1, 2)
    pair = [replace(first, latency_ms={1: 1.0, 64: 90.0}), replace(second, latency_ms={1: 2.0, 64: 70.0})]
    for batch_size, name in ((1, "a"), (64, "b")):
        assert pick_by_error(pair, 0.2, batch_size).variant == name
        assert pick_by_latency(pair, 100, batch_size).variant == name
        assert [one.variant for one in mark_front(pair, batch_size) if one.on_front] == [name]


def test_a_file_that_failed_its_parity_is_not_offered() -> None:
    """b would be picked and c be the fastest; without them a and d are, and lie on the front."""
    marked = [replace(one, parity=one.variant not in "bc") for one in FOUR]
    assert [one.variant for one in mark_front(marked, 1) if one.on_front] == ["a", "d"]
    assert pick_by_latency(marked, 3, 1).variant == "d"
    assert pick_by_error(marked, 0.11, 1).variant == "a"
    with pytest.raises(SdpipeError, match=r"the fastest, d, takes 2 ms"):
        pick_by_latency(marked, 0.5, 1)
    with pytest.raises(SdpipeError, match="no file to pick: the parity of each has failed"):
        pick_by_error([replace(one, parity=False) for one in FOUR], 1, 1)


def test_the_names_of_runs_by_hand() -> None:
    assert run_names([Path("a/run"), Path("b/run"), Path("b/other")]) == ["a/run", "b/run", "other"]
    assert run_names([Path("x/a/run"), Path("y/a/run"), Path("z/run")]) == ["x/a/run", "y/a/run", "z/run"]
    assert run_names([Path("run"), Path("x/run")]) == [f"{Path.cwd().name}/run", "x/run"]
