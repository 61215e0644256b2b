"""What models of a label, and of what comes of it, share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_vae.distributions import OneHotCategorical
from ppl_vae.model import GenerativeModel


class LabeledModel(GenerativeModel):
    """A story that begins with a label, one-hot and all classes alike, which may be given.

    To implement: ``tell``, the rest of the story.

    Args:
        classes: K.

    Attributes:
        infer: how Pyro infers a label that is not given.

    Raises:
        ValueError: fewer than two classes.
    """

    infer: ClassVar[dict[str, Any]] = {}
    log_prior: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"{type(self).__name__}(classes={classes}): expected at least 2")
        self.classes = classes
        self.register_buffer("log_prior", torch.zeros(classes).log_softmax(0))

    def y_dist(self) -> TorchDistribution:
        return OneHotCategorical(logits=self.log_prior)

    @abstractmethod
    def tell(self, y: Tensor, x: Tensor | None) -> Any:
        """Draw what comes of a label ``(rows, K)``; ``x`` is observed, or None."""

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> Any:
        with self.rows(x, y, n=n, total=total):
            infer: Any = dict(self.infer)
            label = pyro.sample("y", self.y_dist(), obs=y, infer=infer)
            return self.tell(label, x)
