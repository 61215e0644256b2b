"""The variational autoencoder."""

from __future__ import annotations

from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal


class VAE(GenerativeModel):
    """A latent vector, decoded (Kingma & Welling 2014, arXiv:1312.6114).

        z_n ~ prior                 # latent     data | Z
        x_n ~ likelihood(z_n)       # image      data | D

    Args:
        prior: conditional without context, event ``(Z,)``.
        likelihood: conditional of z, event ``(D,)``; its net is the decoder.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def z_dist(self) -> TorchDistribution:
        return self.prior()

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return self.likelihood(z)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(StandardNormal(3), Bernoulli(MLP(3, 8, 6)))
