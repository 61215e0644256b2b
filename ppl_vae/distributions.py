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
from torch.distributions.kl import register_kl
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, softplus


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


MOST_BITS = 10
"""Longest vector of bits whose values, 2 to the power of its length, can be listed."""


class OneHotCategorical(dist.OneHotCategorical):
    """A one-hot vector, whose log-probability is linear in it: ``sum_k value_k log p_k``.

    At one-hot values that is the log-probability. At other points of the simplex, such as a relaxed
    draw, it is their mean by the point's entries, through which a gradient reaches the point.

    Shapes: probs or logits ``(..., K)`` give batch ``(...)``, event ``(K,)``.
    """

    @property
    def log_probs(self) -> Tensor:
        """Of the K values, ``(..., K)``: finite, so that a value of 0 takes no part."""
        return self.logits.clamp(min=torch.finfo(self.logits.dtype).min)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            drawn = self._categorical.sample(torch.Size(sample_shape))
            return one_hot(drawn, self.probs)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            _check_values(self, value, constraints.simplex)
        return (value * self.log_probs).sum(-1)


class BitVector(TorchDistribution):
    """Independent bits as one site, whose log-probability is linear in each of them.

    Unlike ``Bernoulli(...).to_event(1)`` it scores values between 0 and 1, as relaxed draws have
    (each by its mean over the bit), and lists its values: of D bits, all ``2 ** D`` vectors.

    Shapes: logits ``(..., D)`` give batch ``(...)``, event ``(D,)``.

    Raises:
        ValueError: when its values are listed, more than ``MOST_BITS`` bits.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {  # pyright: ignore
        "logits": constraints.real_vector
    }
    support = constraints.independent(constraints.boolean, 1)  # pyright: ignore
    has_rsample = False
    has_enumerate_support = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    @property
    def probs(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        return self.probs

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits)

    @property
    def variance(self) -> Tensor:
        return self.probs * (1 - self.probs)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BitVector:
        expanded = type(self).__new__(type(self)) if _instance is None else _instance
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        BitVector.__init__(expanded, logits, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            probs = self.probs.expand(self._extended_shape(torch.Size(sample_shape)))
            return torch.bernoulli(probs)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            _check_values(self, value, constraints.independent(constraints.unit_interval, 1))
        return (value * self.logits - softplus(self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.probs * self.logits - softplus(self.logits)).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        (bits,) = self.event_shape
        if bits > MOST_BITS:
            raise ValueError(
                f"a vector of {bits} bits has 2 ** {bits} values, too many to sum over: expected "
                f'at most {MOST_BITS} bits; take another estimator, such as "score"'
            )
        numbers = torch.arange(2**bits, device=self.logits.device).unsqueeze(-1)
        powers = 2 ** torch.arange(bits, device=self.logits.device)
        values = (numbers // powers % 2).to(self.logits)
        values = values.reshape(-1, *(1,) * len(self.batch_shape), bits)
        return values.expand(-1, *self.batch_shape, -1) if expand else values


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """One-hot vectors ``(..., K)`` of indices ``(...)``; K, dtype and device are those of ``like``.

    torch's own looks whether the indices are in their range, which no recorded step can.
    """
    zeros = torch.zeros(*index.shape, like.shape[-1], dtype=like.dtype, device=like.device)
    return zeros.scatter(-1, index.unsqueeze(-1), 1.0)


@register_kl(OneHotCategorical, OneHotCategorical)
def _kl_one_hot(q: OneHotCategorical, p: OneHotCategorical) -> Tensor:
    # torch's own rule assigns where p is 0, which is no operation of a recorded graph.
    return (q.probs * (q.log_probs - p.log_probs)).sum(-1)


@register_kl(BitVector, BitVector)
def _kl_bits(q: BitVector, p: BitVector) -> Tensor:
    ahead = q.probs * (q.logits - p.logits)
    return (ahead - softplus(q.logits) + softplus(p.logits)).sum(-1)


def _check_values(fn: Any, value: Tensor, domain: Constraint) -> None:
    """As ``validate_args`` does, of a domain that is wider than the support."""
    if value.shape[-1:] != fn.event_shape or not domain.check(value).all():
        raise ValueError(
            f"{type(fn).__name__}: a value of shape {tuple(value.shape)} with entries from "
            f"{value.min():g} to {value.max():g}; expected {fn.event_shape[0]} entries, one-hot or "
            "bits, or numbers between them for relaxed values"
        )
