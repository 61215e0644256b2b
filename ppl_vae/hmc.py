"""Hamiltonian Monte Carlo between two densities, for many rows and chains at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae import graphs
from ppl_vae.density import Density
from ppl_vae.importance import COMPILING, SAVED, TIMED, Compile

JITTER = 0.2
"""Each move's step size is drawn from 1 - JITTER to 1 + JITTER of the adapted one, since with a
fixed one a trajectory can return to where it began (Neal 2011, section 3.2)."""


RECORDING = 100
"""As many evaluations as take about as long as recording one."""


class Energies(NamedTuple):
    """Log densities of the start and of p(x, z), float64 ``(chains, rows)``, and their gradients,
    ``(chains, rows, U)``."""

    start: Tensor
    joint: Tensor
    start_gradient: Tensor
    joint_gradient: Tensor

    def at(self, beta: float) -> Tensor:
        return (1 - beta) * self.start + beta * self.joint

    def gradient_at(self, beta: float) -> Tensor:
        return (1 - beta) * self.start_gradient + beta * self.joint_gradient

    def where(self, chosen: Tensor, other: Energies) -> Energies:
        """This where ``chosen`` ``(chains, rows)``, else the other."""
        pairs = zip(self, other, strict=True)
        return Energies(*(_where(chosen, mine, theirs) for mine, theirs in pairs))


class State(NamedTuple):
    u: Tensor
    energies: Energies


class Hmc:
    """Moves of Hamiltonian Monte Carlo with unit mass."""

    def __init__(self, energies: Callable[[Tensor], Energies], leapfrog: int) -> None:
        self._energies, self._leapfrog = energies, leapfrog

    def state(self, u: Tensor) -> State:
        return State(u, self._energies(u))

    def move(self, state: State, beta: float, step: Tensor) -> tuple[State, Tensor]:
        """One move that leaves the density at ``beta`` as it is, and the probability of its
        acceptance, ``(chains, rows)``.

        Args:
            step: sizes, ``(rows,)``.
        """
        size = (step * (1 + JITTER * (2 * torch.rand_like(step) - 1))).unsqueeze(-1)
        u, energies = state
        momentum = torch.randn_like(u)
        before = energies.at(beta) - _kinetic(momentum)
        momentum = momentum + size / 2 * energies.gradient_at(beta)
        for left in range(self._leapfrog - 1, -1, -1):
            u = u + size * momentum
            energies = self._energies(u)
            kick = size if left else size / 2
            momentum = momentum + kick * energies.gradient_at(beta)
        change = energies.at(beta) - _kinetic(momentum) - before
        # A trajectory that has left for infinity, or for nan, is refused.
        probability = change.clamp(max=0).exp().nan_to_num(0.0)
        accepted = torch.rand_like(probability) < probability
        there = State(_where(accepted, u, state.u), energies.where(accepted, state.energies))
        return there, probability


class Count:
    """Counts evaluations, and shows what share of them is done."""

    def __init__(self, total: int, show: Callable[[float], None]) -> None:
        self.done, self.total, self._show = 0, total, show

    def add(self) -> None:
        self.done += 1
        if self.done % max(1, self.total // 200) == 0:
            self._show(min(1.0, self.done / self.total))


class Gradients:
    """Log densities and gradients: recorded, so that Pyro runs once, and compiled, if it pays."""

    def __init__(self, density: Density, compile: Compile, count: Count) -> None:
        self._density, self._compile, self._count = density, compile, count
        self._names: list[str] = []
        self._graph: graphs.Graph | None = None
        self._run: graphs.Call | None = None
        self._seconds: list[float] = []

    def __call__(self, columns: Mapping[str, Tensor], u: Tensor) -> Energies:
        self._names = list(columns)
        leaves = [u.contiguous(), *(column.contiguous() for column in columns.values())]
        if self._run is None:
            self._record(leaves)
        elif self._graph is not None and self._pays():
            self._run = self._compiled(self._graph, leaves)
            self._graph = None
        start = time.perf_counter()
        assert self._run is not None
        energies = Energies(*self._run(*leaves))
        if self._graph is not None and len(self._seconds) < TIMED:
            if u.is_cuda:
                torch.cuda.synchronize(u.device)
            self._seconds.append(time.perf_counter() - start)
        self._count.add()
        return energies

    def _eagerly(self, u: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            start, joint = self._density(u, dict(zip(self._names, columns, strict=True)))
            (of_start,) = torch.autograd.grad(start.sum(), u, retain_graph=True)
            (of_joint,) = torch.autograd.grad(joint.sum(), u)
        return start.detach(), joint.detach(), of_start, of_joint

    def _record(self, leaves: list[Tensor]) -> None:
        self._run = self._eagerly
        if self._compile is not True and self._count.total < RECORDING:
            return
        with suppress(graphs.Untraceable):
            _, self._graph = graphs.record(self._eagerly, *leaves)
            self._run = self._graph

    @staticmethod
    def _compiled(graph: graphs.Graph, leaves: list[Tensor]) -> graphs.Call:
        try:
            return graph.compile(*leaves)
        except graphs.Untraceable:
            return graph

    def _pays(self) -> bool:
        if self._compile == "auto":
            left = self._count.total - self._count.done
            return min(self._seconds[1:], default=0.0) * left * SAVED > COMPILING
        return self._compile is True


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(-1) / 2


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` or ``b`` by chain and row."""
    return torch.where(chosen.reshape(*chosen.shape, *(1,) * (a.dim() - 2)), a, b)
