"""Several levels of latents, each drawn from those above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal


class Hierarchy(GenerativeModel):
    """L levels of latents, from the top down (Sønderby et al. 2016, arXiv:1602.02282).

        z{l}_n ~ level(z{l+1}_n)            # level l = L..1, the top from the prior   data | Z_l
        x_n    ~ likelihood(z1_n)           # image                                    data | D

    Equations 1-3 of the paper. With ``skip``, a level is drawn from all those above it, and x from
    all levels, each joined; with two levels that is the HVAE of Tomczak & Welling 2018
    (arXiv:1705.07120, section 4).

    Args:
        prior: of the top: conditional without context, event ``(Z_L,)``.
        levels: conditionals of the levels below the top, from there down, event ``(Z_l,)`` each.
        likelihood: conditional of the latents, event ``(D,)``; its net is the decoder.
        skip: whether a conditional is given all levels above it, the top first, or the next only.

    Raises:
        ValueError: no level below the top.
    """

    def __init__(
        self,
        prior: nn.Module,
        levels: Sequence[nn.Module],
        likelihood: nn.Module,
        *,
        skip: bool = False,
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError(
                "Hierarchy(levels=[]): expected a conditional for each level below the top, at "
                "least one; with a single level of latents it is a VAE"
            )
        self.prior = prior
        self.levels = nn.ModuleList(levels)
        self.likelihood = likelihood
        self.skip = skip

    def z_dist(self, level: int, *above: Tensor) -> TorchDistribution:
        """Of one level, given those above it, the top first."""
        if level == len(self.levels) + 1:
            return self.prior()
        return self.levels[-level](*self._context(above))

    def x_dist(self, *z: Tensor) -> TorchDistribution:
        """Given all levels, the top first."""
        return self.likelihood(*self._context(z))

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        z: list[Tensor] = []  # from the top down
        with self.rows(x, n=n, total=total):
            for level in range(len(self.levels) + 1, 0, -1):
                z.append(pyro.sample(f"z{level}", self.z_dist(level, *z)))
            return pyro.sample("x", self.x_dist(*z), obs=x)

    def _context(self, above: Sequence[Tensor]) -> Sequence[Tensor]:
        return above if self.skip else above[-1:]

    @classmethod
    def toy(cls) -> Self:
        levels = [Normal(MLP(2, 8, 2 * 3)), Normal(MLP(3, 8, 2 * 4))]
        return cls(StandardNormal(2), levels, Bernoulli(MLP(4, 8, 6)))
