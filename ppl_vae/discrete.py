"""Discrete latents: conditionals that know by which estimator a gradient reaches them.

A gradient cannot pass through a discrete draw. What is done instead is a setting of the site's
conditional, ``estimator``:

- "enumerate": no draw; the objective sums over all values, which is exact, and costs as many runs
  of the decoder.
- "score": the score function, times what the draw brought (Williams 1992), which is unbiased but
  noisy; a baseline, which is subtracted from what it brought, takes noise away (Mnih & Gregor 2014,
  arXiv:1402.0030, section 2.3).
- "relaxed": a draw between the values, from which the gradient is taken as of any reparameterized
  draw: the Concrete or Gumbel-softmax distribution (Maddison et al. 2017, arXiv:1611.00712; Jang et
  al. 2017, arXiv:1611.01144). The objective is then that of another model, and nears that of the
  discrete one as the temperature falls; the gradient's noise grows.
- "straight-through": a discrete draw, by which all is computed, with the gradient of the relaxed
  one, which is biased (Bengio et al. 2013, arXiv:1308.3432; Jang et al. 2017, section 2.2).

Relaxed draws are scored by the discrete distribution, linearly (:mod:`ppl_vae.distributions`), not
by the Concrete density: q and p remain those of discrete values, so that their KL has its closed
form, and no density has to be relaxed with the draws. In evaluation mode (``module.eval()``) all
estimators draw discrete values, so that what is evaluated is the discrete model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional, join
from ppl_vae.distributions import BitVector, OneHotCategorical, one_hot
from ppl_vae.nn import MLP

Estimator = Literal["enumerate", "score", "relaxed", "straight-through"]
Baseline = Literal["average", "net", "both"]


class Discrete(Conditional):
    """A conditional of a discrete site: what :class:`Labels` and :class:`Bits` share.

    To implement: ``discrete`` and ``relaxed``, the distribution by the net's output.

    Args:
        net: gives the logits; its inputs are the joined context.
        estimator: by which a gradient reaches it, in a guide. In a model it makes no difference.
        baseline: of "score": "average", a running mean of what draws brought; "net", which
            predicts it from the context; "both", added; or None. It is learned with the guide, by
            its squared error, which TraceGraph_ELBO adds to the loss.
        temperature: of "relaxed" and "straight-through", positive.
        baseline_net: the net of the baseline, from the context to 1 output. None: one hidden layer
            of 100 units, as in Mnih & Gregor 2014.

    Raises:
        ValueError: an unknown estimator or baseline; a baseline of another estimator than "score";
            a temperature that is not positive and finite; a net that does not state its inputs,
            where a baseline's net is to be made for them.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        estimator: Estimator = "score",
        baseline: Baseline | None = None,
        temperature: float = 0.5,
        baseline_net: nn.Module | None = None,
    ) -> None:
        super().__init__(net)
        name = type(self).__name__
        check_estimator(name, estimator, baseline, temperature)
        if baseline_net is not None and baseline not in ("net", "both"):
            raise ValueError(
                f"{name}(baseline={baseline!r}, baseline_net={type(baseline_net).__name__}): "
                'a net goes with baseline="net" or "both"'
            )
        self.estimator = estimator
        self.temperature = temperature
        if baseline in ("net", "both") and baseline_net is None:
            baseline_net = MLP(_inputs(name, net), 100, 1, activation=nn.Tanh)
        self.baseline = (
            None
            if baseline is None
            else LearnedBaseline(baseline_net, average=baseline in ("average", "both"))
        )

    @abstractmethod
    def discrete(self, logits: Tensor) -> TorchDistribution:
        """The distribution, of discrete draws."""

    @abstractmethod
    def relaxed(self, logits: Tensor) -> TorchDistribution:
        """The distribution that draws with a gradient."""

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return (self.relaxed if self._relaxes else self.discrete)(parameters)

    def infer_of(self, *context: Tensor) -> dict[str, Any]:
        """What ``pyro.sample`` is told of the site: ``infer=``."""
        if self.estimator == "enumerate":
            return {"enumerate": "parallel"}
        if self._relaxes:
            return {"relaxed": True}
        if self.baseline is None:
            return {}
        learned = {"nn_baseline": self.baseline, "nn_baseline_input": join(*context).detach()}
        return {"baseline": learned}

    @property
    def _relaxes(self) -> bool:
        return self.training and self.estimator in ("relaxed", "straight-through")


class Labels(Discrete):
    """One-hot vectors, from the net's logits.

    Shapes: a net with K outputs gives batch ``(...)``, event ``(K,)``; with ``variables=N``, one
    with ``N * K`` outputs gives event ``(N, K)``.

    Args:
        net, settings: as :class:`Discrete`.
        variables: N, how many independent labels; None: one, without a dim for it.

    Raises:
        ValueError: as :class:`Discrete`; ``variables`` below 1; ``variables`` with estimator
            "enumerate"; when run, a number of outputs that they do not divide.
    """

    def __init__(self, net: nn.Module, *, variables: int | None = None, **settings: Any) -> None:
        super().__init__(net, **settings)
        if variables is not None and variables < 1:
            raise ValueError(f"Labels(variables={variables}): expected at least 1, or None for one")
        if variables is not None and self.estimator == "enumerate":
            raise ValueError(
                f'Labels(variables={variables}, estimator="enumerate"): the values of several '
                'variables together are too many to sum over; take another estimator, as "score"'
            )
        self.variables = variables

    def discrete(self, logits: Tensor) -> TorchDistribution:
        return self._event(OneHotCategorical(logits=self._by_variable(logits)))

    def relaxed(self, logits: Tensor) -> TorchDistribution:
        hard = self.estimator == "straight-through"
        return self._event(RelaxedOneHot(self._by_variable(logits), self.temperature, hard=hard))

    def _by_variable(self, logits: Tensor) -> Tensor:
        if self.variables is None:
            return logits
        if logits.shape[-1] % self.variables:
            raise ValueError(
                f"the net of Labels has {logits.shape[-1]} outputs; expected a multiple of the "
                f"{self.variables} variables: a logit for each class of each"
            )
        return logits.unflatten(-1, (self.variables, -1))

    def _event(self, fn: TorchDistribution) -> TorchDistribution:
        return fn if self.variables is None else fn.to_event(1)


class Bits(Discrete):
    """Vectors of independent bits, from the net's logits.

    With estimator "enumerate" all vectors are summed over, so that there may be few bits only.

    Shapes: a net with D outputs gives batch ``(...)``, event ``(D,)``.

    Args:
        net, settings: as :class:`Discrete`.

    Raises:
        ValueError: as :class:`Discrete`; when run, "enumerate" with more bits than
            :data:`ppl_vae.distributions.MOST_BITS`.
    """

    def discrete(self, logits: Tensor) -> TorchDistribution:
        return BitVector(logits)

    def relaxed(self, logits: Tensor) -> TorchDistribution:
        return RelaxedBits(logits, self.temperature, hard=self.estimator == "straight-through")


class IndependentBits(nn.Module):
    """A prior of bits, each with a probability of its own, which is learned; it starts near 1/2.

    Shapes: no context; batch ``()``, event ``(size,)``.

    Raises:
        ValueError: size below 1.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"IndependentBits({size}): expected at least 1 bit")
        self.logits = nn.Parameter(torch.empty(size).uniform_(-0.1, 0.1))

    def forward(self) -> TorchDistribution:
        return BitVector(self.logits)


class RelaxedOneHot(OneHotCategorical):
    """Gumbel-softmax draws of a one-hot vector, scored by the discrete distribution.

    ``softmax((log p + g) / temperature)`` with standard Gumbel noise g: Jang et al. 2017
    (arXiv:1611.01144), eq. 2; Maddison et al. 2017 (arXiv:1611.00712), eq. 10.

    Shapes: logits ``(..., K)``; batch ``(...)``, event ``(K,)``.

    Args:
        hard: draw the discrete value, with the gradient of the relaxed one.
    """

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, *, hard: bool = False) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.temperature, self.hard = temperature, hard

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> RelaxedOneHot:
        return cast(RelaxedOneHot, super().expand(torch.Size(batch_shape), _relaxed_copy(self)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.empty(shape, dtype=self.logits.dtype, device=self.logits.device)
        tiny = torch.finfo(noise.dtype).tiny
        scores = self.log_probs - noise.exponential_().clamp(min=tiny).log()
        soft = (scores / self.temperature).softmax(-1)
        if not self.hard:
            return soft
        return _with_gradient_of(one_hot(scores.argmax(-1), soft), soft)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class RelaxedBits(BitVector):
    """Binary Concrete draws of a vector of bits, scored by the discrete distribution.

    ``sigmoid((logits + l) / temperature)`` with standard logistic noise l: Maddison et al. 2017
    (arXiv:1611.00712), appendix B.

    Shapes: logits ``(..., D)``; batch ``(...)``, event ``(D,)``.

    Args:
        hard: draw the discrete value, with the gradient of the relaxed one.
    """

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, *, hard: bool = False) -> None:
        super().__init__(logits, validate_args=False)
        self.temperature, self.hard = temperature, hard

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> RelaxedBits:
        return cast(RelaxedBits, super().expand(torch.Size(batch_shape), _relaxed_copy(self)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        scores = self.logits + uniform.logit(eps=torch.finfo(uniform.dtype).tiny)
        soft = (scores / self.temperature).sigmoid()
        return _with_gradient_of((scores > 0).to(soft), soft) if self.hard else soft

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class LearnedBaseline(nn.Module):
    """What a draw is expected to bring: by a net of the context, a running mean, or their sum.

    As TraceGraph_ELBO's ``nn_baseline``, whose squared error is part of the loss. The mean takes in
    the errors that the backward pass shows: of what draws brought, less the net's share. It is one
    number: Pyro's own running mean is one of each position in the batch, so that it mixes the noise
    of single rows, and cannot take a last batch that is smaller.

    Shapes: context ``(..., inputs)`` to ``(...)``.

    Args:
        net: to 1 output, or None.
        average: whether there is a running mean.
        decay: what is left of it at each step, but for the first ones, which are averaged: a net
            that had to make up for a mean that starts at 0 would not recover from it.
    """

    mean: Tensor | None
    steps: Tensor

    def __init__(self, net: nn.Module | None, *, average: bool, decay: float = 0.9) -> None:
        super().__init__()
        self.net, self.decay = net, decay
        self.register_buffer("mean", torch.zeros(()) if average else None)
        self.register_buffer("steps", torch.zeros(()) if average else None)

    def forward(self, context: Tensor) -> Tensor:
        expected = context.new_zeros(context.shape[:-1])
        if self.net is not None:
            expected = self.net(context).to(context.dtype).squeeze(-1)
        if self.mean is not None:
            expected = expected + self.mean
            if torch.is_grad_enabled():
                if not expected.requires_grad:
                    expected.requires_grad_()
                expected.register_hook(self._learn)
        return expected

    def _learn(self, gradient: Tensor) -> None:
        assert self.mean is not None
        # The gradient of the squared error is -2 times the error.
        with torch.no_grad():
            self.steps.add_(1)
            share = (1 / self.steps).clamp(min=1 - self.decay)
            self.mean.add_(share * gradient.mean() / -2)


def infer_of(conditional: nn.Module, *context: Tensor) -> Any:
    """What ``pyro.sample`` is told of a site that a conditional draws; plain ones say nothing."""
    method = getattr(conditional, "infer_of", None)
    return {} if method is None else method(*context)


def check_estimator(
    name: str, estimator: str, baseline: str | None, temperature: float | None
) -> None:
    """Refuse settings of discrete sites that are out of range.

    Raises:
        ValueError: as :class:`Discrete`.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(
            f"{name}(estimator={estimator!r}): expected one of {', '.join(get_args(Estimator))}"
        )
    if baseline is not None and baseline not in get_args(Baseline):
        raise ValueError(
            f"{name}(baseline={baseline!r}): expected one of {', '.join(get_args(Baseline))}, or "
            "None"
        )
    if baseline is not None and estimator != "score":
        raise ValueError(
            f"{name}(estimator={estimator!r}, baseline={baseline!r}): a baseline goes with "
            'estimator="score"; the others have none'
        )
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(
            f"{name}(temperature={temperature}): expected a positive and finite number"
        )


def _with_gradient_of(hard: Tensor, soft: Tensor) -> Tensor:
    # In this order the value is exactly the hard one.
    return hard + (soft - soft.detach())


def _relaxed_copy(fn: Any) -> Any:
    """An instance to be expanded into, with a relaxed distribution's settings."""
    kind: Any = type(fn)
    copy = kind.__new__(kind)
    copy.temperature, copy.hard = fn.temperature, fn.hard
    return copy


def _inputs(name: str, net: nn.Module) -> int:
    stated = getattr(net, "inputs", None) or getattr(net, "in_features", None)
    if not isinstance(stated, int):
        raise ValueError(
            f"{name}: the net, {type(net).__name__}, does not state its inputs, so that no "
            "baseline's net can be made for them: give baseline_net, with 1 output"
        )
    return stated
