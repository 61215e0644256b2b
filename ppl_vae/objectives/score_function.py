"""Bounds of several draws whose gradients need no reparameterization: each draw judged by the
others."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_vae.objectives.importance_weighted import check_weighable, log_mean_exp
from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.sites import PairError


class ByOthers(RowObjective):
    """A bound of K draws with the score function's gradient, in which the other draws of a row are
    the baseline of each: nothing has to be learned for it.

        grad B(w) + sum_k a_k grad log q(z_k),  a_k what draw k brought beyond the others

    Sites that are reparameterized have no share in log q here: their gradient goes through B.

    To implement: ``bound`` of log importance weights, and ``advantages``.
    """

    def __init__(self, draws: int = 2) -> None:
        if draws < 2:
            raise ValueError(
                f"{type(self).__name__}(draws={draws}): expected at least 2, since each draw is "
                "judged by the others"
            )
        super().__init__(draws)

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each row, ``(rows,)``, of ``(K, rows)``."""

    @abstractmethod
    def advantages(self, log_weights: Tensor) -> Tensor:
        """What each draw brought beyond what the others would lead one to expect: ``(K, rows)``."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        traces = self._get_trace(model, guide, args, kwargs)
        return self.loss_of(RowTerms(*traces, reparameterized=False))

    def loss_of(self, terms: RowTerms) -> Tensor:
        check_draws(self, terms)
        log_weights = terms.log_weights
        advantages = self.advantages(log_weights.detach())
        scored = (
            log_q
            for name, log_q in terms.log_q.items()
            if not terms.guide_nodes[name]["fn"].has_rsample
        )
        score = (advantages * sum(scored, torch.zeros_like(advantages))).sum(0)
        # The bound's value, with the gradient of both.
        return -terms.sum(self.bound(log_weights) + score - score.detach())


class LeaveOneOut(ByOthers):
    """The ELBO of K draws by the score function, with the mean of the other draws as baseline.

    The advantage of a draw is ``(log w_k - mean_{j != k} log w_j) / K``. Source: Kool et al.
    2019 (Buy 4 REINFORCE samples, get a baseline for free); of a bound of several draws, Mnih &
    Rezende 2016 (arXiv:1602.06725).

    Args:
        draws: K, at least 2.

    Raises:
        ValueError: draws below 2.
        PairError: when run, as :class:`~ppl_vae.objectives.IWAE`; of enumerated sites.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def advantages(self, log_weights: Tensor) -> Tensor:
        return (log_weights - mean_of_others(log_weights)) / len(log_weights)


class VIMCO(ByOthers):
    """The importance-weighted bound by the score function (Mnih & Rezende 2016, arXiv:1602.06725).

    The bound of :class:`~ppl_vae.objectives.IWAE`. The advantage of a draw is the bound, less the
    bound in which its weight is replaced by the geometric mean of the others'.

    Args:
        draws: K, at least 2.

    Raises: as :class:`LeaveOneOut`.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_mean_exp(log_weights)

    def advantages(self, log_weights: Tensor) -> Tensor:
        own = torch.eye(len(log_weights), dtype=torch.bool, device=log_weights.device)
        # (k, j, rows): the weights j as they are, but for that of draw k.
        replaced = torch.where(
            own.unsqueeze(-1), mean_of_others(log_weights).unsqueeze(1), log_weights.unsqueeze(0)
        )
        without = replaced.logsumexp(1) - math.log(len(log_weights))
        return log_mean_exp(log_weights) - without


def mean_of_others(values: Tensor) -> Tensor:
    """Of each draw, the mean of the others: ``(K, rows)``."""
    return (values.sum(0) - values) / (len(values) - 1)


def check_draws(objective: RowObjective, terms: RowTerms) -> None:
    """Refuse what is no weight of one draw.

    Raises:
        PairError: a latent outside the plate of rows; no latent; enumerated sites.
    """
    check_weighable(objective, terms)
    if terms.enumeration.probabilities is not None:
        summed = [*terms.enumeration.drawn, *terms.enumeration.marginal]
        raise PairError(
            f"{type(objective).__name__} scores draws, and {summed[0]!r} is enumerated: draw it in "
            'the guide (estimator="score"), or take an ELBO'
        )
