"""A pair at the centers of its distributions instead of at draws: what pictures show.

The center is the mean; where a distribution has no mean in closed form, as a flow's, the image of
its base's mean; of a discrete distribution, the mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

from ppl_vae.draws import laid_out, model_nodes, posterior_nodes, unobserved_sites
from ppl_vae.model import GenerativeModel


class AtCenters(Messenger):
    """Sets the sites of a program to their centers; those without one are drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["done"] or msg["is_observed"] or poutine.util.site_is_subsample(msg)):
            with suppress(NotImplementedError):
                msg["value"], msg["done"] = center(msg["fn"]), True


def posterior_centers(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Posterior centers of the latents, ``(rows, event)``, or ``(event)`` of a global one.

    Raises:
        ValueError: a site in a plate besides that of the rows.
    """
    with AtCenters():
        nodes, nesting = posterior_nodes(model, guide, columns, draws=1, temperature=0)
    if nesting > 1:
        raise ValueError(
            f"{type(model).__name__}: pictures need sites that stand in no plate but the rows'"
        )
    return {name: laid_out(node, 1, nesting)[1][0] for name, node in nodes.items()}


def decode(
    model: GenerativeModel,
    latents: Mapping[str, Tensor],
    site: str,
    columns: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Means of x given latents, ``(rows, event)``; latents not given are at their centers.

    Args:
        columns: among them the covariates of the rows.
    """
    columns = columns or {}
    sites = unobserved_sites(model, columns)
    local = (value for name, value in latents.items() if sites[name].local)
    rows = len(next(itertools.chain(local, columns.values())))
    with AtCenters():
        return mean(model_nodes(model, latents, rows=rows, columns=columns)[site]["fn"], site)


def mean(fn: Any, site: str) -> Tensor:
    """The mean of an observable's distribution.

    Raises:
        ValueError: it has none.
    """
    with suppress(NotImplementedError):
        if not (found := fn.mean).isnan().any():
            return found
    raise ValueError(f"the distribution of {site!r} has no mean: samples(draw=True) shows draws")


def center(fn: Any) -> Any:
    """The center of a distribution, of its batch and event shape.

    Raises:
        NotImplementedError: it has neither a mean nor a mode in closed form.
    """
    if isinstance(fn, Independent):
        return center(fn.base_dist)
    if isinstance(fn, TransformedDistribution):
        value = center(fn.base_dist)
        for transform in fn.transforms:
            value = transform(value)
        return value
    return fn.mode if fn.support.is_discrete else fn.mean
