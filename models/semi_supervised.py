"""Labels as latents: the semi-supervised VAE."""

from __future__ import annotations

from typing import Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.distributions import OneHotCategorical
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal


class M2(GenerativeModel):
    """A label and a style, decoded together (Kingma et al. 2014, arXiv:1406.5298, eq. 2).

        y_n ~ OneHotCategorical(1/K)        # label      data | K
        z_n ~ prior                         # style      data | Z
        x_n ~ likelihood(y_n, z_n)          # image      data | D

    A label that is given is observed, one that is not is inferred.

    Args:
        prior: conditional without context, event ``(Z,)``.
        likelihood: conditional of label and style, joined ``(K + Z,)``; event ``(D,)``.
        classes: K.

    Raises:
        ValueError: fewer than two classes.
    """

    log_prior: Tensor

    def __init__(self, prior: nn.Module, likelihood: nn.Module, classes: int) -> None:
        super().__init__()
        self.prior, self.likelihood, self.classes = prior, likelihood, classes
        self.register_buffer("log_prior", even(classes))

    def y_dist(self) -> TorchDistribution:
        return OneHotCategorical(logits=self.log_prior)

    def z_dist(self) -> TorchDistribution:
        return self.prior()

    def x_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(y, z)

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, y, n=n, total=total):
            y = pyro.sample("y", self.y_dist(), obs=y)
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(y, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(StandardNormal(2), Bernoulli(MLP(3 + 2, 8, 6)), classes=3)


def even(classes: int) -> Tensor:
    """Log-probabilities ``(K,)`` of as many classes, all alike.

    Raises:
        ValueError: fewer than two.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: expected at least 2")
    return torch.zeros(classes).log_softmax(0)
