"""A VAE of clusters."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.distributions import OneHotCategorical
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.nn import MLP

from ._labels import LabeledModel


class MixtureVAE(LabeledModel):
    """Clusters in the latent space of a VAE (Jiang et al. 2017, arXiv:1611.05148, section 3.1).

        y_n ~ OneHotCategorical(pi)         # cluster    data | K
        z_n ~ component(y_n)                # latent     data | Z
        x_n ~ likelihood(z_n)               # image      data | D

    The cluster is summed out exactly, so that a guide draws z alone; what is inferred of it is
    p(y | z) of a draw of q(z | x). ``Normal(torch.nn.Linear(K, 2 * Z))`` is a component with a mean
    and a scale of its own for each cluster. Clusters that are given are observed.

    Args:
        component: conditional of the one-hot cluster, event ``(Z,)``.
        likelihood: conditional of z, event ``(D,)``.
        classes: K; the logarithms of pi are learned.

    Raises:
        ValueError: fewer than two classes.
    """

    infer: ClassVar[dict[str, Any]] = {"enumerate": "parallel"}

    def __init__(self, component: nn.Module, likelihood: nn.Module, classes: int) -> None:
        super().__init__(classes)
        self.component, self.likelihood = component, likelihood
        self.logits = nn.Parameter(torch.zeros(classes))

    def y_dist(self) -> TorchDistribution:
        return OneHotCategorical(logits=self.logits)

    def z_dist(self, y: Tensor) -> TorchDistribution:
        return self.component(y)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return self.likelihood(z)

    def tell(self, y: Tensor, x: Tensor | None) -> Tensor:
        z = pyro.sample("z", self.z_dist(y))
        return pyro.sample("x", self.x_dist(z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(Normal(nn.Linear(3, 4)), Bernoulli(MLP(2, 8, 6)), classes=3)
