"""Semi-supervised VAEs with an auxiliary latent, by which the guide becomes richer."""

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


class _WithAuxiliary(LabeledModel):
    """What :class:`ADGM` and :class:`SDGM` share."""

    def __init__(
        self, prior: nn.Module, auxiliary: nn.Module, likelihood: nn.Module, classes: int
    ) -> None:
        super().__init__(classes)
        self.prior, self.auxiliary, self.likelihood = prior, auxiliary, likelihood

    def z_dist(self) -> TorchDistribution:
        return self.prior()


class ADGM(_WithAuxiliary):
    """An auxiliary latent after the image (Maaløe et al. 2016, arXiv:1602.05473, eq. 8-9).

        y_n ~ OneHotCategorical(1/K)            # label       data | K
        z_n ~ prior                             # style       data | Z
        x_n ~ likelihood(y_n, z_n)              # image       data | D
        a_n ~ auxiliary(x_n, y_n, z_n)          # auxiliary   data | A

    The story of image and label is that of M2; a guide ``q(a | x) q(y | a, x) q(z | y, x)`` is,
    with a summed out, of a richer family.

    Arguments and errors: as :class:`SDGM`.
    """

    def x_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(y, z)

    def a_dist(self, x: Tensor, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.auxiliary(x, y, z)

    def tell(self, y: Tensor, x: Tensor | None) -> None:
        z = pyro.sample("z", self.z_dist())
        x = pyro.sample("x", self.x_dist(y, z), obs=x)
        pyro.sample("a", self.a_dist(x, y, z))

    @classmethod
    def toy(cls) -> Self:
        auxiliary = Normal(MLP(6 + 3 + 2, 8, 4))
        return cls(StandardNormal(2), auxiliary, Bernoulli(MLP(3 + 2, 8, 6)), classes=3)


class SDGM(_WithAuxiliary):
    """An auxiliary latent between style and image (Maaløe et al. 2016, arXiv:1602.05473, eq. 14).

        y_n ~ OneHotCategorical(1/K)            # label       data | K
        z_n ~ prior                             # style       data | Z
        a_n ~ auxiliary(y_n, z_n)               # auxiliary   data | A
        x_n ~ likelihood(a_n, y_n, z_n)         # image       data | D

    Two levels of latents with skip connections, inferred from the image up: ``q(a | x) q(y | a, x)
    q(z | a, y, x)``.

    Args:
        prior: of the style: conditional without context, event ``(Z,)``.
        auxiliary: conditional of label and style, in :class:`ADGM` of image, label and style; event
            ``(A,)``.
        likelihood: conditional of auxiliary latent, label and style, in :class:`ADGM` of the last
            two; event ``(D,)``.
        classes: K.

    Raises:
        ValueError: fewer than two classes.
    """

    def a_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.auxiliary(y, z)

    def x_dist(self, a: Tensor, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(a, y, z)

    def tell(self, y: Tensor, x: Tensor | None) -> None:
        z = pyro.sample("z", self.z_dist())
        a = pyro.sample("a", self.a_dist(y, z))
        pyro.sample("x", self.x_dist(a, y, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        auxiliary = Normal(MLP(3 + 2, 8, 4))
        return cls(StandardNormal(2), auxiliary, Bernoulli(MLP(2 + 3 + 2, 8, 6)), classes=3)
