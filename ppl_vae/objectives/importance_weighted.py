"""Bounds and gradients by importance weights, of each row its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import Number, RowTerms
from ppl_vae.sites import PairError, sample_nodes


class IWAE(RowObjective):
    """The importance-weighted bound (Burda et al. 2016, arXiv:1509.00519, eq. 8).

        E log 1/K sum_k p(x, z_k) / q(z_k | x),  z_k ~ q(z | x)

    A log-mean-exp over the draws of each row; K = 1 is the ELBO. Latents' log-ratios are multiplied
    by a warm-up's weight.

    An enumerated site is summed out of each weight, ``sum_y p(x, y, z_y) / q(z_y | x, y)``, in
    which the guide's probabilities of its values have no part: what gives them learns nothing here.

    Args:
        draws: K.

    Raises:
        ValueError: draws below 1.
        PairError: when run, of a latent outside the plate of rows, whose weight is no row's, or
            without latents.
    """

    def loss_of(self, terms: RowTerms) -> Tensor:
        check_weighable(self, terms)
        return -terms.sum(log_mean_exp(terms.log_weights)) - terms.shared


class _Pathwise(RowObjective):
    """A bound whose gradient reaches the guide through its draws alone.

    The score of the guide's own parameters has mean 0, or is turned into a path derivative, so only
    its noise is lost.

    To implement: ``bound`` of log importance weights ``(K, rows)``; ``shares``, its slope by them;
    and ``through``, by what the gradient is multiplied that goes on from a draw into the guide.

    The guide has to score its draws as values, apart from how it drew them.
    """

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each row: ``(rows,)``."""

    @abstractmethod
    def shares(self, log_weights: Tensor) -> Tensor:
        """What each draw has in the bound of its row: ``(K, rows)``."""

    @abstractmethod
    def through(self, shares: Tensor, weight: Number) -> Number:
        """For draws ``(K, rows)`` of a site whose log-ratio has a weight in the bound."""

    def loss_of(self, terms: RowTerms) -> Tensor:
        check_weighable(self, terms)
        return -terms.sum(self.bound(terms.log_weights)) - terms.shared

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().differentiable_loss(model, guide, *args, **kwargs)
        try:
            with _Cut() as cut:
                scored = poutine.trace(self.plate(guide)).get_trace(*args, **kwargs)
            leaves = list(cut.leaves.values())
            through: list[Number] = []  # known when the backward pass begins
            draws = _Joined.apply(through, leaves, *cut.drawn.values())
            joined = dict(zip(cut.drawn, draws, strict=True))
            replayed = poutine.trace(poutine.replay(self.plate(model), trace=_with(scored, joined)))
            model_trace = replayed.get_trace(*args, **kwargs)
            for trace in (scored, model_trace):
                self._refuse_enumerated(trace)
            terms = RowTerms(model_trace, scored)
        except NotImplementedError as error:
            raise PairError(f"{type(self).__name__} scores draws as values: {error}") from error
        loss = self.loss_of(terms)
        shares = self.shares(terms.log_weights.detach())
        through += [self.through(shares, terms.weights[name]) for name in cut.drawn]
        weighted = shares * terms.scale
        latent = terms.weights.items()
        log_p = sum((w * terms.log_p[name] for name, w in latent), terms.reconstruction)
        log_q = sum((w * terms.log_q[name] for name, w in latent), torch.zeros_like(shares))
        surrogate = (weighted * log_p).sum() + terms.shared
        # At the draws log q counts; in the parameters that it is computed from it does not.
        slopes = torch.autograd.grad((weighted * log_q).sum(), leaves, retain_graph=True)
        for value, slope in zip(draws, slopes, strict=True):
            surrogate = surrogate - (slope * value).sum()
        # The loss's value, with the surrogate's gradient.
        return loss.detach() - (surrogate - surrogate.detach())

    def _refuse_enumerated(self, trace: Trace) -> None:
        for name, node in sample_nodes(trace):
            if node["infer"].get("enumerate") and not node["is_observed"]:
                raise PairError(
                    f"site {name!r} is enumerated: {type(self).__name__} draws every latent; take "
                    "IWAE or EnumeratedELBO, or draw the site in the guide"
                )


class StickingTheLanding(_Pathwise):
    """The ELBO by its path derivative (Roeder et al. 2017, arXiv:1703.09194, eq. 8).

    The gradient of the ELBO without the score function of the guide, whose mean is 0: its variance
    vanishes where the guide is the exact posterior.

    Args:
        draws: over which the ELBO and its gradient are averaged.

    Raises: as :class:`IWAE`; and PairError, when run, of a guide that cannot score its draws as
        values, such as a planar flow.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def shares(self, log_weights: Tensor) -> Tensor:
        return torch.full_like(log_weights, 1 / self.draws)

    def through(self, shares: Tensor, weight: Number) -> Number:
        return 1.0


class DReG(_Pathwise):
    """IWAE by its doubly reparameterized gradient (Tucker et al. 2019, arXiv:1810.04152, eq. 8).

    The importance-weighted bound of :class:`IWAE`; the gradient of the guide's parameters goes
    through the draws, each by the square of its normalized weight, so that more draws help it.
    Several sites are one draw, of the guide's joint density. Under a warm-up, whose weight w makes
    the bound one of other ratios, the square of v becomes ``(1 - w) v + w v^2``.

    Args:
        draws: K.

    Raises: as :class:`StickingTheLanding`.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_mean_exp(log_weights)

    def shares(self, log_weights: Tensor) -> Tensor:
        return log_weights.softmax(0)

    def through(self, shares: Tensor, weight: Number) -> Number:
        return 1 - weight * (1 - shares)


class _Cut(Messenger):
    """Cuts the draws of a program off what they are computed from: the program goes on with leaves
    of the same values.

    Attributes:
        drawn: the draws as they were made, by site: of the program's parameters, and of the leaves
            of the draws before.
        leaves: by site, in the same order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["is_observed"] or site_is_subsample(msg) or not value.is_floating_point():
            return
        self.drawn[msg["name"]] = value
        self.leaves[msg["name"]] = msg["value"] = value.detach().requires_grad_()


class _Joined(torch.autograd.Function):
    """Draws that were cut off one another, joined again: the gradient at one goes on to those that
    it was drawn from, and then, multiplied by ``through``, into the program."""

    @staticmethod
    def forward(
        ctx: Any, through: Sequence[Number], leaves: Sequence[Tensor], *drawn: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.through, ctx.leaves, ctx.drawn = through, leaves, drawn
        return tuple(value.view_as(value) for value in drawn)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = list(gradients)
        for last in range(len(total) - 1, 0, -1):
            if not ctx.drawn[last].requires_grad:
                continue
            earlier = torch.autograd.grad(
                ctx.drawn[last],
                ctx.leaves[:last],
                total[last],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total[:last] = map(torch.add, total[:last], earlier)
        pairs = zip(ctx.through, total, strict=True)
        return (None, None, *(_of_draws(factor, gradient) * gradient for factor, gradient in pairs))


def _of_draws(factor: Number, values: Tensor) -> Number:
    """Numbers ``(K, rows)`` as they stand beside values ``(K, rows, event)``."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.reshape(*factor.shape, *(1,) * (values.dim() - factor.dim()))


def _with(trace: Trace, values: dict[str, Tensor]) -> Trace:
    """A trace with other values."""
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = trace.nodes[name] | {"value": value}
    return changed


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Over draws ``(K, rows)``: ``(rows,)``."""
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


def check_weighable(objective: RowObjective, terms: RowTerms) -> None:
    """Refuse what has no importance weight of a row.

    Raises:
        PairError: a latent outside the plate of rows, or no latent.
    """
    name = type(objective).__name__
    beyond = [n["name"] for n in terms.guide_nodes.values() if n["name"] not in terms.log_q]
    if beyond:
        raise PairError(
            f"{name}: latent {beyond[0]!r} stands outside the plate of rows, so its importance "
            "weight is no row's; take an ELBO"
        )
    if not terms.log_q:
        raise PairError(f"{name} weighs draws, and the model has no latent; take an ELBO")
