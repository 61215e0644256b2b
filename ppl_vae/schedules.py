"""Schedules of the learning rate, a step an epoch, beside the two that ``fit`` knows by name.

They are plain data, so that ``run.json`` says which one it was, and functions of the optimizer, as
``fit(schedule=...)`` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class HoldThenDecay:
    """The learning rate is held, then falls on a line, which would reach 0 an epoch after the last.

    A held rate finds better optima than one that falls from the start, and its noise is gone after
    few epochs of decay: what Hägele et al. 2024 (arXiv:2405.18392) find of language models.

    Args:
        hold: epochs at the full rate.
        decay: epochs of the fall.

    Raises:
        ValueError: a negative number of epochs.
    """

    hold: int
    decay: int

    def __post_init__(self) -> None:
        if min(self.hold, self.decay) < 0:
            raise ValueError(f"{self}: expected epochs, at least 0 of each")

    @property
    def epochs(self) -> int:
        """Of the whole schedule."""
        return self.hold + self.decay

    def factor(self, epoch: int) -> float:
        """Of the learning rate in an epoch, the first of which is 0.

        >>> [HoldThenDecay(2, 3).factor(epoch) for epoch in range(6)]
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        left = self.epochs - epoch
        return min(1.0, max(0.0, left / (self.decay + 1)))

    def __call__(self, optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda epoch: self.factor(epoch))
