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

    Source: Dinh et al. 2017 (arXiv:1605.08803), eq. 7, whose s has a tanh too.

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
        knots = self._knots(raw)
        piece = knots.piece(inside, knots.x)
        theta = (inside - piece.x) / piece.width
        mixed = theta * (1 - theta)
        numerator = piece.height * (piece.slope * theta**2 + piece.left * mixed)
        y = piece.y + numerator / (piece.slope + piece.bend * mixed)
        return self._or_identity(x, y, piece.log_slope(theta))

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.clamp(-self.bound, self.bound)
        knots = self._knots(raw)
        piece = knots.piece(inside, knots.y)
        rise = inside - piece.y
        a = piece.height * (piece.slope - piece.left) + rise * piece.bend
        b = piece.height * piece.left - rise * piece.bend
        c = -piece.slope * rise
        # Never negative but by rounding; kept off 0, where the root has no gradient.
        discriminant = (b**2 - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny)
        theta = 2 * c / (-b - discriminant.sqrt())
        return self._or_identity(y, piece.x + theta * piece.width, piece.log_slope(theta))

    def _or_identity(
        self, given: Tensor, other: Tensor, log_slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        inside = given.abs() < self.bound
        return torch.where(inside, other, given), torch.where(inside, log_slope, 0.0)

    def _knots(self, raw: Tensor) -> _Knots:
        widths, heights, slopes = raw.split([self.bins, self.bins, self.bins - 1], -2)
        # Zero gives slope 1, which is the slope outside.
        slopes = _LEAST + (1 - _LEAST) * F.softplus(slopes + SOFTPLUS_IS_1)
        return _Knots(
            self._positions(widths),
            self._positions(heights),
            F.pad(slopes, (0, 0, 1, 1), value=1.0),
        )

    def _positions(self, raw: Tensor) -> Tensor:
        shares = _LEAST + (1 - _LEAST * self.bins) * raw.softmax(-2)
        # Without the last one, which is the bound but for rounding.
        inner = 2 * self.bound * shares[..., :-1, :].cumsum(-2) - self.bound
        return F.pad(F.pad(inner, (0, 0, 1, 0), value=-self.bound), (0, 0, 0, 1), value=self.bound)


_LEAST = 1e-3
"""The smallest share of a bin, and the smallest slope at a knot."""

SOFTPLUS_IS_1 = math.log(math.e - 1)
"""Where softplus is 1."""


class _Piece(NamedTuple):
    """The bin in which each coordinate lies, ``(..., D)`` each."""

    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    left: Tensor  # slope at its left end
    right: Tensor

    @property
    def slope(self) -> Tensor:
        return self.height / self.width

    @property
    def bend(self) -> Tensor:
        return self.left + self.right - 2 * self.slope

    def log_slope(self, theta: Tensor) -> Tensor:
        """log dy/dx at the share theta of the bin's width."""
        mixed = theta * (1 - theta)
        ends = self.right * theta**2 + 2 * self.slope * mixed + self.left * (1 - theta) ** 2
        return 2 * self.slope.log() + ends.log() - 2 * (self.slope + self.bend * mixed).log()


class _Knots(NamedTuple):
    """Positions and slopes at the ends of bins, ``(..., bins + 1, D)`` each."""

    x: Tensor
    y: Tensor
    slopes: Tensor

    def piece(self, value: Tensor, ends: Tensor) -> _Piece:
        """The bin of each coordinate of ``value``, which lies between its ``ends``."""
        index = (value.unsqueeze(-2) >= ends[..., 1:-1, :]).sum(-2, keepdim=True)
        left, right = ([_pick(knots, i) for knots in self] for i in (index, index + 1))
        return _Piece(
            x=left[0],
            width=right[0] - left[0],
            y=left[1],
            height=right[1] - left[1],
            left=left[2],
            right=right[2],
        )


def _pick(knots: Tensor, index: Tensor) -> Tensor:
    return knots.expand(*index.shape[:-2], -1, -1).gather(-2, index).squeeze(-2)
