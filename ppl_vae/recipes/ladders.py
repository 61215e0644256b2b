"""Recipes inferred from the top down: ladders, and deep ones of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.guides.top_down import TopDown
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models.deep_ladder import DeepLadder
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import COMPARED, example, width
from ppl_vae.residual import ConvLadder, MLPLadder


def ladder_digits(*, latents: int = 10, hidden: int = 128) -> Experiment:
    """Two levels of latents for the embedded digits, inferred from the top down.

    Sønderby et al. 2016 (arXiv:1602.02282). No published figure for these data.

    Args:
        latents: size of each level.
        hidden: width of the hidden layers of each net.
    """
    data = load_data("digits")
    pixels = width(data)
    likelihood = Binomial(MLP(2 * latents, hidden, hidden, pixels), total_count=16)
    middle = Normal(MLP(latents, hidden, hidden, 2 * latents))
    model = Hierarchy(StandardNormal(latents), [middle], likelihood, skip=True)
    guide = TopDown(model, MLPLadder(pixels, hidden, hidden), example(data))
    return Experiment(model, guide, data, dict(COMPARED))


def ladder_mnist() -> Experiment:
    """Ladder VAE of dynamically binarized MNIST: five levels, from 64 to 4 latents.

    Sønderby et al. 2016 (arXiv:1602.02282), table 1: 81.74 nats by 5000 importance samples; layers
    of 512, 256, 128, 64 and 64 leaky rectifiers, batch 256, Adam 1e-3, warm-up 200 epochs, 2000
    epochs, of which the second half at a falling learning rate; with batch normalization, which
    these nets do not have. The defaults are shorter.
    """
    data = load_data("mnist", binarize="dynamic")
    pixels = width(data)
    sizes, widths = (64, 32, 16, 8, 4), (512, 256, 128, 64, 64)
    levels = [
        Normal(MLP(above, wide, wide, 2 * below, activation=nn.LeakyReLU))
        for above, below, wide in zip(sizes[:0:-1], sizes[-2::-1], widths[:0:-1], strict=True)
    ]
    decoder = MLP(sizes[0], widths[0], widths[0], pixels, activation=nn.LeakyReLU)
    model = Hierarchy(StandardNormal(sizes[-1]), levels, Bernoulli(decoder))
    encoder = MLPLadder(pixels, *widths, activation=nn.LeakyReLU)
    guide = TopDown(model, encoder, example(data))
    fit = {"epochs": 500, "batch_size": 256, "learning_rate": 1e-3, "warmup": 100, "patience": 50}
    return Experiment(model, guide, data, fit)


def deep_ladder_digits(*, depth: int = 6, width: int = 16) -> Experiment:
    """Deep residual convolutional ladder of the embedded digits.

    In the manner of Child 2021 (arXiv:2011.10650). No published figure for these data.

    Args:
        depth: number of levels.
        width: maps of the state and of the encoder.
    """
    data = load_data("digits")
    return _deep(data, partial(Binomial, total_count=16), depth, width, dict(COMPARED))


def deep_ladder_static_mnist(*, depth: int = 6, width: int = 32) -> Experiment:
    """Deep residual convolutional ladder of static MNIST.

    A convolutional ladder has an NLL of 79.24 / 78.52 / 78.30 nats with 3 / 6 / 12 levels
    (figures of a re-implementation of Sønderby et al. 2016, arXiv:1602.02282).

    Args:
        depth: number of levels.
        width: maps of the state and of the encoder.
    """
    return _deep(load_data("static_mnist"), Bernoulli, depth, width)


def deep_ladder_mnist(*, depth: int = 12, width: int = 32) -> Experiment:
    """Deep residual convolutional ladder of dynamically binarized MNIST.

    In the manner of Child 2021 (arXiv:2011.10650). To reach: 78.41 nats of BIVA (Maaløe et al.
    2019, arXiv:1902.02102), 78.01 of NVAE (Vahdat & Kautz 2020, arXiv:2007.03898), whose nets are
    many times as large.

    Args:
        depth: number of levels.
        width: maps of the state and of the encoder.
    """
    return _deep(load_data("mnist", binarize="dynamic"), Bernoulli, depth, width)


def deep_ladder_fashion(*, depth: int = 12, width: int = 32) -> Experiment:
    """Deep residual convolutional ladder of dynamically binarized Fashion-MNIST.

    In the manner of Child 2021 (arXiv:2011.10650). To beat: 225.38 nats of a convolutional model
    with two levels (Norouzi et al. 2020, arXiv:2004.04795).

    Args:
        depth: number of levels.
        width: maps of the state and of the encoder.
    """
    return _deep(load_data("fashion_mnist", binarize="dynamic"), Bernoulli, depth, width)


def _deep(
    data: Dataset,
    likelihood: Callable[[nn.Module], nn.Module],
    depth: int,
    width: int,
    fit: dict[str, Any] | None = None,
) -> Experiment:
    assert data.image_shape is not None
    model = DeepLadder(data.image_shape, likelihood, depth, width=width)
    guide = TopDown(model, ConvLadder(data.image_shape, depth, width), example(data))
    settings = {"epochs": 300, "warmup": 20, "patience": 50, "optimizer": "adamax"}
    settings |= {"learning_rate": 2e-3, "max_grad_norm": 200.0}
    return Experiment(model, guide, data, settings if fit is None else fit)
