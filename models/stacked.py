"""Two programs stacked: a VAE, and above its latent a model of labels."""

from __future__ import annotations

from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

from ._labels import LabeledModel


class M1M2(LabeledModel):
    """M2 on the latent of a VAE, M1 (Kingma et al. 2014, arXiv:1406.5298, section 2.1).

        y_n  ~ OneHotCategorical(1/K)       # label      data | K
        z2_n ~ prior                        # style      data | Z
        z1_n ~ features(y_n, z2_n)          # features   data | F
        x_n  ~ likelihood(z1_n)             # image      data | D

    The paper fits M1 first, its prior a standard normal, then M2 on draws of q(z1 | x). Here that
    is to fit a :class:`~ppl_vae.models.vae.VAE`, and then this with the same likelihood and the
    same q(z1 | x), both fixed, or not.

    Args:
        prior: of the style: conditional without context, event ``(Z,)``.
        features: conditional of label and style, event ``(F,)``.
        likelihood: conditional of the features, event ``(D,)``.
        classes: K.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(
        self, prior: nn.Module, features: nn.Module, likelihood: nn.Module, classes: int
    ) -> None:
        super().__init__(classes)
        self.prior, self.features, self.likelihood = prior, features, likelihood

    def z2_dist(self) -> TorchDistribution:
        return self.prior()

    def z1_dist(self, y: Tensor, z2: Tensor) -> TorchDistribution:
        return self.features(y, z2)

    def x_dist(self, z1: Tensor) -> TorchDistribution:
        return self.likelihood(z1)

    def tell(self, y: Tensor, x: Tensor | None) -> Tensor:
        z2 = pyro.sample("z2", self.z2_dist())
        z1 = pyro.sample("z1", self.z1_dist(y, z2))
        return pyro.sample("x", self.x_dist(z1), obs=x)

    @classmethod
    def toy(cls) -> Self:
        features = Normal(MLP(3 + 2, 8, 6))
        return cls(StandardNormal(2), features, Bernoulli(MLP(3, 8, 6)), classes=3)
