"""Recipes of discrete latents, by each of their estimators."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from ppl_vae.data import Dataset, load_data
from ppl_vae.discrete import Baseline, Bits, Estimator
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models.categorical_vae import CategoricalVAE
from ppl_vae.models.sigmoid_belief_network import SigmoidBeliefNetwork
from ppl_vae.nn import MLP, Rescaled
from ppl_vae.objectives import VIMCO, LeaveOneOut, ReweightedWakeSleep, RowObjective
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import example, width

Way = Literal[
    "enumerate",
    "score",
    "relaxed",
    "straight-through",
    "leave-one-out",
    "vimco",
    "reweighted-wake-sleep",
]
"""How a guide of bits is learned: an estimator of the ELBO, or an objective of several draws."""

Baselines = Literal["none", "average", "net", "both"]


def sbn_static_mnist(
    *,
    estimator: Way = "score",
    baseline: Baselines = "both",
    draws: int = 5,
    temperature: float = 0.5,
    layers: int = 1,
    latents: int = 200,
) -> Experiment:
    """Sigmoid belief network of static MNIST, with linear layers.

    Mnih & Gregor 2014 (arXiv:1402.0030), table 1: bounds of 113.1 nats by one layer of 200 bits,
    99.8 by two, 96.7 by three, with baselines and normalized variances. Bornschein & Bengio 2015
    (arXiv:1406.2751), table 1: NLL 103.1 nats, 93.4 and 90.1 by reweighted wake-sleep.

    Args:
        estimator: of the guide's gradient; "enumerate" is for 10 latents at most.
        baseline: of "score".
        draws: K, of "leave-one-out", "vimco" and "reweighted-wake-sleep".
        temperature: of "relaxed" and "straight-through".
        layers: of bits.
        latents: bits of each layer.
    """
    data = load_data("static_mnist")
    likelihood = Bernoulli(MLP(latents, width(data)))
    made = _network(data, likelihood, estimator, baseline, draws, temperature, layers, latents)
    made.fit |= {"epochs": 500, "patience": 50}
    return made


def sbn_digits(
    *,
    estimator: Way = "score",
    baseline: Baselines = "both",
    draws: int = 5,
    temperature: float = 0.5,
    layers: int = 1,
    latents: int = 50,
) -> Experiment:
    """Sigmoid belief network of the embedded digits, with linear layers.

    Mnih & Gregor 2014 (arXiv:1402.0030). No published figure for these data.

    Args:
        estimator: of the guide's gradient; "enumerate" is for 10 latents at most.
        baseline: of "score".
        draws: K, of "leave-one-out", "vimco" and "reweighted-wake-sleep".
        temperature: of "relaxed" and "straight-through".
        layers: of bits.
        latents: bits of each layer.
    """
    data = load_data("digits")
    likelihood = Binomial(MLP(latents, width(data)), total_count=16)
    made = _network(data, likelihood, estimator, baseline, draws, temperature, layers, latents, 16)
    made.fit |= {"epochs": 200, "batch_size": 50, "learning_rate": 3e-3}
    return made


def categorical_digits(
    *,
    estimator: Literal["score", "relaxed", "straight-through"] = "relaxed",
    variables: int = 20,
    classes: int = 10,
    temperature: float = 0.5,
    hidden: int = 128,
) -> Experiment:
    """VAE of the embedded digits whose latents are categorical variables.

    Jang et al. 2017 (arXiv:1611.01144). No published figure for these data.

    Args:
        estimator: of the guide's gradient; "score" has both baselines.
        variables: N, how many of them.
        classes: K, of each.
        temperature: of "relaxed" and "straight-through".
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    data = load_data("digits")
    pixels = width(data)
    decoder = MLP(variables * classes, hidden, hidden, pixels)
    model = CategoricalVAE(variables, classes, Binomial(decoder, total_count=16))
    guide = MeanField(
        model,
        MLP(pixels, hidden, hidden),
        example(data),
        discrete=estimator,
        baseline="both" if estimator == "score" else None,
        temperature=temperature,
    )
    fit = {"epochs": 200, "batch_size": 50, "learning_rate": 1e-3}
    return Experiment(model, guide, data, fit)


def _network(
    data: Dataset,
    likelihood: nn.Module,
    estimator: Way,
    baseline: Baselines,
    draws: int,
    temperature: float,
    layers: int,
    latents: int,
    highest: float = 1.0,
) -> Experiment:
    """The guide mirrors the network: each layer given the one below, the lowest given x."""
    objectives: dict[str, type[RowObjective]] = {
        "leave-one-out": LeaveOneOut,
        "vimco": VIMCO,
        "reweighted-wake-sleep": ReweightedWakeSleep,
    }
    model = SigmoidBeliefNetwork([latents] * layers, likelihood)
    settings: dict[str, Any] = {"temperature": temperature}
    if estimator not in objectives:
        settings["estimator"] = cast(Estimator, estimator)
    if estimator == "score" and baseline != "none":
        settings["baseline"] = cast(Baseline, baseline)
    sites: dict[str, Any] = {}
    for level in range(1, layers + 1):
        inputs, below = (width(data), "x") if level == 1 else (latents, f"z{level - 1}")
        own = dict(settings)
        if settings.get("baseline") in ("net", "both"):
            # The hyperbolic tangents of Mnih & Gregor 2014 would not tell large counts apart.
            scaled = Rescaled(inputs, highest if level == 1 else 1.0)
            own["baseline_net"] = nn.Sequential(scaled, MLP(inputs, 100, 1, activation=nn.Tanh))
        sites[f"z{level}"] = Bits(MLP(inputs, latents), **own), [below]
    fit: dict[str, Any] = {"learning_rate": 1e-3}
    if estimator in objectives:
        fit["objective"] = objectives[estimator](draws)
    return Experiment(model, Factorized(**sites), data, fit)
