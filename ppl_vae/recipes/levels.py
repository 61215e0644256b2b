"""Recipes of grey images as the levels that they are stored in, measured in bits per dimension."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ppl_vae.data import load_data
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture
from ppl_vae.models.vae import VAE
from ppl_vae.nn import Gated, GatedMLP, Rescaled
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import example, width


def logistic_frey_faces(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of the Frey faces, 256 levels under a discretized logistic, with gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120): 4.63 bits per dimension, protocol as in
    vae-static-mnist, 1565 / 200 / 200 frames. Which frames, no paper says, and neighbors in time
    are alike: other splits give other figures (4.63 bits are 1797 nats a frame).

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return _levels("frey_faces", latents, hidden, components=1)


def logistic_fashion(*, components: int = 3, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of grey Fashion-MNIST, 256 levels under mixtures of discretized logistics.

    Salimans et al. 2017 (arXiv:1701.05517) for the likelihood. No published figure for a VAE with
    these nets.

    Args:
        components: of a pixel's mixture; 1 for a single logistic.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return _levels("fashion_mnist", latents, hidden, components)


def _levels(name: str, latents: int, hidden: int, components: int) -> Experiment:
    data = replace(load_data(name), unit=1.0)  # whole levels, as these likelihoods take them
    pixels = width(data)
    numbers = 2 if components == 1 else 3 * components
    decoder = GatedMLP(latents, hidden, hidden, numbers * pixels)
    likelihood = (
        DiscretizedLogistic(decoder)
        if components == 1
        else DiscretizedLogisticMixture(decoder, components)
    )
    model = VAE(StandardNormal(latents), likelihood)
    scaled = Rescaled(pixels, 255.0)
    encoder = nn.Sequential(scaled, Gated(pixels, hidden), Gated(hidden, hidden))
    guide = MeanField(model, encoder, example(data))
    fit = {"epochs": 500, "patience": 50, "learning_rate": 5e-4, "warmup": 10}
    return Experiment(model, guide, data, fit)
