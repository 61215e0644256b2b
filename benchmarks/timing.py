"""Interleaved timing: every contender in every round, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds a call: one figure a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def to_json(self) -> dict[str, float]:
        """Milliseconds."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.rounds),
            "max_ms": 1e3 * max(self.rounds),
        }


def interleaved(
    runs: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 3,
) -> tuple[dict[str, Timing], int]:
    """Time contenders in turn; also returns the number of calls in a block.

    Args:
        runs: name = what makes so many calls, one after another, and waits for the last.
        rounds: blocks of each contender.
        seconds: how long the slowest one's block should take; all make as many calls.
        warm_up: calls before each block that are not timed, since threads and caches were
            another contender's.
    """

    def time_block(name: str, calls: int) -> float:
        runs[name](warm_up)
        return once(lambda: runs[name](calls)) / calls

    slowest = max(time_block(name, warm_up) for name in runs)
    calls = max(1, min(1000, round(seconds / slowest)))
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)  # nobody always follows the same one
        for name in names[start:] + names[:start]:
            found[name].append(time_block(name, calls))
    return {name: Timing(tuple(times)) for name, times in found.items()}, calls


def once(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
