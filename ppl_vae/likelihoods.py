"""Likelihoods: conditionals that emit an observation from the decoder's context.

All have event ``(D,)``; a net has D outputs, or as many times D as an entry has parameters. Which
to take: bits, :class:`Bernoulli`; counts up to a known number, :class:`Binomial`; real numbers,
:class:`Gaussian`, :class:`Laplace`, or with a predicted scale
:class:`ppl_vae.conditionals.Normal`; grey values in [0, 1], :class:`ContinuousBernoulli`; bytes
as they are, undivided (``unit`` 1), :class:`DiscretizedLogistic`, its mixture, or
:class:`Categorical`. Published bits per dimension of images are those of the last three.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae import distributions
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


class FixedScale(Conditional):
    """Real numbers around the net's locations, with a scale that does not depend on the context.

    To implement: ``family``, a distribution of location and scale.

    Args:
        net: gives the locations.
        scale: in the data's unit: a number for one scale, or a tensor ``(D,)`` for a scale a
            pixel.
        learned: whether ``scale`` is where learning starts, or fixed.

    Raises:
        ValueError: a scale that is not positive and finite.
    """

    family: type[Any]
    log_scale: Tensor

    def __init__(
        self, net: nn.Module, scale: float | Tensor = 1.0, *, learned: bool = False
    ) -> None:
        super().__init__(net)
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(
                f"{type(self).__name__}(scale={scale}): expected positive and finite numbers"
            )
        if learned:
            self.log_scale = nn.Parameter(scale.log())
        else:
            self.register_buffer("log_scale", scale.log())

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return self.family(parameters, self.log_scale.exp()).to_event(1)


class Gaussian(FixedScale):
    """Real numbers; the scale is the standard deviation. See :class:`FixedScale`."""

    family = dist.Normal


class Laplace(FixedScale):
    """Real numbers with heavier tails: ``exp(-|x - loc| / scale) / (2 scale)``.

    The scale is the mean absolute deviation. See :class:`FixedScale`.
    """

    family = dist.Laplace


class DiscretizedLogistic(Conditional):
    """Levels, from a logistic rounded to them: whole numbers from 0 to ``levels - 1``.

    The net gives D locations, then the D logarithms of the scales, both in the unit in which level
    k is ``2 k / (levels - 1) - 1``, so that the data lie in [-1, 1]. A scale is held between a 16th
    of a level's width, at which a level has a probability of at most 0.9993, and e^7: no
    observation is then so improbable that float32 cannot hold it. Source: Salimans et al. 2017
    (arXiv:1701.05517), section 2.1.

    Raises:
        ValueError: ``levels`` below 2; a net whose number of outputs is odd.
    """

    def __init__(self, net: nn.Module, levels: int = 256) -> None:
        super().__init__(net)
        self.levels = _checked_levels(self, levels)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        loc, log_scale = _kinds(self, parameters, 2).unbind(-2)
        return _discretized_logistic(loc, log_scale, self.levels).to_event(1)


class DiscretizedLogisticMixture(Conditional):
    """Levels, each entry from a mixture of its own of rounded logistics.

    The net gives ``3 * components * D`` numbers: the mixtures' logits, then locations, then log
    scales (as :class:`DiscretizedLogistic`), of each the D of the first component first. Entries
    are independent given the context: eq. 2 of Salimans et al. 2017 (arXiv:1701.05517), without
    eq. 3, which lets a pixel's green depend on its red, and its blue on both.

    Raises:
        ValueError: ``levels`` below 2, ``components`` below 1; a net whose number of outputs is no
            multiple of ``3 * components``.
    """

    def __init__(self, net: nn.Module, components: int, levels: int = 256) -> None:
        super().__init__(net)
        if components < 1:
            raise ValueError(
                f"DiscretizedLogisticMixture(components={components}): expected at least 1"
            )
        self.components = components
        self.levels = _checked_levels(self, levels)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        kinds = _kinds(self, parameters, 3 * self.components).transpose(-1, -2)
        logits, loc, log_scale = kinds.chunk(3, -1)  # (..., D, components)
        return distributions.DiscretizedLogisticMixture(
            dist.Categorical(logits=logits), _discretized_logistic(loc, log_scale, self.levels)
        ).to_event(1)


class Categorical(Conditional):
    """Levels with a probability each, whatever their order: whole numbers from 0 to ``levels - 1``.

    The net gives ``levels * D`` logits, the D of level 0 first. Source: van den Oord et al. 2016
    (arXiv:1601.06759), section 3.4.

    Raises:
        ValueError: ``levels`` below 2; a net whose number of outputs is no multiple of it.
    """

    def __init__(self, net: nn.Module, levels: int = 256) -> None:
        super().__init__(net)
        self.levels = _checked_levels(self, levels)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        logits = _kinds(self, parameters, self.levels).transpose(-1, -2)
        return distributions.CategoricalLevels(logits=logits).to_event(1)


def _discretized_logistic(
    loc: Tensor, log_scale: Tensor, levels: int
) -> distributions.DiscretizedLogistic:
    least = math.log(2 / (levels - 1) / 16)
    return distributions.DiscretizedLogistic(loc, log_scale.clamp(least, 7.0).exp(), levels)


def _checked_levels(likelihood: Conditional, levels: int) -> int:
    if levels < 2:
        raise ValueError(f"{type(likelihood).__name__}(levels={levels}): expected at least 2")
    return levels


def _kinds(likelihood: Conditional, parameters: Tensor, kinds: int) -> Tensor:
    """``(..., kinds * D)`` as ``(..., kinds, D)``: kinds outermost, as a ConvDecoder gives them."""
    if parameters.shape[-1] % kinds:
        raise ValueError(
            f"the net of {type(likelihood).__name__} has {parameters.shape[-1]} outputs; expected "
            f"a multiple of {kinds}, the number of parameters of each entry"
        )
    return parameters.unflatten(-1, (kinds, -1))
