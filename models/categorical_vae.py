"""A VAE whose latents are categorical variables."""

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


class CategoricalVAE(GenerativeModel):
    """N categorical variables of K classes, decoded (Jang et al. 2017, arXiv:1611.01144).

        z_n ~ uniform over the classes, each    # codes     data | N, K
        x_n ~ likelihood(z_n)                   # image     data | D

    Section 4 of the paper. A value of z is N one-hot vectors; the decoder gets them as one vector
    ``(N * K,)``.

    Args:
        variables, classes: N, K.
        likelihood: conditional of the flat z, event ``(D,)``; its net is the decoder.

    Raises:
        ValueError: ``variables`` below 1, or ``classes`` below 2.
    """

    even: Tensor

    def __init__(self, variables: int, classes: int, likelihood: nn.Module) -> None:
        super().__init__()
        if variables < 1 or classes < 2:
            raise ValueError(
                f"CategoricalVAE(variables={variables}, classes={classes}): expected at least 1 "
                "variable of at least 2 classes"
            )
        # A buffer, so that device and dtype follow the model's.
        self.register_buffer("even", torch.zeros(variables, classes), persistent=False)
        self.likelihood = likelihood

    def z_dist(self) -> TorchDistribution:
        return OneHotCategorical(logits=self.even).to_event(1)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return self.likelihood(z.flatten(-2))

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            codes = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(codes), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(2, 3, Bernoulli(MLP(2 * 3, 8, 6)))
