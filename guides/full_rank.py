"""Full rank: one normal with all covariances, over all latent coordinates of a row together."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import constrained, positive, unconstrain
from ppl_vae.distributions import CholeskyNormal
from ppl_vae.guide import AmortizedGuide, unconstrained_size
from ppl_vae.model import by_name


class FullRank(AmortizedGuide):
    """A normal with amortized Cholesky factor over the unconstrained coordinates of all sites.

        u = m(x) + L(x) e,  e ~ Normal(0, I);  (z1, z2, ...) = u, each part on its site's support

    Block k of u given the blocks before it is normal with location
    ``m_k + sum_{j<k} L_kj e_j`` and factor ``L_kk``, so that each site keeps a density of its
    own, and e is recovered from the values drawn (or replayed) by triangular solves. Source:
    Kucukelbir et al. 2017 (arXiv:1603.00788), section 2.4, amortized.

    Arguments and errors: as :class:`~ppl_vae.guide.AmortizedGuide`.
    """

    def build(self) -> None:
        self.sizes = [unconstrained_size(site) for site in self.local_sites.values()]
        self.size = size = sum(self.sizes)
        self.splits = [size, size, size * (size - 1) // 2]  # location, diagonal, below it
        self.head = nn.Linear(self.features, sum(self.splits))
        # Starts at mean field: correlations are learned, not undone.
        with torch.no_grad():
            for part in (self.head.weight, self.head.bias):
                part[2 * size :] = 0

    def parameters_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Location ``(..., U)`` and Cholesky factor ``(..., U, U)`` from the features."""
        loc, diagonal, below = self.head(features).to(features.dtype).split(self.splits, -1)
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1)
        factor = torch.diag_embed(positive(diagonal))
        factor[..., rows, columns] = below
        return loc, factor

    def sample_rows(self, features: Tensor, given: Mapping[str, Tensor]) -> None:
        loc, factor = self.parameters_of(features)
        noise: list[Tensor] = []  # e of the sites so far
        start = 0
        for site, size in zip(self.local_sites.values(), self.sizes, strict=True):
            stop = start + size
            own = factor[..., start:stop, start:stop]
            mean = loc[..., start:stop]
            if noise:
                before = factor[..., start:stop, :start]
                mean = mean + (before * torch.cat(noise, -1).unsqueeze(-2)).sum(-1)
            q = CholeskyNormal(mean, scale_tril=own)
            value = given.get(site.name)
            if value is None:
                value = pyro.sample(site.name, constrained(q, site.support, site.event_shape))
            if stop < self.size:  # the sites to come need its noise
                noise.append(q.noise(unconstrain(value, site.support, site.event_shape)))
            start = stop

    def posterior(self, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        site = self.only_site()
        loc, factor = self.parameters_of(self.encode(by_name(self.names, args, kwargs)))
        joint = CholeskyNormal(loc, scale_tril=factor)
        return constrained(joint, site.support, site.event_shape)
