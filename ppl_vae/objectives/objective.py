"""What SVI maximizes: the protocol, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions import Delta
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.distributions import Independent, kl_divergence


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


_beside: ContextVar[bool] = ContextVar("_beside", default=False)


@contextmanager
def beside() -> Iterator[None]:
    """Runs of programs besides an estimator's own: their latents are no part of a bound, so that
    training neither weighs them nor watches them."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


def is_beside() -> bool:
    """Whether a program is run within :func:`beside`."""
    return _beside.get()


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
