"""Whether contenders compute the same loss for the same weights: checked before they are timed.

Two parts. The loss written by hand and the Pyro program must agree exactly, draw by draw, gradients
included (float64, same seed). Then the very steps that are timed, whose noise cannot be set where
it is drawn in compiled code or in JAX, must agree with it on average over many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.by_hand import ByHand
from benchmarks.contender import Contender, Task
from benchmarks.programs import pair
from ppl_vae.objectives import backward

PRECISION = 5e-5
"""Standard error, relative to the mean, down to which draws are averaged."""

ERRORS = 5.0
"""How many standard errors apart two means may be: by chance one pair in two million is."""

MOST = 20_000
"""Draws after which a mean is given up as too noisy to compare."""


class Disagreement(AssertionError):
    """Contenders that compute different things: their times cannot be compared."""


@dataclass(frozen=True)
class Mean:
    """A mean loss in nats per row, and its standard error."""

    mean: float
    error: float
    draws: int

    def agrees(self, other: Mean) -> bool:
        rounding = 1e-5 * abs(self.mean)
        allowed = ERRORS * (self.error**2 + other.error**2) ** 0.5 + rounding
        return abs(self.mean - other.mean) <= allowed

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f} nats a row ({self.draws} draws)"


def check(
    task: Task, contenders: Mapping[str, Contender], precision: float = PRECISION
) -> dict[str, Mean]:
    """The mean loss of each contender on the first batch.

    Leaves contenders with the task's weights.

    Raises:
        Disagreement: two that differ by more than chance allows.
    """
    check_by_hand(task)
    reference = by_hand(task, precision)
    means: dict[str, Mean] = {}
    for name, contender in contenders.items():
        means[name] = of_steps(task, contender, precision)
        if not means[name].agrees(reference):
            raise Disagreement(f"{name}: {means[name]}; by hand: {reference}")
    return means


def check_by_hand(task: Task) -> None:
    """Hold the loss by hand against the Pyro program: the same draws, on the CPU, in float64.

    Raises:
        Disagreement: losses or gradients differ by more than rounding.
    """
    x = task.batches[0].cpu().double()
    hand, theirs = (task.size.build().double() for _ in range(2))
    for nets in (hand, theirs):
        nets.load_state_dict(task.weights)
    programs = pair(task.size, theirs)
    for program in (programs.model, programs.guide):
        program.double()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        objective, loss = ByHand(task.size.program, hand)(x)
        objective.backward()
        torch.manual_seed(0)
        other = backward(programs.elbo(), programs.model, programs.guide, x)
    if not math.isclose(loss.item(), other, rel_tol=1e-8):
        raise Disagreement(f"by hand: a loss of {loss.item()}; the Pyro program: {other}")
    for (name, p), q in zip(hand.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is None or q.grad is None or not torch.allclose(p.grad, q.grad, 1e-6, 1e-8):
            raise Disagreement(f"by hand and the Pyro program: gradients of {name} differ")


def by_hand(task: Task, precision: float = PRECISION) -> Mean:
    """The loss written by hand."""
    loss = ByHand(task.size.program, task.nets())
    with torch.no_grad():
        return average(lambda: loss(task.batches[0])[1].item() / task.size.batch, precision)


def of_steps(task: Task, contender: Contender, precision: float = PRECISION) -> Mean:
    """The loss that steps return, each from the task's weights on the first batch."""

    def draw() -> float:
        contender.load(task.weights)
        return contender.read(contender.step(contender.batches[0]))

    with contender.active():
        mean = average(draw, precision)
        contender.load(task.weights)
        return mean


def average(draw: Callable[[], float], precision: float = PRECISION) -> Mean:
    """The mean of independent draws, as many as give a relative standard error of ``precision``.

    Raises:
        Disagreement: they are too noisy for that.
    """
    losses = [draw() for _ in range(30)]
    while True:
        found = torch.tensor(losses, dtype=torch.float64)
        mean, error = found.mean().item(), found.std().item() / len(losses) ** 0.5
        if error <= precision * abs(mean) or len(losses) >= MOST:
            break
        losses += [draw() for _ in range(len(losses))]
    if not error <= precision * abs(mean):
        raise Disagreement(f"a loss too noisy to compare: {Mean(mean, error, len(losses))}")
    return Mean(mean, error, len(losses))
