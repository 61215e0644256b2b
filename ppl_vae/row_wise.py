"""q(z | x) with variables of each row's own: in a guide's family, or with all covariances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.assignments import Assignments
from ppl_vae.density import Density
from ppl_vae.importance import draw_all, log_weight, score
from ppl_vae.model import GenerativeModel
from ppl_vae.refining import Columns, Scores


class Freed:
    """A guide in which each row has offsets of its own, added to what the guide's nets return.

    Nets are the outermost modules of the guide that return a tensor with a dim of rows: an encoder
    with its features, a head with the numbers that make a distribution, the nets of a flow. With
    all offsets 0 it is the guide. So every value of what a head returns can be reached, whatever
    the width of the features. A row's offsets are the same for all of its draws, and for all values
    of enumerated sites: a net of latents that were drawn before is shifted, and no other function
    of them.

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
