"""The objective that is computed from the log-probabilities of rows, as a ``pyro.infer.ELBO``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vae.objectives.rows import PARTICLES, RowTerms


class RowObjective(ELBO):
    """An objective that is computed from the log-probabilities of rows.

    A ``pyro.infer.ELBO``: it runs under ``pyro.infer.SVI`` and under ours, on programs whose rows
    stand in one plate at dim -1. What is said of a batch is said of the rows that run at once: of a
    part of them where ``fit`` accumulates gradients, of a worker's share where there are several.
    To implement: ``loss_of``, or ``differentiable_loss`` and with it all that is run.

    Args:
        draws: K, of the latents, made together in a plate at dim -2.

    Attributes:
        state: what the objective itself learns, or changes over training: its parameters are
            trained with the pair's, and a run's checkpoints hold it. None: nothing.
        ends: the epoch from which it no longer changes: early stopping waits for it.

    Raises:
        ValueError: draws below 1.
    """

    ends: float = 0.0
    state: nn.Module | None = None

    def __init__(self, draws: int = 1) -> None:
        if draws < 1:
            raise ValueError(f"{type(self).__name__}(draws={draws}): expected at least 1")
        super().__init__(num_particles=draws, max_plate_nesting=1, vectorize_particles=True)

    @property
    def draws(self) -> int:
        """K."""
        return self.num_particles

    @abstractmethod
    def loss_of(self, terms: RowTerms) -> Tensor:
        """The loss ``()``, in nats of all rows that the batch stands for."""

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start. Most do not depend on it."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss ``()``, whose gradients are those of the objective."""
        return self.loss_of(RowTerms(*self._get_trace(model, guide, args, kwargs)))

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.detach()

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(self.plate(guide)).get_trace(*args, **kwargs)
        replayed = poutine.trace(poutine.replay(self.plate(model), trace=guide_trace))
        return replayed.get_trace(*args, **kwargs), guide_trace

    def plate(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """A program whose draws are made K times together."""
        return pyro.plate(PARTICLES, self.draws, dim=-2)(program)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({settings})"

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, but for modules: what ``run.json`` keeps."""
        return {"draws": self.draws}
