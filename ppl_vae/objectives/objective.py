"""What SVI maximizes: the protocol, and Pyro's estimator of the ELBO that fits a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions import Delta
from pyro.infer import (
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ppl_vae.sites import aside, paired_traces, sample_nodes


class Objective(Protocol):
    """What SVI minimizes: any ``pyro.infer.ELBO``, or whatever computes a loss like one.

    Losses are nats of all rows that the batch stands for.
    """

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss as a number."""
        ...

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss as a number; its gradients are added to those of the parameters."""
        ...


def backward(
    objective: Objective,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run an objective forward and backward; returns the loss as a number."""

    def with_a_parameter(*args: Any, **kwargs: Any) -> Any:
        # Pyro skips the backward pass of programs without parameter statements, whose tensors may
        # well need gradients.
        _state_a_parameter(name="_")
        return guide(*args, **kwargs)

    return objective.loss_and_grads(model, with_a_parameter, *args, **kwargs)


_state_a_parameter: Any = effectful(lambda: torch.zeros(()), type="param")


def plain_elbo(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> Objective:
    """Pyro's estimator of the ELBO that fits a pair, chosen from a trace of it.

    ``TraceEnum_ELBO`` where a site is enumerated, ``TraceGraph_ELBO`` where a guide's site is
    not reparameterized, ``TraceMeanField_ELBO`` where every latent's KL has a closed form and the
    guide draws in the model's order (a KL given a latent that depends on the one at hand is no
    term of the ELBO), ``Trace_ELBO`` otherwise. Arguments: an example batch.
    """
    with torch.no_grad(), aside():
        model_trace, guide_trace = paired_traces(model, guide, *args, **kwargs)
    latents = {name: node for name, node in sample_nodes(model_trace) if not node["is_observed"]}
    drawn = dict(sample_nodes(guide_trace))
    if any(node["infer"].get("enumerate") for node in [*latents.values(), *drawn.values()]):
        return TraceEnum_ELBO(max_plate_nesting=1)
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


@dataclass
class Terms:
    """The plain ELBO, in nats per datum.

    Kept as tensors, so that reading a step's figures is the caller's choice of when to wait.
    """

    reconstruction: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl


def closed_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p) in closed form; None where there is none."""
    # Pyro's KL from a Delta leaves out the Delta's log-density, in which an autoguide keeps the
    # Jacobian of a global site's support.
    if isinstance(q.base_dist if isinstance(q, Independent) else q, Delta):
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None
