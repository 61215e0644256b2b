"""Recipes that change the objective of the plain VAE."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import IWAE, DReG, FreeBits, Objective
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import digits, example, width


def iwae_digits(
    *, draws: int = 50, dreg: bool = False, latents: int = 10, hidden: int = 128
) -> Experiment:
    """Importance-weighted autoencoder of the embedded digits.

    Burda et al. 2016 (arXiv:1509.00519). No published figure for these data.

    Args:
        draws: K, of z for each row.
        dreg: take the doubly reparameterized gradient (Tucker et al. 2019, arXiv:1810.04152).
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    made.fit |= {"objective": (DReG if dreg else IWAE)(draws)}
    return made


def free_bits_digits(*, nats: float = 0.5, latents: int = 10, hidden: int = 128) -> Experiment:
    """VAE of the embedded digits whose KL is free up to some nats a latent.

    Kingma et al. 2016 (arXiv:1606.04934), appendix C.8. No published figure for these data.

    Args:
        nats: of each latent that cost nothing.
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    made.fit |= {"objective": FreeBits(nats), "warmup": 0}
    return made


def iwae_mnist(*, draws: int = 50, dreg: bool = False, latents: int = 50) -> Experiment:
    """Importance-weighted autoencoder of dynamically binarized MNIST, one stochastic layer.

    Burda et al. 2016 (arXiv:1509.00519), table 1: NLL 86.76 nats at K = 1, 85.54 at 5, 84.78 at 50,
    by 5000 importance samples; two layers of 200 tanh units, batch 20, 3280 epochs in which the
    learning rate falls from 1e-3 to 1e-4 in :func:`eight_stages`. The defaults are shorter. With
    the doubly reparameterized gradient (Tucker et al. 2019, arXiv:1810.04152) and z 100, a
    re-implementation has 86.08, 84.90 and 84.32. Training rows are 50,000 here, 59,600 there.

    Args:
        draws: K, of z for each row.
        dreg: take the doubly reparameterized gradient.
        latents: size of z.
    """
    return _tanh(load_data("mnist", binarize="dynamic"), draws, dreg, latents)


def iwae_static_mnist(*, draws: int = 50, dreg: bool = False, latents: int = 50) -> Experiment:
    """Importance-weighted autoencoder of static MNIST, one stochastic layer.

    Burda et al. 2016 (arXiv:1509.00519): NLL 87.1 nats at K = 50, by 5000 importance samples; nets
    and settings as in iwae-mnist. Data: Larochelle & Murray 2011, fixed bits, 50k/10k/10k.

    Args:
        draws: K, of z for each row.
        dreg: take the doubly reparameterized gradient.
        latents: size of z.
    """
    return _tanh(load_data("static_mnist"), draws, dreg, latents)


def iwae2_mnist(*, draws: int = 50, latents: int = 100, top: int = 50) -> Experiment:
    """Importance-weighted autoencoder of dynamically binarized MNIST, two stochastic layers.

    Burda et al. 2016 (arXiv:1509.00519), table 1: NLL 85.33 nats at K = 1, 83.89 at 5, 82.90 at 50;
    between x and z1 two layers of 200 tanh units each way, between z1 and z2 two of 100; settings
    as in iwae-mnist.

    Args:
        draws: K, of both latents for each row.
        latents: size of z1.
        top: size of z2.
    """
    data = load_data("mnist", binarize="dynamic")
    pixels = width(data)
    likelihood = Bernoulli(MLP(latents, 200, 200, pixels, activation=nn.Tanh))
    middle = Normal(MLP(top, 100, 100, 2 * latents, activation=nn.Tanh))
    model = Hierarchy(StandardNormal(top), [middle], likelihood)
    guide = Factorized(
        z1=(Normal(MLP(pixels, 200, 200, 2 * latents, activation=nn.Tanh)), ["x"]),
        z2=(Normal(MLP(latents, 100, 100, 2 * top, activation=nn.Tanh)), ["z1"]),
    )
    return Experiment(model, guide, data, _burda(IWAE(draws)))


def iwae_omniglot(*, draws: int = 50, dreg: bool = False, latents: int = 50) -> Experiment:
    """Importance-weighted autoencoder of dynamically binarized OMNIGLOT at 28x28.

    Burda et al. 2016 (arXiv:1509.00519) use chardata.mat (104.67 nats at K = 50): these images are
    resampled and split otherwise, and figures must not be compared with theirs.

    Args:
        draws: K, of z for each row.
        dreg: take the doubly reparameterized gradient.
        latents: size of z.
    """
    return _tanh(load_data("omniglot", binarize="dynamic"), draws, dreg, latents)


def _tanh(data: Dataset, draws: int, dreg: bool, latents: int) -> Experiment:
    pixels = width(data)
    likelihood = Bernoulli(MLP(latents, 200, 200, pixels, activation=nn.Tanh))
    model = VAE(StandardNormal(latents), likelihood)
    encoder = nn.Sequential(MLP(pixels, 200, 200, activation=nn.Tanh), nn.Tanh())
    guide = MeanField(model, encoder, example(data))
    return Experiment(model, guide, data, _burda((DReG if dreg else IWAE)(draws)))


def _burda(objective: Objective) -> dict[str, Any]:
    fit = {"epochs": 300, "batch_size": 20, "learning_rate": 1e-3, "patience": 50}
    return fit | {"objective": objective, "schedule": "plateau"}


def eight_stages(optimizer: Optimizer) -> LambdaLR:
    """The schedule of Burda et al. 2016 (arXiv:1509.00519), section 5, for ``fit(schedule=)``.

    Stage i of 0 to 7 has 3^i epochs at a learning rate of 10^(-i / 7) times the first: 3280 epochs
    in all, at the end of which the rate is a tenth; it stays there.
    """
    ends = [(3 ** (stage + 1) - 1) // 2 for stage in range(7)]  # 1, 4, 13, ..., 1093
    return LambdaLR(optimizer, lambda epoch: 10.0 ** (-bisect_right(ends, epoch) / 7))
