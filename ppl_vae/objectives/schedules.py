"""Schedules of the KL weight over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """The weight of the KL over training."""

    @property
    def ends(self) -> float:
        """The epoch from which the weight stays 1: early stopping waits for it."""
        ...

    def __call__(self, epoch: float) -> float:
        """The weight at a point of training, in epochs from the start (fractions count)."""
        ...


@dataclass(frozen=True)
class LinearWarmup:
    """KL weight from 0 to 1 in a straight line over ``epochs`` (Bowman et al. 2016,
    arXiv:1511.06349, section 3.1; Sønderby et al. 2016, arXiv:1602.02282, section 2.3).

    >>> [LinearWarmup(10)(epoch) for epoch in (0, 5, 10, 20)]
    [0.0, 0.5, 1.0, 1.0]
    """

    epochs: float

    def __post_init__(self) -> None:
        if not self.epochs >= 0:
            raise ValueError(f"{self}: expected epochs of at least 0")

    @property
    def ends(self) -> float:
        return self.epochs

    def __call__(self, epoch: float) -> float:
        return min(1.0, epoch / self.epochs) if self.epochs > 0 else 1.0


@dataclass(frozen=True)
class CyclicalWarmup:
    """KL weight that rises anew ``cycles`` times over ``epochs``, each time in a straight line
    over the first ``rising`` of the cycle, then 1 (Fu et al. 2019, arXiv:1903.10145, eq. 6-7).

    >>> [CyclicalWarmup(40, cycles=4)(epoch) for epoch in (0, 2.5, 5, 9, 10, 41)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]
    """

    epochs: float
    cycles: int = 4
    rising: float = 0.5

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.cycles >= 1 and 0 < self.rising <= 1):
            raise ValueError(
                f"{self}: expected epochs above 0, at least 1 cycle, and a rising part in (0, 1]"
            )

    @property
    def ends(self) -> float:
        return self.epochs

    def __call__(self, epoch: float) -> float:
        if epoch >= self.epochs:
            return 1.0
        period = self.epochs / self.cycles
        return min(1.0, (epoch % period) / period / self.rising)
