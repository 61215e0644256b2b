"""Copy this file to ``models/<name>.py``: the class in it is then in the zoo.

It shows what the contract asks for; files whose name starts with an underscore are not listed.
A global latent (one for all rows) stands outside the plate, as ``w`` does here.
"""

from __future__ import annotations

from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_vae.conditionals import positive
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP


class Template(GenerativeModel):
    """One sentence: what kind of data come about how (Author year, arXiv:number).

        w   ~ Normal(0, I)                        # offset      | D
        z_n ~ Gamma(2, 1)                         # intensity   data | 1
        x_n ~ Poisson(softplus(f(z_n) + w))       # counts      data | D

    Args:
        observed: D, the number of counts a row.
    """

    w_zero: Tensor

    def __init__(self, observed: int) -> None:
        super().__init__()
        self.decoder = MLP(1, 8, observed)
        # Constants are buffers, so that they follow the model to a device or a dtype.
        self.register_buffer("w_zero", torch.zeros(observed))

    def w_dist(self) -> TorchDistribution:
        return dist.Normal(self.w_zero, torch.ones_like(self.w_zero)).to_event(1)

    def z_dist(self) -> TorchDistribution:
        two = torch.full_like(self.w_zero[:1], 2.0)
        return dist.Gamma(two, torch.ones_like(two)).to_event(1)

    def x_dist(self, w: Tensor, z: Tensor) -> TorchDistribution:
        return dist.Poisson(positive(self.decoder(z) + w)).to_event(1)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        w = pyro.sample("w", self.w_dist())
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(w, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(observed=4)
