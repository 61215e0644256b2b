"""The base of our own objectives: what may learn, and change over training."""

from __future__ import annotations

from typing import Any

from pyro.infer import ELBO
from torch import nn


class Evolving(ELBO):
    """An objective that may learn itself, or change over training.

    Attributes:
        state: what the objective itself learns, or changes over training: its parameters are
            trained with the pair's, and a run's checkpoints hold it. None: nothing.
        ends: the epoch from which it no longer changes: early stopping waits for it.
    """

    ends: float = 0.0
    state: nn.Module | None = None

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start. Most do not depend on it."""

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, but for modules: what ``run.json`` keeps."""
        return {}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({settings})"
