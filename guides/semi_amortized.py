"""Semi-amortized: mean field that starts where the encoder says, then climbs each row's ELBO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.centers import AtCenters
from ppl_vae.conditionals import constrained, positive
from ppl_vae.guide import AmortizedGuide, unconstrained_size
from ppl_vae.model import ROWS, GenerativeModel, by_name, own_parameters
from ppl_vae.sites import PairError, read_sites


class SemiAmortized(AmortizedGuide):
    """A diagonal normal whose parameters take gradient steps on the ELBO, inside the guide.

        l_0 = encoder(x),  l_k+1 = l_k + rate * grad ELBO(l_k),  u ~ Normal(m, s) of l_K

    A row's l is the location m, then the pre-softplus scale, of the unconstrained coordinates u of
    all sites. Gradients flow through the steps to the encoder, the model and the rate. Source: Kim
    et al. 2018 (arXiv:1802.02550), algorithm 1, without momentum.

    Unlike there, the ELBO of a step is the mean over two points ``m +- s e``, with signs e drawn
    when the guide is made: right in mean and variances, and q(z | x) stays a function of x. Global
    latents stand at their guide's center, so that rows are refined once for all particles. It is
    the plain ELBO, whatever weights the objective has. A step costs two runs of the model and back.

    Args:
        model, encoder, args, kwargs: as :class:`~ppl_vae.guide.AmortizedGuide`.
        steps: K.
        learning_rate: the rate; steps overshoot where it exceeds twice a posterior variance.
        learned: whether that is where learning starts, or fixed.
        max_grad_norm: longer gradients of a row are shortened to this; None: never.

    Raises:
        ValueError: ``steps`` below 1, or a rate or a norm that is not positive and finite.
        PairError: as :class:`~ppl_vae.guide.AmortizedGuide`; the model enumerates a site.
    """

    signs: Tensor
    log_rate: Tensor

    def __init__(
        self,
        model: GenerativeModel,
        encoder: nn.Module,
        *args: Tensor | None,
        steps: int = 5,
        learning_rate: float = 0.01,
        learned: bool = True,
        max_grad_norm: float | None = 5.0,
        **kwargs: Tensor | None,
    ) -> None:
        most = 1.0 if max_grad_norm is None else max_grad_norm
        if steps < 1 or not (0 < learning_rate < math.inf and 0 < most < math.inf):
            got = f"{steps=}, {learning_rate=}, {max_grad_norm=}"
            raise ValueError(f"SemiAmortized({got}): expected positive and finite numbers")
        super().__init__(model, encoder, *args, **kwargs)
        sites = read_sites(model, **by_name(self.names, args, kwargs)).values()
        if summed := [site.name for site in sites if site.enumerated and not site.observed]:
            raise PairError(
                f"SemiAmortized: the model enumerates site {summed[0]!r}, which the steps cannot "
                "sum over: observe it, or take another guide, such as MeanField"
            )
        self.model = (model,)  # a tuple, or its parameters would be the guide's too
        self.max_grad_norm = max_grad_norm
        left = [1] * max(len(site.batch_shape) for site in sites)  # the points stand left of plates
        signs = torch.randint(2, (steps, 1, *left, sum(self.sizes))) * 2.0 - 1
        self.register_buffer("signs", torch.cat([signs, -signs], 1))
        log_rate = torch.tensor(math.log(learning_rate))
        if learned:
            self.log_rate = nn.Parameter(log_rate)
        else:
            self.register_buffer("log_rate", log_rate)

    def build(self) -> None:
        self.sizes = [unconstrained_size(site) for site in self.local_sites.values()]
        self.head = nn.Linear(self.features, 2 * sum(self.sizes))

    def draw_rows(
        self, given: Mapping[str, Tensor], shared: Mapping[str, Tensor], **sizes: Any
    ) -> None:
        local = self.refine(given)  # before the plate of rows, since the model enters its own
        with self.rows(*given.values(), **sizes):
            for name, q in self.distributions(local).items():
                if name not in given:
                    pyro.sample(name, q)

    def distributions(self, local: Tensor) -> dict[str, TorchDistribution]:
        """q of each local site, from the rows' parameters ``(..., 2 * U)``."""
        loc, scale = (part.split(self.sizes, -1) for part in local.chunk(2, -1))
        return {
            site.name: constrained(
                dist.Normal(m, positive(s)).to_event(1), site.support, site.event_shape
            )
            for site, m, s in zip(self.local_sites.values(), loc, scale, strict=True)
        }

    def refine(self, given: Mapping[str, Tensor]) -> Tensor:
        """The rows' parameters after the steps, ``(rows, 2 * U)``, for observables ``given``."""
        if any(getattr(handler, "name", "") == ROWS for handler in poutine.runtime._PYRO_STACK):
            raise PairError(
                "SemiAmortized: the model's prior asks for this guide's posterior, whose steps run "
                "the model: give a VampPrior the posterior of another guide, such as MeanField"
            )
        features = self.encode(given)
        local, learning = self.head(features).to(features.dtype), torch.is_grad_enabled()
        with poutine.block(), torch.enable_grad(), AtCenters():
            known = dict(given) | (self.global_guide(**given) if self.global_sites else {})
            local = local + torch.zeros_like(local).requires_grad_()  # the encoder may be frozen
            for signs in self.signs:
                elbo = self._elbo(local, signs, known)
                (gradient,) = torch.autograd.grad(elbo, local, create_graph=learning)
                if self.max_grad_norm is not None:
                    norm = gradient.norm(dim=-1, keepdim=True)
                    gradient = gradient * self.max_grad_norm / norm.clamp(min=self.max_grad_norm)
                local = local + self.log_rate.exp() * gradient
        return local if learning else local.detach()

    def _elbo(self, local: Tensor, signs: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """The sum of the rows' ELBO, up to terms that no local parameter changes."""
        (model,), (loc, scale) = self.model, local.chunk(2, -1)
        points = (loc + positive(scale) * signs).split(self.sizes, -1)
        values, log_q = dict(known), 0 * local.sum()  # depends on local, if all sites are known
        for (name, q), value in zip(self.distributions(local).items(), points, strict=True):
            if name not in known:
                for move in getattr(q, "transforms", ()):
                    value = move(value)
                values[name], log_q = value, log_q + q.log_prob(value).sum()
        with own_parameters(model):
            given = poutine.condition(model, values)
            trace = poutine.trace(given).get_trace(**model.observed(known))
        return (trace.log_prob_sum() - log_q) / len(signs)

    def posterior(self, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        site = self.only_site()
        return self.distributions(self.refine(by_name(self.names, args, kwargs)))[site.name]
