"""The ELBO as it is: which estimator of it fits a pair, and the exact sum over discrete sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from ppl_vae.model import own_parameters
from ppl_vae.objectives.objective import Objective, closed_kl
from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.sites import PairError, aside, paired_traces, sample_nodes


class EnumeratedELBO(RowObjective):
    """The ELBO, summed exactly over the values of enumerated sites.

        sum_y q(y | x) E_q(z | x, y) (log p(x, y, z) - log q(y, z | x))

    Source: Kingma et al. 2014 (arXiv:1406.5298), eq. 7. Its value is that of Pyro's
    ``TraceEnum_ELBO``; but it is made of rows' terms, so that a warm-up can weigh the KL where an
    observed site depends on an enumerated one, and KLs are in closed form where there are any.

    Args:
        draws: over which sites that are not enumerated are averaged.

    Raises:
        ValueError: draws below 1.
        PairError: when run, as :class:`RowTerms`.
    """

    def loss_of(self, terms: RowTerms) -> Tensor:
        return -terms.sum(terms.reconstruction - terms.weighted_kl()) - terms.shared


def plain_elbo(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> Objective:
    """The estimator of the ELBO that fits a pair, chosen from a trace of it.

    :class:`EnumeratedELBO` where a site is enumerated, or ``TraceEnum_ELBO`` where there is more
    than a plate of rows, or a site without reparameterization besides; ``TraceGraph_ELBO`` where a
    guide's site is not reparameterized, ``TraceMeanField_ELBO`` where every latent's KL has a
    closed form and the guide draws in the model's order (a KL given a latent that depends on the
    one at hand is no term of the ELBO), ``Trace_ELBO`` otherwise. Arguments: an example batch.
    """
    with torch.no_grad(), aside():
        model_trace, guide_trace = paired_traces(model, guide, *args, **kwargs)
    latents = {name: node for name, node in sample_nodes(model_trace) if not node["is_observed"]}
    drawn = dict(sample_nodes(guide_trace))
    if any(node["infer"].get("enumerate") for node in [*latents.values(), *drawn.values()]):
        try:
            with aside(), own_parameters(model, guide):
                EnumeratedELBO().loss(model, guide, *args, **kwargs)
        except PairError:
            return TraceEnum_ELBO(max_plate_nesting=1)
        return EnumeratedELBO()
    if not all(node["fn"].has_rsample for node in drawn.values()):
        return TraceGraph_ELBO()
    in_order = list(latents) == [name for name in drawn if name in latents]
    if (
        latents
        and in_order
        and all(closed_kl(drawn[n]["fn"], p["fn"]) is not None for n, p in latents.items())
    ):
        return TraceMeanField_ELBO()
    return Trace_ELBO()
