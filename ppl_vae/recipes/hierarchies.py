"""Recipes with several levels of latents: bottom-up inference, ladders, deep ladders."""

from __future__ import annotations

from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.guide import Factorized
from ppl_vae.guides.top_down import TopDown
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.mixtures import VampPrior
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.nn import MLP, GatedMLP
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import COMPARED, example, width
from ppl_vae.residual import MLPLadder


def hvae_digits(*, latents: int = 10, hidden: int = 128) -> Experiment:
    """Two levels of latents for the embedded digits, inferred from the bottom up.

    Tomczak & Welling 2018 (arXiv:1705.07120), section 4. No published figure for these data.

    Args:
        latents: size of each level.
        hidden: width of the two hidden layers of each net.
    """
    data = load_data("digits")
    pixels = width(data)
    likelihood = Binomial(MLP(2 * latents, hidden, hidden, pixels), total_count=16)
    middle = Normal(MLP(latents, hidden, hidden, 2 * latents))
    model = Hierarchy(StandardNormal(latents), [middle], likelihood, skip=True)
    top = Normal(MLP(pixels, hidden, hidden, 2 * latents))
    below = Normal(MLP(pixels + latents, hidden, hidden, 2 * latents))
    guide = Factorized(z2=(top, ["x"]), z1=(below, ["x", "z2"]))
    return Experiment(model, guide, data, dict(COMPARED))


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


def hvae_static_mnist(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """Two levels of latents for static MNIST, gated layers, inferred from the bottom up.

    Tomczak & Welling 2018 (arXiv:1705.07120), table 1: NLL 86.05 nats, by 5000 importance samples;
    protocol as in vae-static-mnist.

    Args:
        latents: size of each level.
        hidden: width of the two gated hidden layers of each net.
    """
    return _hvae(load_data("static_mnist"), latents, hidden)


def hvae_vamp_static_mnist(
    *, components: int = 500, latents: int = 40, hidden: int = 300
) -> Experiment:
    """Two levels of latents for static MNIST with a VampPrior on the top one.

    Tomczak & Welling 2018 (arXiv:1705.07120), table 1: NLL 83.19 nats, by 5000 importance samples;
    protocol as in vae-static-mnist, K 500.

    Args:
        components: number of pseudo-inputs.
        latents: size of each level.
        hidden: width of the two gated hidden layers of each net.
    """
    made = _hvae(load_data("static_mnist"), latents, hidden)
    top = made.guide.conditionals["z2"]
    made.model.prior = VampPrior.from_noise(top, width(made.data), components)
    return made


def hvae_mnist(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """Two levels of latents for dynamically binarized MNIST, inferred from the bottom up.

    Tomczak & Welling 2018 (arXiv:1705.07120), protocol as in vae-static-mnist: NLL 82.42 nats.

    Args:
        latents: size of each level.
        hidden: width of the two gated hidden layers of each net.
    """
    return _hvae(load_data("mnist", binarize="dynamic"), latents, hidden)


def hvae_omniglot(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """Two levels of latents for dynamically binarized OMNIGLOT, inferred from the bottom up.

    Tomczak & Welling 2018 (arXiv:1705.07120) have 103.52 nats on chardata.mat: these images are
    resampled and split otherwise, and figures must not be compared with theirs.

    Args:
        latents: size of each level.
        hidden: width of the two gated hidden layers of each net.
    """
    return _hvae(load_data("omniglot", binarize="dynamic"), latents, hidden)


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


def _hvae(data: Dataset, latents: int, hidden: int) -> Experiment:
    pixels = width(data)
    likelihood = Bernoulli(GatedMLP(2 * latents, hidden, hidden, pixels))
    middle = Normal(GatedMLP(latents, hidden, hidden, 2 * latents))
    model = Hierarchy(StandardNormal(latents), [middle], likelihood, skip=True)
    top = Normal(GatedMLP(pixels, hidden, hidden, 2 * latents))
    below = Normal(GatedMLP(pixels + latents, hidden, hidden, 2 * latents))
    guide = Factorized(z2=(top, ["x"]), z1=(below, ["x", "z2"]))
    fit = {"epochs": 500, "patience": 50, "learning_rate": 1e-3, "warmup": 10}
    return Experiment(model, guide, data, fit)
