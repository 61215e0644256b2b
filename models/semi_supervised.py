"""Labels as latents: the semi-supervised VAE."""

from __future__ import annotations

from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.likelihoods import Bernoulli
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

from ._labels import LabeledModel


class M2(LabeledModel):
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

    def __init__(self, prior: nn.Module, likelihood: nn.Module, classes: int) -> None:
        super().__init__(classes)
        self.prior, self.likelihood = prior, likelihood

    def z_dist(self) -> TorchDistribution:
        return self.prior()

    def x_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(y, z)

    def tell(self, y: Tensor, x: Tensor | None) -> Tensor:
        z = pyro.sample("z", self.z_dist())
        return pyro.sample("x", self.x_dist(y, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(StandardNormal(2), Bernoulli(MLP(3 + 2, 8, 6)), classes=3)
