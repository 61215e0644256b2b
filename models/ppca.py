"""Probabilistic PCA: the linear-Gaussian model, whose posterior and evidence are known."""

from __future__ import annotations

from typing import Self, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.likelihoods import Gaussian
from ppl_vae.priors import StandardNormal

from .vae import VAE


class PPCA(VAE):
    """Probabilistic principal component analysis (Tipping & Bishop 1999).

        z_n ~ Normal(0, I)                  # latent     data | Z
        x_n ~ Normal(W z_n + mu, sigma)     # data       data | D

    The oracle of the zoo: with ``posterior`` as guide, the ELBO of every single draw is
    ``evidence``. Section 3.2 of the paper (J. R. Stat. Soc. B 61, 611-622) has both formulas.

    Args:
        latents: Z.
        observed: D.
        scale: sigma, the standard deviation of the noise, where learning starts.

    Raises:
        ValueError: a size below 1, or a scale that is not positive.
    """

    def __init__(self, latents: int, observed: int, scale: float = 1.0) -> None:
        if min(latents, observed) < 1 or not scale > 0:
            raise ValueError(
                f"PPCA(latents={latents}, observed={observed}, scale={scale}): "
                "expected sizes of at least 1 and a positive scale"
            )
        decoder = nn.Linear(latents, observed)
        super().__init__(StandardNormal(latents), Gaussian(decoder, scale, learned=True))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact p(z | x) for x ``(rows, D)``: batch ``(rows,)``, event ``(Z,)``.

        Precision ``I + W' W / sigma^2``; location: it, inverted, times ``W' (x - mu) / sigma^2``.
        """
        weight, loc, scale = self._linear_map()
        precision = torch.eye(weight.shape[1]).to(weight) + weight.T @ weight / scale**2
        projected = (x - loc) @ weight / scale**2  # (rows, Z)
        return dist.MultivariateNormal(
            torch.linalg.solve(precision, projected.T).T, precision_matrix=precision
        )

    def evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats, for x ``(rows, D)``: ``(rows,)``."""
        weight, loc, scale = self._linear_map()
        covariance = weight @ weight.T + scale**2 * torch.eye(len(weight)).to(weight)
        return dist.MultivariateNormal(loc, covariance).log_prob(x)

    def _linear_map(self) -> tuple[Tensor, Tensor, Tensor]:
        """W ``(D, Z)``, mu ``(D,)`` and sigma ``()``."""
        likelihood = cast(Gaussian, self.likelihood)
        decoder = cast(nn.Linear, likelihood.net)
        return decoder.weight, decoder.bias, likelihood.log_scale.exp()

    @classmethod
    def toy(cls) -> Self:
        return cls(latents=2, observed=5)
