"""Normalizing flows: invertible maps that make a normal into another distribution.

:class:`FlowNormal` puts a flow behind a diagonal normal: a family for q(z | x), or for a prior
p(z | c). :class:`ppl_vae.priors.FlowPrior` puts one behind a standard normal. What a draw, and the
score of a value that the flow did not draw, cost in passes of the flow's net:

=========================  =====  ================  =====================================
flow                       draw   score of another  for
=========================  =====  ================  =====================================
Planar, Radial, Sylvester  1      refused           posteriors
Householder                1      1                 posteriors; all normals
InverseAutoregressive      1      size              posteriors
MaskedAutoregressive       size   1                 priors
Coupling                   1      1                 either, of 2 coordinates or more
=========================  =====  ================  =====================================

A draw's own score costs no pass: its transforms keep it. Training takes the draw and its score from
a posterior, the score of another value from a prior. All flows begin near the identity, so that
learning starts at mean field.

Pyro's transforms are used where they serve. Its splines, and the inverse of its autoregressive
transforms, look at values of tensors, so that a step with them could be neither recorded nor
compiled: these, and couplings of splines with context, are made here, of the maps in
:mod:`ppl_vae.elementwise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from pyro.distributions.transforms import Transform
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor, nn

from ppl_vae.bijections import AutoregressiveStep, CoupledStep, PlanarStep, RadialStep
from ppl_vae.conditionals import join
from ppl_vae.elementwise import SOFTPLUS_IS_1, Affine, Elementwise
from ppl_vae.elementwise import RationalQuadratic as RationalQuadratic
from ppl_vae.flow import Flow, RawNumbers
from ppl_vae.flow import FlowNormal as FlowNormal
from ppl_vae.made import MADE, hidden_widths, shrink
from ppl_vae.nn import MLP


class Planar(Flow):
    """Steps ``z + u tanh(w' z + b)``, each across one direction.

    Source: Rezende & Mohamed 2015 (arXiv:1505.05770), eqs. 10 to 12, amortized; kept invertible as
    in appendix A.1.

    Args:
        size, context, layers: as :class:`Flow`.
        hidden: hidden widths of the net from the context to each step's b, u and w.
    """

    invertible = False

    def __init__(
        self, size: int, context: int = 0, *, layers: int = 8, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(size, context, layers=layers)
        w = torch.randn(layers, size) / math.sqrt(size)
        # Appendix A.1 moves u along w until their product is softplus(w' u) - 1: here 0.
        u = SOFTPLUS_IS_1 * w / w.square().sum(-1, keepdim=True)
        self.raw = RawNumbers(context, hidden, torch.cat([torch.zeros(layers, 1), u, w], -1))

    def transforms(self, context: Tensor | None) -> list[Transform]:
        parts = [1, self.size, self.size]
        return [PlanarStep(step.split(parts, -1)) for step in self.raw(context).unbind(-2)]


class Radial(Flow):
    """Steps ``z + beta (z - c) / (alpha + |z - c|)``, towards a center or away from it.

    Source: Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 14, amortized; kept invertible as in
    appendix A.2.

    Args:
        size, context, layers: as :class:`Flow`.
        hidden: hidden widths of the net from the context to each step's c, alpha and beta.
    """

    invertible = False

    def __init__(
        self, size: int, context: int = 0, *, layers: int = 8, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(size, context, layers=layers)
        # Two equal raw numbers are a beta of 0, here with an alpha of 1.
        pull = torch.full((layers, 2), SOFTPLUS_IS_1)
        self.raw = RawNumbers(context, hidden, torch.cat([torch.randn(layers, size), pull], -1))

    def transforms(self, context: Tensor | None) -> list[Transform]:
        parts = [self.size, 1, 1]
        return [RadialStep(step.split(parts, -1)) for step in self.raw(context).unbind(-2)]


class Householder(Flow):
    """Reflections: they turn a diagonal normal into one with correlations, and keep volumes.

    As many as there are coordinates reach every covariance. They begin in pairs that undo each
    other, so that an even number begins at the identity. Source: Tomczak & Welling 2016
    (arXiv:1611.09630), here with every vector from the same context.

    Args:
        size, context: as :class:`Flow`.
        layers: number of reflections.
        hidden: hidden widths of the net from the context to the vectors.
    """

    def __init__(
        self, size: int, context: int = 0, *, layers: int = 4, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(size, context, layers=layers)
        pairs = torch.randn((layers + 1) // 2, size).repeat_interleave(2, 0)
        self.raw = RawNumbers(context, hidden, pairs[:layers])

    def transforms(self, context: Tensor | None) -> list[Transform]:
        return [ConditionedHouseholder(self.raw(context))]


class InverseAutoregressive(Flow):
    """Steps in which each coordinate is moved by what stood before it (IAF): quick to draw.

    The order is reversed from step to step. Direct connections make every normal reachable with
    affine maps. Source: Kingma et al. 2016 (arXiv:1606.04934), eq. 10, for affine maps; with
    splines, Durkan et al. 2019 (arXiv:1906.04032), section 3.

    Args:
        size, context, layers: as :class:`Flow`.
        hidden: hidden widths of each step's net, each at least ``size``; None: one of
            ``max(32, 2 * size)``.
        elementwise: the map of one coordinate, as :class:`RationalQuadratic`; None: affine.
    """

    def __init__(
        self,
        size: int,
        context: int = 0,
        *,
        layers: int = 4,
        hidden: Sequence[int] | None = None,
        elementwise: Elementwise | None = None,
    ) -> None:
        super().__init__(size, context, layers=layers)
        self.elementwise = elementwise or Affine()
        numbers = self.elementwise.parameters
        self.nets = nn.ModuleList(
            MADE(size, context, numbers, hidden, reverse=layer % 2 == 1) for layer in range(layers)
        )

    def transforms(self, context: Tensor | None) -> list[Transform]:
        steps: list[Transform] = []
        for net in self.nets:
            steps.append(AutoregressiveStep(cast(MADE, net), context, self.elementwise))
        return steps


class MaskedAutoregressive(InverseAutoregressive):
    """The same steps the other way round (MAF): quick to score.

    Source: Papamakarios et al. 2017 (arXiv:1705.07057), section 3.1.

    Arguments: as :class:`InverseAutoregressive`.
    """

    def transforms(self, context: Tensor | None) -> list[Transform]:
        return [step.inv for step in super().transforms(context)]


class Coupling(Flow):
    """Steps in which one half of the coordinates moves the other: quick both ways.

    The halves take turns. Source: Dinh et al. 2017 (arXiv:1605.08803), section 3.2, for
    affine maps; with splines, Durkan et al. 2019 (arXiv:1906.04032), section 3.

    Args:
        size, context, layers: as :class:`Flow`; at least 2 coordinates.
        hidden: hidden widths of each step's net; None: one of ``max(32, 2 * size)``.
        elementwise: the map of one coordinate, as :class:`RationalQuadratic`; None: affine.

    Raises:
        ValueError: as :class:`Flow`, and for a single coordinate.
    """

    def __init__(
        self,
        size: int,
        context: int = 0,
        *,
        layers: int = 4,
        hidden: Sequence[int] | None = None,
        elementwise: Elementwise | None = None,
    ) -> None:
        super().__init__(size, context, layers=layers)
        if size < 2:
            raise ValueError(
                f"Coupling(size={size}): expected at least 2 coordinates, since one half of them "
                "moves the other; take InverseAutoregressive"
            )
        self.elementwise = elementwise or Affine()
        self.halves = size - size // 2, size // 2
        self.nets = nn.ModuleList()
        for layer in range(layers):
            kept, moved = self.halves if layer % 2 == 0 else self.halves[::-1]
            outputs = self.elementwise.parameters * moved
            widths = hidden_widths(hidden, size)
            net = MLP(kept + context, *widths, outputs, activation=nn.ELU)
            shrink(net[-1])
            self.nets.append(net)

    def transforms(self, context: Tensor | None) -> list[Transform]:
        return [
            CoupledStep(
                partial(self._numbers, net, context),
                self.halves[0],
                layer % 2 == 0,
                self.elementwise,
            )
            for layer, net in enumerate(self.nets)
        ]

    def _numbers(self, net: nn.Module, context: Tensor | None, kept: Tensor) -> Tensor:
        given = kept if context is None else join(kept, context)
        raw = net(given).to(kept.dtype)  # autocast would leave them too coarse for a density
        return raw.unflatten(-1, (self.elementwise.parameters, -1))
