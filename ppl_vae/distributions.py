"""Distributions that torch and Pyro lack, or have in a form that does not suit a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class CholeskyNormal(dist.MultivariateNormal):
    """Multivariate normal that scores its own draw by the noise it was made from.

    Solving ``L e = value - loc`` for the noise again loses all digits where L is nearly singular:
    a guide that learns could then raise its objective without bound by rounding errors alone.
    Other values are scored as usual. Takes ``loc`` and ``scale_tril``.
    """

    _drawn: tuple[Tensor, Tensor] | None = None  # the last draw and its noise

    def __init__(self, loc: Tensor, *, scale_tril: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CholeskyNormal:
        loc = self.loc.expand(*batch_shape, -1)
        return CholeskyNormal(loc, scale_tril=self.scale_tril.expand(*batch_shape, -1, -1))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        # No matrix product: autocast would make it coarser than the density of what is drawn.
        value = self.loc + (self.scale_tril * noise.unsqueeze(-2)).sum(-1)
        self._drawn = value, noise
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(self.noise(value)).sum(-1) - self._log_det()

    def noise(self, value: Tensor) -> Tensor:
        """The e of ``value = loc + L e``: as drawn, or else by a triangular solve."""
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        residual = (value - self.loc).unsqueeze(-1)
        solved = torch.linalg.solve_triangular(self.scale_tril, residual, upper=False)
        return solved.squeeze(-1)

    def _log_det(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
