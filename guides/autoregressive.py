"""Autoregressive: each site a normal given the data and the sites drawn before it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.guide import SiteBySite
from ppl_vae.nn import MLP


class Autoregressive(SiteBySite):
    """A chain over sites, in the model's order, whose links are nets.

        q(z1, z2, ... | x) = q(z1 | x) q(z2 | x, z1) ...

    Each factor is a diagonal normal on the site's unconstrained coordinates, moved onto its
    support; its location and scale are an MLP of the features and of the coordinates of the sites
    before. Sites depend on each other in any way, coordinates of one site do not. Source: the
    two-level inference model of Tomczak & Welling 2018 (arXiv:1705.07120), eq. 14-15.

    Args:
        args, kwargs: model, encoder and example, as :class:`~ppl_vae.guide.AmortizedGuide`.
        hidden: width of each MLP's hidden layer; None: as many as there are features.

    Raises:
        PairError: as :class:`~ppl_vae.guide.AmortizedGuide`.
        ValueError: ``hidden`` below 1.
    """

    def __init__(self, *args: Any, hidden: int | None = None, **kwargs: Any) -> None:
        if hidden is not None and hidden < 1:
            raise ValueError(f"Autoregressive(hidden={hidden}): expected a width of at least 1")
        self.hidden = hidden
        super().__init__(*args, **kwargs)

    def head(self, size: int, context: int) -> nn.Module:
        return Normal(self.net(2 * size, context))

    def net(self, outputs: int, context: int) -> nn.Module:
        return MLP(context, self.hidden or self.features, outputs)
