"""Refining q for one row at a time, the model fixed: what an encoder loses, and what a family does.

A guide is amortized: its nets give q of each row. A :class:`RowWise` has variables of each row's
own besides (:mod:`ppl_vae.row_wise`), and :func:`climb` moves these up the rows' ELBO.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ppl_vae import graphs
from ppl_vae.importance import (
    CACHED,
    COMPILING,
    SAVED,
    TIMED,
    Compile,
    OutputBytes,
    evenly,
    overlapping,
    parts,
)

Columns = Mapping[str, Tensor]


class Scores(NamedTuple):
    """Of draws from q, float64 ``(draws, rows)``: the ELBO, whose mean is the bound, and the log
    importance weight. Alike, unless enumerated sites are summed out."""

    elbo: Tensor
    log_weight: Tensor


class RowWise(Protocol):
    """A q(z | x) with variables of each row's own.

    Attributes:
        free: the variables, ``(rows, ...)`` each, as they are now.
        fixed: further numbers of the rows that stay, ``(rows, ...)`` each.
    """

    free: list[Tensor]
    fixed: list[Tensor]

    def scores(self, columns: Columns, variables: Sequence[Tensor], draws: int) -> Scores:
        """Of fresh draws for some rows, with their part of ``[*free, *fixed]``."""
        ...


@dataclass
class Climber:
    """Settings of :func:`climb`.

    Args:
        steps: of Adam.
        draws: fresh ones of each row at each step.
        learning_rate: at the first step; it falls to 0 on a half cosine.
        compile: "auto" weighs the time that steps took against that of compiling.
        show: told the fraction that is done, from time to time.
    """

    steps: int = 300
    draws: int = 8
    learning_rate: float = 0.05
    compile: Compile = "auto"
    show: Callable[[float], None] = field(default=lambda done: None)

    def __post_init__(self) -> None:
        if min(self.steps, self.draws) < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"steps={self.steps}, draws={self.draws}, learning_rate={self.learning_rate}: "
                "expected at least 1 step and draw, and a positive rate"
            )


def climb(q: RowWise, columns: Columns, how: Climber) -> Tensor:
    """Moves ``q.free`` up the rows' ELBO; returns the ELBO of each row before each step, ``(steps,
    rows)``.

    Rows do not meet: the sum of their ELBOs has a row's gradient for its own variables, and Adam
    (Kingma & Ba 2015, arXiv:1412.6980) works entry by entry. Draws from torch's random state.

    Args:
        columns: of as many rows as q has variables of.
    """
    names, count, fixed = list(columns), len(q.free), len(q.fixed)

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            free = [leaf.detach().requires_grad_() for leaf in leaves[:count]]
            variables = [*free, *leaves[count : count + fixed]]
            batch = dict(zip(names, leaves[count + fixed :], strict=True))
            elbo = q.scores(batch, variables, how.draws).elbo.mean(0)
            found = torch.autograd.grad(-elbo.sum(), free, allow_unused=True)
        return elbo.detach(), *(
            torch.zeros_like(own) if g is None else g for own, g in zip(free, found, strict=True)
        )

    rows = len(q.free[0])
    size = evenly(rows, max(1, _memory(columns) // (how.draws * 3 * _bytes_of_row(q, columns))))
    run = _Recorded(step, how, math.ceil(rows / size))
    elbos: list[Tensor] = []
    climbed: list[list[Tensor]] = []
    for number, (block, new) in enumerate(overlapping(rows, size)):
        free = [own[block].clone() for own in q.free]
        held = [own[block].contiguous() for own in (*q.fixed, *columns.values())]
        share = partial(_share, how.show, number, math.ceil(rows / size))
        elbos.append(_adam(partial(_with, run, held), free, how, share)[:, new])
        climbed.append([own[new] for own in free])
    q.free = [torch.cat(own) for own in zip(*climbed, strict=True)]
    return torch.cat(elbos, 1)


def _adam(
    run: Callable[..., Any], free: list[Tensor], how: Climber, show: Callable[[float], None]
) -> Tensor:
    """Moves ``free`` in place; returns the ELBO of each step and row."""
    # The second average forgets sooner than Adam's default: there are few steps.
    adam = torch.optim.Adam(free, lr=how.learning_rate, betas=(0.9, 0.99))
    elbos: list[Tensor] = []
    for number in range(how.steps):
        elbo, *gradients = run(free)
        for own, gradient in zip(free, gradients, strict=True):
            own.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        for group in adam.param_groups:
            group["lr"] = how.learning_rate * 0.5 * (1 + math.cos(math.pi * number / how.steps))
        adam.step()
        elbos.append(elbo.cpu())
        if number % max(1, how.steps // 50) == 0:
            show(number / how.steps)
    return torch.stack(elbos)


def _with(run: graphs.Call, held: Sequence[Tensor], free: Sequence[Tensor]) -> Any:
    return run(*free, *held)


def _share(show: Callable[[float], None], number: int, of: int, done: float) -> None:
    show((number + done) / of)


def scored(q: RowWise, columns: Columns, samples: int) -> Scores:
    """Scores of ``samples`` fresh draws of each row, on the CPU, as many at once as fit the cache.

    Call it without gradients, within :func:`ppl_vae.sites.evaluating`.
    """
    variables = [*q.free, *q.fixed]
    rows = len(next(iter(columns.values())))
    at_once = max(1, _memory(columns) // _bytes_of_row(q, columns))  # draws, of all rows together
    some = evenly(samples, at_once)
    found: list[Scores] = []
    for block in parts(rows, max(1, at_once // some)):
        batch = {name: column[block] for name, column in columns.items()}
        own = [variable[block] for variable in variables]
        each = [q.scores(batch, own, p.stop - p.start) for p in parts(samples, some)]
        found.append(Scores(*(torch.cat([one[k].cpu() for one in each]) for k in range(2))))
    return Scores(*(torch.cat([one[k] for one in found], 1) for k in range(2)))


def _bytes_of_row(q: RowWise, columns: Columns) -> int:
    """What one draw of one row makes."""
    few = {name: column[:2] for name, column in columns.items()}
    with OutputBytes() as made:
        q.scores(few, [own[:2] for own in (*q.free, *q.fixed)], 4)
    return max(1, made.bytes // (4 * len(next(iter(few.values())))))


def _memory(columns: Columns) -> int:
    return CACHED if next(iter(columns.values())).device.type == "cpu" else 8 * CACHED


class _Recorded:
    """A step, recorded at its first call, and compiled where that saves time."""

    def __init__(self, step: graphs.Call, how: Climber, blocks: int) -> None:
        self._step, self._compile, self._left = step, how.compile, how.steps * blocks
        self._graph: graphs.Graph | None = None
        self._run: graphs.Call | None = None
        self._seconds: list[float] = []

    def __call__(self, *leaves: Tensor) -> Any:
        if self._run is None:
            return self._first(leaves)
        if self._graph is not None and self._pays():
            with suppress(graphs.Untraceable):
                self._run = self._graph.compile(*leaves)
            self._graph = None
        start = time.perf_counter()
        result = self._run(*leaves)
        if self._graph is not None and len(self._seconds) < TIMED:
            if leaves[0].is_cuda:
                torch.cuda.synchronize(leaves[0].device)
            self._seconds.append(time.perf_counter() - start)
        self._left -= 1
        return result

    def _first(self, leaves: Sequence[Tensor]) -> Any:
        try:
            result, self._graph = graphs.record(self._step, *leaves)
            self._run = self._graph
        except graphs.Untraceable:
            result, self._run = self._step(*leaves), self._step
        self._left -= 1
        return result

    def _pays(self) -> bool:
        if self._compile == "auto":
            return min(self._seconds[1:], default=0.0) * self._left * SAVED > COMPILING
        return self._compile is True
