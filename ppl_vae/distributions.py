"""Distributions that torch and Pyro lack, or have in a form that does not suit a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid


class CholeskyNormal(dist.MultivariateNormal):
    """Multivariate normal that scores its own draw by the noise it was made from.

    Solving ``L e = value - loc`` for the noise again loses all digits where L is nearly singular:
    a guide that learns could then raise its objective without bound by rounding errors alone.
    Other values are scored as usual. Takes ``loc`` and ``scale_tril``.
    """

    _drawn: tuple[Tensor, Tensor] | None = None  # the last draw and its noise

    def __init__(self, loc: Tensor, *, scale_tril: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CholeskyNormal:
        loc = self.loc.expand(*batch_shape, -1)
        return CholeskyNormal(loc, scale_tril=self.scale_tril.expand(*batch_shape, -1, -1))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        # No matrix product: autocast would make it coarser than the density of what is drawn.
        value = self.loc + (self.scale_tril * noise.unsqueeze(-2)).sum(-1)
        self._drawn = value, noise
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(self.noise(value)).sum(-1) - self._log_det()

    def noise(self, value: Tensor) -> Tensor:
        """The e of ``value = loc + L e``: as drawn, or else by a triangular solve."""
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        residual = (value - self.loc).unsqueeze(-1)
        solved = torch.linalg.solve_triangular(self.scale_tril, residual, upper=False)
        return solved.squeeze(-1)

    def _log_det(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class DiscretizedLogistic(TorchDistribution):
    """A logistic distribution, rounded: the levels 0, 1, ..., ``levels - 1`` as floats.

    Level k stands for the number ``2 k / (levels - 1) - 1`` in [-1, 1], and for the interval around
    it up to the middle between neighbors; the first and the last level take the tails. Source:
    Salimans et al. 2017 (arXiv:1701.05517), eq. 2. A level's probability is computed as

        F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)),    F the logistic function, a < b,

    whose logarithm loses no digits wherever the interval lies, so that no approximation by a
    density is needed.

    Shapes: ``loc`` and ``scale`` broadcast to the batch shape; event ``()``.

    Args:
        loc, scale: of the logistic, in the unit of [-1, 1]; scale positive.
        levels: at least 2.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {  # pyright: ignore
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = False

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def width(self) -> float:
        """Of the interval that a level stands for."""
        return 2 / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        # One level after the other: all together would be ``levels`` times the batch in memory.
        mean = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            mean = mean + torch.sigmoid((self.loc - self._lower(level)) / self.scale)
        return mean

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedLogistic:
        expanded = DiscretizedLogistic(
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            self.levels,
            validate_args=False,
        )
        expanded._validate_args = self._validate_args
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        below = (self._lower(value) - self.loc) / self.scale
        width = self.width / self.scale
        # Each term is finite at every level, so that where() passes on no nan gradient.
        zero = torch.zeros_like(below)
        is_first, is_last = value <= 0, value >= self.levels - 1
        inside = torch.where(is_first | is_last, zero, torch.log(-torch.expm1(-width)))
        left = torch.where(is_last, zero, logsigmoid(below + width))
        right = torch.where(is_first, zero, logsigmoid(-below))
        return left + right + inside

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            eps = torch.finfo(self.loc.dtype).tiny
            drawn = self.loc + self.scale * torch.logit(uniform, eps=eps)
            return ((drawn + 1) / self.width).round().clamp(0, self.levels - 1)

    def _lower(self, level: Tensor | float) -> Any:
        """The lower end of a level's interval."""
        return (level - 0.5) * self.width - 1


class DiscretizedLogisticMixture(dist.MixtureSameFamily):
    """A mixture of :class:`DiscretizedLogistic`, over the last dim of its batch."""

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.component_distribution.support


class CategoricalLevels(dist.Categorical):
    """A categorical over numbers instead of names: floats 0, 1, ..., K - 1, which have a mean."""

    @property
    def mean(self) -> Tensor:
        levels = torch.arange(self.probs.shape[-1], dtype=self.probs.dtype).to(self.probs.device)
        return (self.probs * levels).sum(-1)

    @property
    def mode(self) -> Tensor:
        return super().mode.to(self.probs.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.probs.dtype)
