"""The ratios that are aimed at, held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

HAND_COMPILED = ("hand compiled", "hand compiled+adam", "hand compiled grad")


@dataclass(frozen=True)
class Target:
    """A ratio of times, and what it should be at least or at most.

    Args:
        over, under: contenders; of several, the fastest.
    """

    device: str
    size: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    at_least: float = 0.0
    at_most: float = math.inf

    def ratio(self, times: Mapping[str, float]) -> float | None:
        """The ratio of the fastest, or None where one side was not measured."""
        over = [times[name] for name in self.over if name in times]
        under = [times[name] for name in self.under if name in times]
        return min(over) / min(under) if over and under else None

    def row(self, times: Mapping[str, float]) -> tuple[str, ...]:
        """Size, ratio, target, measured, whether it is met."""
        names = f"{self.over[0]} / {self.under[0]}"
        bound = f">= {self.at_least:g}" if self.at_least else f"<= {self.at_most:g}"
        if (ratio := self.ratio(times)) is None:
            return (self.size, names, bound, "not measured", "")
        met = self.at_least <= ratio <= self.at_most
        return (self.size, names, bound, f"{ratio:.2f}", "yes" if met else "no")


def _at_least(device: str, size: str, ratio: float) -> Target:
    return Target(device, size, ("pyro",), ("ours",), at_least=ratio)


def _at_most(device: str, size: str, other: tuple[str, ...], ratio: float) -> Target:
    return Target(device, size, ("ours",), other, at_most=ratio)


TARGETS = (
    _at_least("cpu", "tiny", 4),
    _at_least("cpu", "paper", 1.7),
    *(_at_most("cpu", size, HAND_COMPILED, 1.0) for size in ("tiny", "paper")),
    *(_at_most("cpu", size, ("numpyro",), 1.0) for size in ("tiny", "paper")),
    *(_at_least("cpu", size, 4) for size in ("m2", "m2-tiny")),
    _at_least("cpu", "belief-net", 4),
    *(_at_least("cuda", size, 10) for size in ("tiny", "paper")),
    *(_at_most("cuda", size, ("hand graph",), 1.1) for size in ("tiny", "paper")),
)
