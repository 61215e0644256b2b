"""Transforms of vectors, of which flows are composed.

Each is made for one call: it keeps the last value and its log-determinant. None looks at a tensor's
value, so that a step of training can be recorded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NoReturn

import torch
from pyro.distributions.transforms import Transform
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.conditionals import join
from ppl_vae.elementwise import Elementwise
from ppl_vae.made import MADE


def no_inverse(family: str) -> NotImplementedError:
    """What to raise where a value is to be scored that the flow did not draw."""
    return NotImplementedError(
        f"{family} has no inverse in closed form: it scores only the value that it drew last. To "
        "score others, take InverseAutoregressive, Coupling or Householder"
    )


class PlanarStep(ConditionedPlanar):
    """Pyro's planar transform, in full precision."""

    def _call(self, x: Tensor) -> Tensor:
        # Its matrix products in bfloat16 were measured to miss the log-determinant by 0.1 nats.
        with torch.autocast(x.device.type, enabled=False):
            return super()._call(x)

    def _inverse(self, y: Tensor) -> NoReturn:
        raise no_inverse("Planar")


class RadialStep(ConditionedRadial):
    """Pyro's radial transform."""

    def _inverse(self, y: Tensor) -> NoReturn:
        raise no_inverse("Radial")


class Step(Transform):
    """A transform that computes its log-determinant together with its value.

    To implement: ``move`` and ``move_back``, which return the other side's value and
    ``log |det dy/dx|``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    @abstractmethod
    def move(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y ``(..., size)`` and ``log |det dy/dx|`` ``(...)`` from x ``(..., size)``."""

    @abstractmethod
    def move_back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x ``(..., size)`` and ``log |det dy/dx|`` ``(...)`` from y ``(..., size)``."""

    def _call(self, x: Tensor) -> Tensor:
        y, self._log_det = self.move(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, self._log_det = self.move_back(y)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self(x)  # a look-up, where x is the last value
        return self._log_det


class AutoregressiveStep(Step):
    """Each coordinate moved by a map that the coordinates before it set.

    Args:
        net: sets the maps; its order says what is before.
        context: the net's, ``(..., context)``.
        elementwise: the map of one coordinate.
    """

    def __init__(self, net: MADE, context: Tensor | None, elementwise: Elementwise) -> None:
        super().__init__()
        self.net, self.context, self.elementwise = net, context, elementwise

    def move(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slopes = self.elementwise(x, self.net(x, self.context))
        return y, log_slopes.sum(-1)

    def move_back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        log_det = y.new_zeros(())
        for i, here in self.net.coordinates(y):
            raw = self.net(x, self.context)
            moved, log_slope = self.elementwise.inverse(y[..., i : i + 1], raw[..., i : i + 1])
            x = torch.where(here, moved, x)
            log_det = log_det + log_slope.squeeze(-1)
        return x, log_det


class CoupledStep(Step):
    """One half of the coordinates moved by maps that the other half sets.

    Args:
        net: raw numbers of the maps, ``(..., parameters, moved)``, from the kept half.
        first: size of the first half.
        keep_first: whether it is the half that is kept.
        elementwise: the map of one coordinate.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        first: int,
        keep_first: bool,
        elementwise: Elementwise,
    ) -> None:
        super().__init__()
        self.net, self.first, self.keep_first = net, first, keep_first
        self.elementwise = elementwise

    def move(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(x, self.elementwise)

    def move_back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(y, self.elementwise.inverse)

    def _apply(
        self, value: Tensor, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        kept, other = value[..., : self.first], value[..., self.first :]
        if not self.keep_first:
            kept, other = other, kept
        moved, log_slopes = function(other, self.net(kept))
        halves = (kept, moved) if self.keep_first else (moved, kept)
        return join(*halves), log_slopes.sum(-1)


class SylvesterStep(Step):
    """``y = x + Q R tanh(S Q' x + b)``, for Q with orthonormal columns and triangular R and S.

    Source: van den Berg et al. 2018 (arXiv:1803.05649), section 3. The products of the
    diagonals of R and S must lie above -1.

    Args:
        outer: R, ``(..., M, M)``.
        inner: S, ``(..., M, M)``, triangular on the same side.
        bias: b, ``(..., M)``.
        basis: Q, ``(..., size, M)``; None: the identity.
    """

    def __init__(
        self, outer: Tensor, inner: Tensor, bias: Tensor, basis: Tensor | None = None
    ) -> None:
        super().__init__()
        self.outer, self.inner, self.bias, self.basis = outer, inner, bias, basis

    def move(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned = x if self.basis is None else _times(self.basis.mT, x)
        act = torch.tanh(_times(self.inner, turned) + self.bias)
        moved = _times(self.outer, act)
        y = x + (moved if self.basis is None else _times(self.basis, moved))
        diagonals = (m.diagonal(dim1=-2, dim2=-1) for m in (self.outer, self.inner))
        first, second = diagonals
        return y, torch.log1p(first * second * (1 - act**2)).sum(-1)

    def move_back(self, y: Tensor) -> NoReturn:
        raise no_inverse("Sylvester")


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix product that autocast leaves in full precision, as the log-determinant is."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)
