"""Bounds and gradients by importance weights, of each row its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae.objectives.rows import RowObjective, RowTerms
from ppl_vae.sites import PairError, sample_nodes


class IWAE(RowObjective):
    """The importance-weighted bound (Burda et al. 2016, arXiv:1509.00519, eq. 8).

        E log 1/K sum_k p(x, z_k) / q(z_k | x),  z_k ~ q(z | x)

    A log-mean-exp over the draws of each row; K = 1 is the ELBO. Latents' log-ratios are multiplied
    by a warm-up's weight.

    Args:
        draws: K.

    Raises:
        ValueError: draws below 1.
        PairError: when run, of a latent outside the plate of rows, whose weight is no row's.
    """

    def loss_of(self, terms: RowTerms) -> Tensor:
        _refuse_shared(self, terms)
        return -terms.sum(_log_mean_exp(terms.log_weights))


class _Pathwise(RowObjective):
    """A bound whose gradient reaches the guide through its draws alone.

    The score of the guide's own parameters has mean 0, or is turned into a path derivative, so only
    its noise is lost. The gradient that arrives at the draws is reweighted before it goes on into
    the guide.

    To implement: ``bound`` of log importance weights ``(K, rows)``, and ``weights``, of each draw,
    for the gradient of the model's parameters and for that of the guide's.

    The guide is run a second time, to score its draws as values: it must be able to.
    """

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each row: ``(rows,)``."""

    @abstractmethod
    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(K, rows)`` of draws: for the model's gradient; for the guide's besides."""

    def loss_of(self, terms: RowTerms) -> Tensor:
        _refuse_shared(self, terms)
        return -terms.sum(self.bound(terms.log_weights))

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().differentiable_loss(model, guide, *args, **kwargs)
        drawn = poutine.trace(self.plate(guide)).get_trace(*args, **kwargs)
        besides: list[Tensor] = []  # known when the backward pass begins

        def tied(value: Tensor) -> Tensor:
            value = value.view_as(value)
            value.register_hook(lambda gradient: _of_draws(besides[0], gradient) * gradient)
            return value

        leaves = _with_values(drawn, lambda value: value.detach().requires_grad_())
        scored = poutine.trace(poutine.replay(self.plate(guide), trace=leaves))
        given = _with_values(drawn, lambda value: tied(value) if value.requires_grad else value)
        replayed = poutine.trace(poutine.replay(self.plate(model), trace=given))
        terms = RowTerms(replayed.get_trace(*args, **kwargs), scored.get_trace(*args, **kwargs))
        log_weights = terms.log_weights.detach()
        of_model, of_guide = self.weights(log_weights)
        besides.append(of_guide)
        scaled = of_model * terms.scale
        log_p = terms.reconstruction + sum(w * terms.log_p[n] for n, w in terms.weights.items())
        log_q = torch.as_tensor(sum(w * terms.log_q[n] for n, w in terms.weights.items()))
        surrogate = (scaled * log_p).sum()
        # At the draws log q counts; in the parameters that it is computed from it does not.
        names = list(terms.log_q)
        slopes = torch.autograd.grad(
            (scaled * log_q).sum(), [leaves.nodes[name]["value"] for name in names]
        )
        for name, slope in zip(names, slopes, strict=True):
            surrogate -= (_of_draws(of_guide, slope) * slope * drawn.nodes[name]["value"]).sum()
        # The loss's value, with the surrogate's gradient.
        return self.loss_of(terms).detach() - (surrogate - surrogate.detach())


class StickingTheLanding(_Pathwise):
    """The ELBO by its path derivative (Roeder et al. 2017, arXiv:1703.09194, eq. 8).

    The gradient of the ELBO without the score function of the guide, whose mean is 0: its variance
    vanishes where the guide is the exact posterior.

    Args:
        draws: over which the ELBO and its gradient are averaged.

    Raises: as :class:`IWAE`.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(log_weights, 1 / self.draws), torch.ones_like(log_weights)


class DReG(_Pathwise):
    """IWAE by its doubly reparameterized gradient (Tucker et al. 2019, arXiv:1810.04152, eq. 8).

    The importance-weighted bound of :class:`IWAE`; the gradient of the guide's parameters goes
    through the draws, each by the square of its normalized weight, so that more draws help it.

    Args:
        draws: K.

    Raises: as :class:`IWAE`.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return _log_mean_exp(log_weights)

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        normalized = log_weights.softmax(0)
        return normalized, normalized


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


def _with_values(trace: Trace, make: Callable[[Tensor], Tensor]) -> Trace:
    """A trace whose draws are made from those of another."""
    changed = trace.copy()
    for name, node in sample_nodes(trace):
        changed.nodes[name] = node | {"value": make(node["value"])}
    return changed


def _of_draws(weights: Tensor, values: Tensor) -> Tensor:
    """Weights ``(K, rows)`` beside values ``(K, rows, event)``."""
    return weights.reshape(*weights.shape, *(1,) * (values.dim() - weights.dim()))


def _refuse_shared(objective: RowObjective, terms: RowTerms) -> None:
    beyond = [n["name"] for n in terms.guide_nodes.values() if n["name"] not in terms.log_q]
    if beyond:
        raise PairError(
            f"{type(objective).__name__}: latent {beyond[0]!r} stands outside the plate of rows, "
            "so its importance weight is no row's; take an ELBO"
        )
