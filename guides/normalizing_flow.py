"""Normalizing flows: a diagonal normal, moved by a flow that knows the data as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ppl_vae.flows import Flow, FlowNormal, InverseAutoregressive
from ppl_vae.guide import SiteBySite
from ppl_vae.sites import PairError


class NormalizingFlow(SiteBySite):
    """A flow for each site's unconstrained coordinates, moved onto its support.

        z = f_T(... f_1(e)),  e ~ Normal(m(x), s(x)),  every f_t depending on x

    Several sites follow one another, each given those before it. Source: Rezende & Mohamed 2015
    (arXiv:1505.05770), section 4; with the default flow, Kingma et al. 2016 (arXiv:1606.04934).

    Args:
        args, kwargs: model, encoder and example, as :class:`~ppl_vae.guide.AmortizedGuide`.
        flow: makes a flow from a number of coordinates and the width of the context, as
            ``partial(Planar, layers=16)`` does; :mod:`ppl_vae.flows` says which to take.

    Raises:
        PairError: as :class:`~ppl_vae.guide.AmortizedGuide`; a site that the flow cannot move,
            such as a single coordinate by a coupling.
    """

    def __init__(
        self, *args: Any, flow: Callable[[int, int], Flow] = InverseAutoregressive, **kwargs: Any
    ) -> None:
        self.flow = flow  # before the base class builds the heads
        super().__init__(*args, **kwargs)

    def head(self, size: int, context: int) -> nn.Module:
        try:
            flow = self.flow(size, context)
        except ValueError as error:
            site = list(self.local_sites)[len(self.heads)]  # heads are made in the sites' order
            raise PairError(f"NormalizingFlow: site {site!r}: {error}") from None
        return FlowNormal(nn.Linear(context, 2 * size), flow)
