"""Mean field: every latent coordinate independent of the others, given the data."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal, constrained
from ppl_vae.guide import AmortizedGuide, unconstrained_size
from ppl_vae.model import by_name
from ppl_vae.sites import Site


class MeanField(AmortizedGuide):
    """A diagonal normal on each site's unconstrained coordinates, moved onto its support.

        q(z1, z2, ... | x) = q(z1 | x) q(z2 | x) ...

    Source: Kingma & Welling 2014 (arXiv:1312.6114), eq. 9; for bounded supports the change of
    variables of Kucukelbir et al. 2017 (arXiv:1603.00788), section 2.3.

    Arguments and errors: as :class:`~ppl_vae.guide.AmortizedGuide`.
    """

    def build(self) -> None:
        self.heads = nn.ModuleDict(
            {
                name: Normal(nn.Linear(self.features, 2 * unconstrained_size(site)))
                for name, site in self.local_sites.items()
            }
        )

    def sample_rows(self, features: Tensor, given: Mapping[str, Tensor]) -> None:
        for site in self.local_sites.values():
            if site.name not in given:
                pyro.sample(site.name, self._site_dist(site, features))

    def posterior(self, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        site = self.only_site()
        return self._site_dist(site, self.encode(by_name(self.names, args, kwargs)))

    def _site_dist(self, site: Site, features: Tensor) -> TorchDistribution:
        return constrained(self.heads[site.name](features), site.support, site.event_shape)
