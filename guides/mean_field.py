"""Mean field: every latent coordinate independent of the others, given the data."""

from __future__ import annotations

from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.guide import SiteBySite


class MeanField(SiteBySite):
    """A diagonal normal on each site's unconstrained coordinates, moved onto its support.

        q(z1, z2, ... | x) = q(z1 | x) q(z2 | x) ...

    Source: Kingma & Welling 2014 (arXiv:1312.6114), eq. 9; for bounded supports the change of
    variables of Kucukelbir et al. 2017 (arXiv:1603.00788), section 2.3.

    Arguments and errors: as :class:`~ppl_vae.guide.AmortizedGuide`.
    """

    autoregressive = False

    def head(self, size: int, context: int) -> nn.Module:
        return Normal(nn.Linear(context, 2 * size))
