"""Conditionals: modules ``context -> Distribution``, the one abstraction under everything random.

A prior is a conditional without context, a likelihood one of the decoder's context, a posterior
family one of the encoder's. All of them give a distribution over one row, with the rows (and any
particles) as batch dims on the left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce
from typing import cast

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl_vae.nn import MLP, Branches, Gated, GatedMLP


class Conditional(nn.Module, ABC):
    """A family of distributions whose parameters a net computes from the context.

    To implement: ``distribution``, from the net's output to a distribution. Several tensors of
    context are joined on their last dim after broadcasting the others, so that particles of one
    and plain rows of another meet.

    Args:
        net: maps ``(..., context)`` to ``(..., parameters)``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *context: Tensor) -> TorchDistribution:
        # Under autocast a net answers in bfloat16, too coarse for a density.
        dtype = reduce(torch.promote_types, [part.dtype for part in context])
        return self.distribution(through(self.net, *context).to(dtype))

    @abstractmethod
    def distribution(self, parameters: Tensor) -> TorchDistribution:
        """The distribution of one row, from the net's output ``(..., parameters)``."""


class Normal(Conditional):
    """Normal with diagonal covariance; the net gives locations, then pre-softplus scales.

    Shapes: a net with ``2 * Z`` outputs gives batch ``(...)``, event ``(Z,)``.

    Raises:
        ValueError: the net's number of outputs is odd.
    """

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        if parameters.shape[-1] % 2:
            raise ValueError(
                f"the net of Normal has {parameters.shape[-1]} outputs; expected an even number: "
                "Z locations, then Z scales"
            )
        loc, scale = parameters.chunk(2, -1)
        return dist.Normal(loc, positive(scale)).to_event(1)


def join(*context: Tensor) -> Tensor:
    """Several tensors of context as one: ``(..., a)`` and ``(..., b)`` to ``(..., a + b)``."""
    if len(context) == 1:
        return context[0]
    batch = torch.broadcast_shapes(*(c.shape[:-1] for c in context))
    return torch.cat([c.expand(*batch, c.shape[-1]) for c in context], -1)


def through(net: nn.Module, *context: Tensor) -> Tensor:
    """``net(join(*context))``; where particles of one meet plain rows of another, the first layers
    see the rows once, not once a particle.

    Most of the work of q(z1 | x, z2) with many draws is the first layers': x is wide, and the same
    for all of them. Figures are the same up to rounding.
    """
    apart = len({part.shape[:-1] for part in context}) > 1
    of_one_dtype = len({part.dtype for part in context}) == 1
    # Of these very classes: a subclass, or a layer with a parametrization, has its own forward.
    kind = type(net) if apart and of_one_dtype else None
    if kind in (nn.Sequential, MLP, GatedMLP) and len(cast(nn.Sequential, net)):
        first, *rest = cast(nn.Sequential, net)
        return reduce(lambda hidden, layer: layer(hidden), rest, through(first, *context))
    if kind is Branches and cast(Branches, net).parts == [part.shape[-1] for part in context]:
        branches = cast(Branches, net).nets
        return join(*(branch(part) for branch, part in zip(branches, context, strict=True)))
    if kind is Gated:
        return nn.functional.glu(through(cast(Gated, net).linear, *context))
    if kind is nn.Linear:
        linear = cast(nn.Linear, net)
        columns = linear.weight.split([part.shape[-1] for part in context], 1)
        parts = zip(context, columns, strict=True)
        first, *others = sorted(parts, key=lambda part: part[0].shape[:-1].numel())
        hidden = nn.functional.linear(*first, linear.bias)
        return reduce(lambda hidden, part: hidden + part[0] @ part[1].T, others, hidden)
    return net(join(*context))


def positive(unconstrained: Tensor) -> Tensor:
    """Softplus, kept away from 0 by the smallest step of the dtype above 1.

    A scale of exactly 0 would give an infinite density; softplus reaches it in float32 at -104.
    """
    return nn.functional.softplus(unconstrained) + torch.finfo(unconstrained.dtype).eps


def constrained(
    base: TorchDistribution, support: Constraint, event_shape: torch.Size
) -> TorchDistribution:
    """``base`` over flat unconstrained coordinates, moved onto ``support``.

    Shapes: base event ``(U,)``, where U is the number of unconstrained coordinates of
    ``event_shape`` (a simplex of K has K - 1); result event ``event_shape``.
    """
    # Cached, so that a draw is scored by the coordinates it came from: a value that saturates at
    # the edge of its support has lost them, and a guide could learn to profit from that.
    transform = dist.transforms.biject_to(support).with_cache(1)
    unconstrained = transform.inverse_shape(event_shape)
    moves: list[dist.transforms.Transform] = []
    if len(unconstrained) != 1:
        moves.append(dist.transforms.ReshapeTransform(base.event_shape, unconstrained))
    if not is_real(support):
        moves.append(transform)
    return dist.TransformedDistribution(base, moves) if moves else base


def unconstrain(value: Tensor, support: Constraint, event_shape: torch.Size) -> Tensor:
    """Flat unconstrained coordinates ``(..., U)`` of a value on ``support``."""
    u = dist.transforms.biject_to(support).inv(value)
    return u.reshape(*value.shape[: value.dim() - len(event_shape)], -1)


def is_real(support: Constraint) -> bool:
    """Whether ``support`` is all of the reals, whatever its event dims."""
    # By type, since a copied module holds copies of constraints too.
    return isinstance(entrywise(support), type(constraints.real))


def entrywise(support: Constraint) -> Constraint:
    """A support without the dims that ``.to_event`` added: that of one entry, if it has one."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
