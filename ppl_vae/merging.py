"""A model's program run as a guide: each latent from its own p, merged with evidence about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_vae.conditionals import positive


def by_precision(p: dist.Normal, loc: Tensor, raw: Tensor) -> dist.Normal:
    """The normalized product of p and ``Normal(loc, positive(raw))``: their precisions add up.

    Source: Sønderby et al. 2016 (arXiv:1602.02282), eq. 17-19.
    """
    scale = positive(raw)
    both = torch.hypot(p.scale, scale)
    weight = (p.scale / both).square()
    return dist.Normal(p.loc + weight * (loc - p.loc), p.scale * (scale / both))


def by_residual(p: dist.Normal, loc: Tensor, raw: Tensor) -> dist.Normal:
    """p moved by ``loc``, its scale multiplied by a positive function of ``raw``, which is 1 at 0.

    Source: Vahdat & Kautz 2020 (arXiv:2007.03898), section 3.2.
    """
    return dist.Normal(p.loc + loc, p.scale * positive(raw + math.log(math.expm1(1))))


MERGES: dict[str, Callable[[dist.Normal, Tensor, Tensor], dist.Normal]] = {
    "precision": by_precision,
    "residual": by_residual,
}


def entries(p: TorchDistribution) -> Any:
    """The distribution of each entry of independent ones."""
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    return p


def run_as_guide(
    model: Callable[..., Any],
    replace: Mapping[str, Callable[[TorchDistribution], TorchDistribution]],
    shared: Mapping[str, Tensor],
    **kwargs: Any,
) -> None:
    """Run a model so that handlers outside see a guide: the latents in ``replace``, and no more.

    The run ends when the last of them is drawn, so that what a model computes from there on costs
    nothing. Its parameters and observed sites are not seen outside.

    Args:
        replace: makes q from p, for each latent to be drawn.
        shared: values of latents that were drawn before, which are not seen outside either.
        kwargs: go to the model.
    """
    if replace:
        with suppress(_AllDrawn), _AsGuide(replace, shared):
            model(**kwargs)


class _AllDrawn(Exception):
    """Leaves a program whose latents are drawn."""


class _AsGuide(Messenger):
    def __init__(
        self,
        replace: Mapping[str, Callable[[TorchDistribution], TorchDistribution]],
        shared: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.waiting, self.shared = dict(replace), shared

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.shared:
            msg["value"], msg["done"] = self.shared[name], True
        elif name in self.waiting and not msg["is_observed"]:
            msg["fn"] = self.waiting[name](msg["fn"])
        msg["stop"] = name in self.shared or msg["is_observed"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.waiting.pop(msg["name"], None) and not self.waiting:
            raise _AllDrawn
