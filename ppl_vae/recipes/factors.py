"""Recipes of rendered sprites, whose factors are known: objectives that disentangle."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ppl_vae.data import load_data
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP, ConvDecoder, ConvEncoder
from ppl_vae.objectives import (
    DIPVAE,
    Beta,
    BetaTC,
    Capacity,
    FactorVAE,
    InfoVAE,
    Objective,
)
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import example


def vae_sprites(*, latents: int = 10, width: int = 16) -> Experiment:
    """Convolutional VAE of rendered sprites at 32x32: what the others are compared with.

    No published figure for these data; on dSprites the plain VAE has a MIG of 0.10 (Chen et al.
    2018, arXiv:1802.04942, whose protocol has 10 latents).

    Args:
        latents: size of z.
        width: channels of the convolution next to the image; each further one has twice as many.
    """
    return _sprites(None, latents, width)


def beta_vae_sprites(*, beta: float = 4.0, latents: int = 10, width: int = 16) -> Experiment:
    """Beta-VAE of rendered sprites.

    Higgins et al. 2017. No published figure for these data; on dSprites MIG 0.21.

    Args:
        beta: weight of the KL.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    return _sprites(Beta(beta), latents, width)


def capacity_sprites(
    *, nats: float = 20.0, gamma: float = 30.0, latents: int = 10, width: int = 16
) -> Experiment:
    """VAE of rendered sprites whose KL is held at a growing capacity.

    Burgess et al. 2018 (arXiv:1804.03599). No published figure for these data.

    Args:
        nats: the last capacity, reached after 10 epochs.
        gamma: weight of the distance from it.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    return _sprites(Capacity(nats, epochs=10, gamma=gamma), latents, width)


def beta_tc_sprites(
    *,
    beta: float = 6.0,
    estimator: Literal["weighted", "stratified"] = "stratified",
    latents: int = 10,
    width: int = 16,
) -> Experiment:
    """Beta-TCVAE of rendered sprites.

    Chen et al. 2018 (arXiv:1802.04942), beta 6. No published figure for these data; on dSprites
    MIG 0.45.

    Args:
        beta: weight of the total correlation.
        estimator: of the aggregate posterior's density.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    return _sprites(BetaTC(beta, estimator=estimator), latents, width)


def factor_vae_sprites(*, gamma: float = 10.0, latents: int = 10, width: int = 16) -> Experiment:
    """FactorVAE of rendered sprites.

    Kim & Mnih 2018 (arXiv:1802.05983); the discriminator has three layers of 256 in place of six of
    1000. No published figure for these data; on dSprites FactorVAE score 0.82, MIG 0.43.

    Args:
        gamma: weight of the total correlation.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    discriminator = MLP(latents, 256, 256, 256, 1, activation=lambda: nn.LeakyReLU(0.2))
    return _sprites(FactorVAE(discriminator, gamma), latents, width)


def dip_vae_sprites(
    *,
    kind: Literal["I", "II"] = "II",
    off_diagonal: float = 10.0,
    diagonal: float = 10.0,
    latents: int = 10,
    width: int = 16,
) -> Experiment:
    """DIP-VAE of rendered sprites.

    Kumar et al. 2018 (arXiv:1711.00848). No published figure for these data.

    Args:
        kind: whether the covariance of the posterior means ("I") or of q(z) ("II") is drawn to
            the identity.
        off_diagonal: weight of the covariances.
        diagonal: weight of the variances.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    return _sprites(DIPVAE(off_diagonal, diagonal, kind), latents, width)


def info_vae_sprites(
    *, alpha: float = 0.0, lam: float = 100.0, latents: int = 10, width: int = 16
) -> Experiment:
    """InfoVAE of rendered sprites, with the maximum mean discrepancy.

    Zhao et al. 2019 (arXiv:1706.02262). No published figure for these data.

    Args:
        alpha: how much of the KL is given up.
        lam: weight of the aggregate posterior's distance from the prior.
        latents: size of z.
        width: channels of the convolution next to the image.
    """
    return _sprites(InfoVAE(alpha, lam), latents, width)


def _sprites(objective: Objective | None, latents: int, width: int) -> Experiment:
    data = load_data("sprites")
    assert data.image_shape is not None
    decoder = nn.Sequential(MLP(latents, 128, 128), nn.ReLU())
    image = ConvDecoder(128, data.image_shape, width)
    model = VAE(StandardNormal(latents), Bernoulli(nn.Sequential(*decoder, image)))
    encoder = nn.Sequential(ConvEncoder(data.image_shape, 128, width), nn.ReLU())
    guide = MeanField(model, encoder, example(data))
    fit = {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "objective": objective}
    return Experiment(model, guide, data, fit)
