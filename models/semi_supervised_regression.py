"""A target as a latent: semi-supervised regression."""

from __future__ import annotations

from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.likelihoods import Gaussian
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal


class SemiSupervisedRegression(GenerativeModel):
    """Real targets and a style, decoded together (cf. Siddharth et al. 2017, arXiv:1706.00400).

        t_n ~ target                        # target     data | K
        z_n ~ prior                         # style      data | Z
        x_n ~ likelihood(t_n, z_n)          # data       data | D

    M2 of Kingma et al. 2014 (arXiv:1406.5298, eq. 2) with real numbers for the label: what is to be
    predicted is a cause of the data. A target that is given is observed, one that is not is
    inferred, and the guide's q(t | x) is the regression. There is no sum over its values: it is
    drawn, reparameterized. In a data set, the column is ``t``, since ``y`` holds class numbers;
    standardize it for a standard normal ``target``. Rows of both kinds in one step are those of
    ``SemiSupervised(label="t")``, whose classification term is the regression's.

    Args:
        target: conditional without context, event ``(K,)``.
        prior: conditional without context, event ``(Z,)``.
        likelihood: conditional of target and style, joined ``(K + Z,)``; event ``(D,)``.
    """

    def __init__(self, target: nn.Module, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.target, self.prior, self.likelihood = target, prior, likelihood

    def t_dist(self) -> TorchDistribution:
        return self.target()

    def z_dist(self) -> TorchDistribution:
        return self.prior()

    def x_dist(self, t: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(t, z)

    def forward(
        self,
        x: Tensor | None = None,
        t: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, t, n=n, total=total):
            t = pyro.sample("t", self.t_dist(), obs=t)
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(t, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(StandardNormal(1), StandardNormal(2), Gaussian(MLP(1 + 2, 8, 5), 0.5))
