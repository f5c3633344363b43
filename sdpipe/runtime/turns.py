"""Contenders take turns, so that a noisy moment hits all of them."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Turn = Callable[[], float]  # does a contender's work of one round, and returns the seconds that it took


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another contender, and every second cycle runs backwards.

    So none always comes first, and none always comes behind the same other one.
    """
    cycle, first = divmod(number, len(names))
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if cycle % 2 else turned


def play_rounds(turns: Mapping[str, Turn], numbers: Iterable[int]) -> Iterator[dict[str, float]]:
    """Seconds of each contender, round after round."""
    for number in numbers:
        taken_s = {name: turns[name]() for name in order(list(turns), number)}
        yield {name: taken_s[name] for name in turns}


def timed(work: Callable[[], object]) -> Turn:
    """The turn that does this work once."""

    def take() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return take
