"""Likelihoods: conditionals that emit an observation from the decoder's context.

All have event ``(D,)`` for a net with D outputs. Which to take: bits, :class:`Bernoulli`; counts
up to a known number, :class:`Binomial`; real numbers, :class:`Gaussian`, or with a predicted scale
:class:`ppl_vae.conditionals.Normal`; grey values in [0, 1], :class:`ContinuousBernoulli`.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional


class Bernoulli(Conditional):
    """Bits, from the net's logits."""

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=parameters).to_event(1)


class Binomial(Conditional):
    """Counts from 0 to ``total_count``, from the net's logits.

    Raises:
        ValueError: total_count below 1.
    """

    def __init__(self, net: nn.Module, total_count: int) -> None:
        super().__init__(net)
        if total_count < 1:
            raise ValueError(f"Binomial(total_count={total_count}): expected at least 1")
        self.total_count = total_count

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return dist.Binomial(self.total_count, logits=parameters).to_event(1)


class ContinuousBernoulli(Conditional):
    """Real numbers in [0, 1], from the net's logits.

    Source: Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845, eq. 8: a Bernoulli's density
    with the normalizing constant that makes it one on [0, 1].
    """

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return dist.ContinuousBernoulli(logits=parameters).to_event(1)


class Gaussian(Conditional):
    """Real numbers with a scale that does not depend on the context.

    Args:
        net: gives the locations.
        scale: standard deviation, in the data's unit: a number for one scale, or a tensor
            ``(D,)`` for a scale a pixel.
        learned: whether ``scale`` is where learning starts, or fixed.

    Raises:
        ValueError: a scale that is not positive and finite.
    """

    log_scale: Tensor

    def __init__(
        self, net: nn.Module, scale: float | Tensor = 1.0, *, learned: bool = False
    ) -> None:
        super().__init__(net)
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(f"Gaussian(scale={scale}): expected positive and finite numbers")
        if learned:
            self.log_scale = nn.Parameter(scale.log())
        else:
            self.register_buffer("log_scale", scale.log())

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return dist.Normal(parameters, self.log_scale.exp()).to_event(1)
