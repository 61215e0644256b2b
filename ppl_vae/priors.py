"""Priors: conditionals without context, the distributions of root latents."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn


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
