"""The objective that is computed from the log-probabilities of rows, as a ``pyro.infer.ELBO``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae.objectives.enumeration import enumerated_traces
from ppl_vae.objectives.evolving import Evolving
from ppl_vae.objectives.rows import PARTICLES, RowTerms


class RowObjective(Evolving):
    """An objective that is computed from the log-probabilities of rows.

    A ``pyro.infer.ELBO``: it runs under ``pyro.infer.SVI`` and under ours, on programs whose rows
    stand in one plate at dim -1. What is said of a batch is said of the rows that run at once: of a
    part of them where ``fit`` accumulates gradients, of a worker's share where there are several.
    To implement: ``loss_of``, or ``differentiable_loss`` and with it all that is run.

    Args:
        draws: K, of the latents, made together in a plate at dim -2.

    Raises:
        ValueError: draws below 1.
    """

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
        return enumerated_traces(self.plate(model), self.plate(guide), args, kwargs, plates=2)

    def plate(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """A program whose draws are made K times together."""
        return pyro.plate(PARTICLES, self.draws, dim=-2)(program)

    def settings(self) -> dict[str, Any]:
        return {"draws": self.draws}
