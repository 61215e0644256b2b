"""Looks at the NLL between the epochs of a fit, off the clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from benchmarks import record
from ppl_vae.data import Dataset
from ppl_vae.evaluation import evaluate
from ppl_vae.recipes import Experiment

THIN = 10
"""Every so many rows are looked at."""


def thinned(data: Dataset) -> Dataset:
    """Every tenth row of what is looked at."""
    return replace(
        data,
        splits={
            name: columns if name == "train" else {k: v[::THIN] for k, v in columns.items()}
            for name, columns in data.splits.items()
        },
    )


class Stopwatch:
    """Seconds since it was made, but for those while it was stopped."""

    def __init__(self) -> None:
        self._started, self._away = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._away

    @contextmanager
    def stopped(self) -> Iterator[float]:
        """Gives what it shows meanwhile."""
        shown, stopped_at = self.seconds, time.perf_counter()
        try:
            yield shown
        finally:
            self._away += time.perf_counter() - stopped_at


class Look(NamedTuple):
    """What was seen at the end of an epoch: seconds of training, and nats a row."""

    epoch: int
    seconds: float
    nll: float


class Watch:
    """Looks at the NLL at the ends of some epochs, while the clock stands still.

    Args:
        made: the pair in training.
        rows: the data, :func:`thinned`.
        due: whether to look at the end of an epoch, of which the first is 1.
        draws: importance draws a row.
        split: of the rows that are looked at.
    """

    def __init__(
        self,
        made: Experiment,
        rows: Dataset,
        due: Callable[[int], bool],
        draws: int,
        split: str = "validation",
    ) -> None:
        self.made, self.rows, self.due, self.draws = made, rows, due, draws
        self.split = split
        self.curve: list[Look] = []
        self.epoch = 0
        self.clock = Stopwatch()

    def end_epoch(self) -> None:
        with self.clock.stopped() as seconds:
            self.epoch += 1
            if self.due(self.epoch):
                look = Look(self.epoch, seconds, self.figures(self.split)["nll"])
                self.curve.append(look)
                print(f"  {look}", file=sys.stderr, flush=True)

    def figures(self, split: str) -> dict[str, float]:
        """NLL and ELBO of the thinned split."""
        found = evaluate(
            self.made.model,
            self.made.guide,
            self.rows,
            split=split,
            samples=self.draws,
            seed=record.SEED,
        )
        return {"nll": found.nll, "nll_se": found.nll_se, "elbo": found.elbo, "rows": found.rows}


def first_within(curve: Sequence[Look], target: float) -> Look | None:
    """The first look at an NLL of at most the target; None: there is none."""
    return next((look for look in curve if look.nll <= target), None)
