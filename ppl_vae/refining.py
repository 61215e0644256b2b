"""Refining q for one row at a time, the model fixed: what an encoder loses, and what a family does.

A guide is amortized: its nets give q of each row. :class:`Freed` gives the rows variables of their
own besides, within the guide's family; :class:`FullRankRows` is a normal with all covariances a
row. :func:`climb` moves either up the rows' ELBO.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ppl_vae import graphs
from ppl_vae.assignments import Assignments
from ppl_vae.density import Density
from ppl_vae.importance import (
    CACHED,
    COMPILING,
    SAVED,
    Compile,
    OutputBytes,
    draw_all,
    evenly,
    log_weight,
    overlapping,
    parts,
    score,
)
from ppl_vae.model import GenerativeModel

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


class Freed:
    """A guide in which each row has offsets of its own, added to what the guide's nets return.

    Nets are the outermost modules of the guide that return a tensor with a dim of rows: an encoder
    with its features, a head with the numbers that make a distribution, the nets of a flow. With
    all offsets 0 it is the guide. So every value of what a head returns can be reached, whatever
    the width of the features. A row's offsets are the same for all of its draws: a net of latents
    that were drawn before is shifted, and no other function of them.

    Auxiliary draws are not weighed, as nowhere in :mod:`ppl_vae.importance`.

    Args:
        columns: some rows of what the model observes, and its covariates, to read shapes from.
        given: values of all global latents, ``(event)`` each.
        assignments: of the sites whose values are all tried.

    Attributes:
        free: the offsets; none where the guide has no nets.
    """

    def __init__(
        self,
        model: GenerativeModel,
        guide: nn.Module,
        columns: Columns,
        *,
        given: Columns,
        assignments: Assignments,
    ) -> None:
        self._model, self._guide = model, guide
        self._given, self._assignments = given, assignments
        rows = len(next(iter(columns.values())))
        self._nets, shapes = self._find({name: column[:2] for name, column in columns.items()})
        like = next(iter(guide.parameters()), torch.zeros(()))
        self.free = [like.new_zeros(rows, *shape) for shape in shapes]
        self.fixed: list[Tensor] = []

    def scores(self, columns: Columns, variables: Sequence[Tensor], draws: int) -> Scores:
        # While q is scored too: a density may run a net again, the model never does.
        with self._offset(variables):
            drawn, _ = draw_all(self._guide, columns, draws, self._assignments, self._given)
        each = [score(self._model, columns, one, draws) for one in drawn]
        figures = self._assignments.combine(each, [one.log_q for one in drawn])
        elbo, weight = figures["elbo", ""], log_weight(figures)
        assert weight is not None
        rows = len(next(iter(columns.values())))
        # Where all is enumerated, all draws are alike.
        return Scores(elbo.expand(draws, rows), weight.expand(draws, rows))

    def draw(self, columns: Columns, draws: int) -> Columns:
        """Latents of fresh draws for all rows, ``(draws, rows, event)`` each; enumerated sites
        have the first of their values."""
        with self._offset(self.free):
            drawn, _ = draw_all(self._guide, columns, draws, self._assignments, self._given)
        return drawn[0].values

    def _find(self, columns: Columns) -> tuple[list[nn.Module], list[torch.Size]]:
        """The nets, and the shapes of what they return for one row, found in a run."""
        rows, draws = len(next(iter(columns.values()))), 3
        found: dict[nn.Module, set[torch.Size]] = {}
        depth: list[nn.Module] = []  # modules at work that may prove to be nets

        def enter(module: nn.Module, args: Any) -> None:
            depth.append(module)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            depth.pop()
            if isinstance(out, Tensor) and out.is_floating_point():
                for inner in module.modules():
                    found.pop(inner, None) if inner is not module else None
                shape = out.shape[1:] if out.dim() and out.shape[0] == rows else None
                if out.dim() > 1 and out.shape[0] in (1, draws) and out.shape[1] == rows:
                    shape = out.shape[2:]
                found.setdefault(module, set()).add(torch.Size([-1]) if shape is None else shape)

        handles = [
            handle
            for module in self._guide.modules()
            if module is not self._guide
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            )
        ]
        try:
            draw_all(self._guide, columns, draws, self._assignments, self._given)
        finally:
            for handle in handles:
                handle.remove()
        # One that returns another shape at each call, or none of rows, is left alone.
        kept = {m: next(iter(s)) for m, s in found.items() if len(s) == 1}
        kept = {module: shape for module, shape in kept.items() if -1 not in shape}
        return list(kept), list(kept.values())

    @contextmanager
    def _offset(self, free: Sequence[Tensor]) -> Iterator[None]:
        handles = [
            net.register_forward_hook(partial(_added, own))
            for net, own in zip(self._nets, free, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _added(offset: Tensor, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + offset.to(out.dtype)


class FullRankRows:
    """A normal with all covariances over the coordinates of all continuous latents of a row.

        u = m + S (a + M e),  e ~ Normal(0, I)

    The start's moments m and S are fixed, and what is free, a and the factor M, starts at 0 and I:
    one learning rate then fits latents of any scale. Enumerated sites are summed out exactly.
    Gradients are those of the path alone, the density's own parameters held: they have no noise
    where q is the posterior (Roeder, Wu & Duvenaud 2017, arXiv:1703.09194, eq. 7).

    Args:
        density: of the model.
        start: coordinates ``(draws, rows, U)``, whose moments are the start.
    """

    def __init__(self, density: Density, start: Tensor) -> None:
        self._density = density
        loc, scale = moments(start)
        self.fixed = [loc, scale]
        # The factor's diagonal by its logarithm.
        self.free = [torch.zeros_like(loc), torch.zeros_like(scale)]

    def scores(self, columns: Columns, variables: Sequence[Tensor], draws: int) -> Scores:
        shift, raw, loc, scale = variables
        factor = raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        noise = torch.randn(draws, *loc.shape, dtype=loc.dtype, device=loc.device)
        standard = shift + _times(factor, noise)
        u = loc + _times(scale, standard)
        held = factor.detach()
        centered = (standard - shift.detach()).permute(1, 2, 0)
        e = torch.linalg.solve_triangular(held, centered, upper=False).permute(2, 0, 1)
        # The value of the noise that was drawn: a solve with a bad factor would make up density.
        log_q = -0.5 * noise.square().sum(-1) - (noise * (e - e.detach())).sum(-1)
        log_q = log_q - loc.shape[-1] / 2 * math.log(2 * math.pi)
        log_q = log_q - _log_det(held) - _log_det(scale)
        _, joint = self._density(u, columns)
        elbo = joint - log_q.double()
        return Scores(elbo, elbo)


def _times(factor: Tensor, vectors: Tensor) -> Tensor:
    """``(rows, U, U)`` times ``(draws, rows, U)``."""
    return torch.einsum("rij,drj->dri", factor, vectors)


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(rows, U)`` and Cholesky factors ``(rows, U, U)`` of draws ``(draws, rows, U)``.

    Correlations below three standard errors are taken for noise; and all of a row's, where what is
    left is no covariance.
    """
    loc = u.mean(0)
    away = (u - loc).permute(1, 2, 0)
    sd = away.square().mean(-1).sqrt().clamp_min(1e-6)
    correlation = away @ away.mT / len(u) / (sd.unsqueeze(-1) * sd.unsqueeze(-2))
    correlation = torch.where(correlation.abs() > 3 / math.sqrt(len(u)), correlation, 0.0)
    diagonal = torch.ones_like(sd).diag_embed()
    correlation = correlation.tril(-1) + correlation.tril(-1).mT + diagonal
    factor, failed = torch.linalg.cholesky_ex(correlation)
    small = factor.diagonal(dim1=-2, dim2=-1).amin(-1) < 1e-2
    factor = torch.where((failed.bool() | small)[:, None, None], diagonal, factor)
    return loc, sd.unsqueeze(-1) * factor


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
        if self._graph is not None:
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
