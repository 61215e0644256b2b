"""Monotone maps of single coordinates, from which flows are made.

Each is set by raw numbers that a net gives: as many for each coordinate as ``parameters`` says,
any real numbers, and all zeros mean the identity. Nothing here looks at a tensor's value, so that
a step of training can be recorded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Elementwise(ABC):
    """An increasing map of each coordinate, with its inverse.

    To implement: ``parameters``, and the two directions. Both take a value ``(..., D)`` and raw
    numbers ``(..., parameters, D)``, and return the other side's value and ``log dy/dx``,
    ``(..., D)`` each; dims on the left broadcast.
    """

    parameters: int

    @abstractmethod
    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx from x."""

    @abstractmethod
    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx (not dx/dy) from y."""


class Affine(Elementwise):
    """``y = exp(s) x + m``, with ``s = b tanh(raw / b)``, so that no scale overflows.

    Source: Dinh et al. 2017 (arXiv:1605.08803), section 3.2.

    Args:
        bound: b, the largest log-scale.

    Raises:
        ValueError: a bound that is not positive.
    """

    parameters = 2

    def __init__(self, bound: float = 5.0) -> None:
        if not bound > 0:
            raise ValueError(f"Affine(bound={bound}): expected a positive number")
        self.bound = bound

    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self._parts(raw)
        return log_scale.exp() * x + loc, log_scale.expand_as(x + loc)

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self._parts(raw)
        return (y - loc) * (-log_scale).exp(), log_scale.expand_as(y - loc)

    def _parts(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = raw.unbind(-2)
        return loc, self.bound * torch.tanh(log_scale / self.bound)


class RationalQuadratic(Elementwise):
    """A spline of ratios of quadratics on ``[-bound, bound]``, the identity outside.

    Source: Durkan et al. 2019 (arXiv:1906.04032), section 3.1, eqs. 4 to 8. Value and slope are
    continuous everywhere.

    Args:
        bins: number of pieces.
        bound: where the spline ends, in the unit of the coordinate.

    Raises:
        ValueError: fewer than 2 bins or more than 500, or a bound that is not positive.
    """

    def __init__(self, bins: int = 8, bound: float = 5.0) -> None:
        if not (2 <= bins <= 500 and bound > 0):
            raise ValueError(
                f"RationalQuadratic(bins={bins}, bound={bound}): "
                "expected 2 to 500 bins and a positive bound"
            )
        self.bins, self.bound = bins, bound
        self.parameters = 3 * bins - 1

    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)  # outside, `where` needs finite gradients too
        piece = self._piece(inside, self._knots(raw), axis=0)
        theta = (inside - piece.x) / piece.width
        mixed = theta * (1 - theta)
        numerator = piece.height * (piece.slope * theta**2 + piece.left * mixed)
        y = piece.y + numerator / (piece.slope + piece.bend * mixed)
        return self._or_identity(x, y, piece.log_slope(theta))

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.clamp(-self.bound, self.bound)
        piece = self._piece(inside, self._knots(raw), axis=1)
        rise = inside - piece.y
        a = piece.height * (piece.slope - piece.left) + rise * piece.bend
        b = piece.height * piece.left - rise * piece.bend
        c = -piece.slope * rise
        # Never negative but by rounding; kept off 0, where the root has no gradient.
        discriminant = (b**2 - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny)
        theta = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)  # rounding may leave the bin
        return self._or_identity(y, piece.x + theta * piece.width, piece.log_slope(theta))

    def _or_identity(
        self, given: Tensor, other: Tensor, log_slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        inside = given.abs() < self.bound
        return torch.where(inside, other, given), torch.where(inside, log_slope, 0.0)

    def _knots(self, raw: Tensor) -> Tensor:
        """x, y and slope of the bins' ends: ``(..., 3, bins + 1, D)``."""
        sizes, slopes = raw.split([2 * self.bins, self.bins - 1], -2)
        shares = sizes.unflatten(-2, (2, self.bins)).softmax(-2)
        shares = _LEAST + (1 - _LEAST * self.bins) * shares
        # Without the last end, which is the bound but for rounding.
        inner = 2 * self.bound * shares[..., :-1, :].cumsum(-2) - self.bound
        ends = F.pad(F.pad(inner, (0, 0, 1, 0), value=-self.bound), (0, 0, 0, 1), value=self.bound)
        # Raw zeros give slope 1, which is the slope outside.
        slopes = _LEAST + (1 - _LEAST) * F.softplus(slopes + SOFTPLUS_IS_1)
        return torch.cat([ends, F.pad(slopes, (0, 0, 1, 1), value=1.0).unsqueeze(-3)], -3)

    def _piece(self, value: Tensor, knots: Tensor, axis: int) -> _Piece:
        """The bin in which each coordinate lies, by its x (axis 0) or y (axis 1)."""
        inner = knots[..., axis, 1:-1, :]
        index = (value.unsqueeze(-2) >= inner).sum(-2, keepdim=True)
        index = torch.cat([index, index + 1], -2).unsqueeze(-3)  # (..., 1, 2, D)
        knots = knots.expand(*index.shape[:-3], -1, -1, -1)
        ends = knots.gather(-2, index.expand(*index.shape[:-3], 3, -1, -1))
        (x, right_x), (y, top), (left, right) = (e.unbind(-2) for e in ends.unbind(-3))
        width, height = right_x - x, top - y
        slope = height / width
        return _Piece(x, width, y, height, slope, left, left + right - 2 * slope, right)


_LEAST = 1e-3
"""The smallest share of a bin, and the smallest slope at a knot."""

SOFTPLUS_IS_1 = math.log(math.e - 1)
"""Where softplus is 1."""


class _Piece(NamedTuple):
    """One bin for each coordinate, ``(..., D)`` each."""

    x: Tensor  # of its lower end, as y
    width: Tensor
    y: Tensor
    height: Tensor
    slope: Tensor  # from end to end; next, at the left end
    left: Tensor
    bend: Tensor
    right: Tensor

    def log_slope(self, theta: Tensor) -> Tensor:
        """log dy/dx at the share theta of the bin's width."""
        mixed = theta * (1 - theta)
        ends = self.right * theta**2 + 2 * self.slope * mixed + self.left * (1 - theta) ** 2
        return 2 * self.slope.log() + ends.log() - 2 * (self.slope + self.bend * mixed).log()
