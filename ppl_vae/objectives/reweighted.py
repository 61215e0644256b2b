"""Wake-sleep: a guide learns the posterior from weighted draws, and from the model's dreams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.objectives.importance_weighted import log_mean_exp
from ppl_vae.objectives.objective import beside
from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.objectives.score_function import check_draws
from ppl_vae.sites import PairError, sample_nodes


class ReweightedWakeSleep(RowObjective):
    """Reweighted wake-sleep (Bornschein & Bengio 2015, arXiv:1406.2751).

    No gradient passes through a draw, nor is the score function multiplied by anything noisy; model
    and guide have an objective each, by K draws with normalized weights ``v_k``:

        model            sum_k v_k log p(x, z_k)
        guide, awake     sum_k v_k log q(z_k | x)
        guide, asleep    log q(z | x),  (x, z) drawn from the model

    Section 2 of the paper. The guide's objectives are -KL(p(z | x) || q(z | x)), of the data and of
    the model's x. The loss is that of :class:`~ppl_vae.objectives.IWAE`, whose gradient by the
    model this is; the guide's is biased, as the weights are, by the order of 1/K. Under a warm-up
    the weights are those of the annealed ratios.

    Args:
        draws: K, at least 2.
        wake, sleep: weights of the guide's two objectives, not negative. The paper takes both;
            asleep alone it is wake-sleep, in which a guide learns nothing of the data's own x.

    Raises:
        ValueError: draws below 2; weights that are negative, not finite, or both 0.
        PairError: when run, as :class:`~ppl_vae.objectives.VIMCO`; of a guide that cannot score its
            draws as values; with ``sleep``, of an observable that the model changes before it
            observes it, so that a draw cannot take its place.
    """

    def __init__(self, draws: int = 5, *, wake: float = 1.0, sleep: float = 0.0) -> None:
        if draws < 2:
            raise ValueError(
                f"ReweightedWakeSleep(draws={draws}): expected at least 2, since a single draw has "
                "weight 1"
            )
        if not (0 <= wake < math.inf and 0 <= sleep < math.inf and wake + sleep > 0):
            raise ValueError(
                f"ReweightedWakeSleep(wake={wake}, sleep={sleep}): expected numbers of at least 0, "
                "one of them above"
            )
        super().__init__(draws)
        self.wake, self.sleep = wake, sleep

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "wake": self.wake, "sleep": self.sleep}

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        try:
            traces = self._get_trace(model, _Detached()(guide), args, kwargs)
            terms = RowTerms(*traces, reparameterized=False)
        except NotImplementedError as error:
            raise PairError(f"{type(self).__name__} scores draws as values: {error}") from error
        loss = self.loss_of(terms)
        if self.sleep and torch.is_grad_enabled():
            dreamt = self.sleep * (terms.scale * _dream(model, guide, terms, args, kwargs)).sum()
            loss = loss - (dreamt - dreamt.detach())
        return loss

    def loss_of(self, terms: RowTerms) -> Tensor:
        check_draws(self, terms)
        log_weights = terms.log_weights.detach()
        shares = log_weights.softmax(0)
        log_p = sum((w * terms.log_p[n] for n, w in terms.weights.items()), terms.reconstruction)
        log_q = sum(terms.log_q.values(), torch.zeros_like(shares))
        learned = (shares * (log_p + self.wake * log_q)).sum(0)
        return -terms.sum(log_mean_exp(log_weights) + learned - learned.detach())


class _Detached(Messenger):
    """Cuts the draws of a program off its parameters."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["value"] = msg["value"].detach()


def _dream(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    terms: RowTerms,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """log q of the latents of as many rows as the batch has, drawn from the model: ``(rows,)``."""
    with torch.no_grad(), beside():
        dreams = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    drawn = {name: node["value"] for name, node in sample_nodes(dreams)}
    observed = {n: node["value"] for n, node in terms.model_nodes.items() if node["is_observed"]}
    for name, value in observed.items():
        if not any(value is given for given in (*args, *kwargs.values())):
            raise PairError(
                f"ReweightedWakeSleep(sleep=): the model observes {name!r} as another tensor than "
                "it was given, so that the guide cannot be given a draw of it: observe the "
                "argument as it is, or take sleep=0"
            )

    def dreamt(given: Any) -> Any:
        return next((drawn[name] for name, value in observed.items() if value is given), given)

    latents = {name: drawn[name] for name in terms.log_q}
    with beside():
        scored = poutine.trace(poutine.condition(guide, latents)).get_trace(
            *map(dreamt, args), **{name: dreamt(given) for name, given in kwargs.items()}
        )
    nodes = dict(sample_nodes(scored))
    return sum(
        (nodes[name]["fn"].log_prob(latents[name]) for name in latents),
        torch.zeros_like(terms.reconstruction[0]),
    )
