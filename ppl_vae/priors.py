"""Priors: conditionals without context, the distributions of root latents.

Learning takes the score of values that the guide draws, so a prior should be quick to score; it is
sampled only to simulate. A prior with context, p(z | c), is a conditional as any other: a normal
by ``Normal(MLP(classes, 64, 2 * size))``, or
``FlowNormal(net, MaskedAutoregressive(size, classes))``.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from ppl_vae.flow import Flow
from ppl_vae.made import MADE, AutoregressiveMixture


class StandardNormal(nn.Module):
    """Independent standard normals.

    Shapes: no context; batch ``()``, event ``(size,)``.

    Raises:
        ValueError: size below 1.
    """

    loc: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"StandardNormal({size}): expected at least 1 latent")
        # A buffer, so that device and dtype follow the model's.
        self.register_buffer("loc", torch.zeros(size), persistent=False)

    def forward(self) -> TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class FlowPrior(nn.Module):
    """A standard normal, moved by a flow: ``FlowPrior(MaskedAutoregressive(size))``.

    Which flows are quick to score, :mod:`ppl_vae.flows` says. Begins near the standard normal.
    Source: Papamakarios et al. 2017 (arXiv:1705.07057), and Chen et al. 2017 (arXiv:1611.02731),
    section 3.2, as a prior.

    Shapes: no context; batch ``()``, event ``(size,)``.

    Args:
        flow: without context, and with an inverse.

    Raises:
        ValueError: a flow with context, or without an inverse.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        name = type(flow).__name__
        if flow.context:
            raise ValueError(
                f"FlowPrior({name}): its context has width {flow.context}, and a prior has none; "
                "build it without, or take FlowNormal for p(z | c)"
            )
        if not flow.invertible:
            raise ValueError(
                f"FlowPrior({name}): a prior scores values that it did not draw, which {name} "
                "cannot; take MaskedAutoregressive or Coupling"
            )
        self.base = StandardNormal(flow.size)
        self.flow = flow

    def forward(self) -> TorchDistribution:
        return dist.TransformedDistribution(self.base(), self.flow())


class Autoregressive(nn.Module):
    """Each latent a mixture of normals given those before it, all by one masked net.

    Scores in one pass, draws in ``size`` passes. Begins near the standard normal; the components
    begin apart. Source: Germain et al. 2015 (arXiv:1502.03509), with the mixtures of Uria et al.
    2013 (arXiv:1306.0186).

    Shapes: no context; batch ``()``, event ``(size,)``.

    Args:
        size: number of latents.
        hidden: hidden widths of the net, each at least ``size``; None: one of
            ``max(32, 2 * size)``.
        components: normals in each mixture.

    Raises:
        ValueError: a size or number of components below 1, no hidden layer, or one that is
            narrower than ``size``.
    """

    def __init__(
        self, size: int, hidden: Sequence[int] | None = None, *, components: int = 1
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"Autoregressive(components={components}): expected at least 1")
        self.net = MADE(size, 0, 3 * components, hidden)
        apart = torch.linspace(-0.5, 0.5, components) if components > 1 else torch.zeros(1)
        last = self.net.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            # Biases of log-weights, locations and scales, one for each latent of each component.
            last.bias.unflatten(0, (3, components, size))[1].add_(apart.unsqueeze(-1))

    def forward(self) -> TorchDistribution:
        return AutoregressiveMixture(self.net)
