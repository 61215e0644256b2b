"""What recipes share: an example of the data, and a pair for each protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_vae.data import Dataset, load_data
from ppl_vae.guide import AmortizedGuide
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP, GatedMLP
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment

Guide = Callable[..., AmortizedGuide]

COMPARED: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 50,
    "learning_rate": 1e-3,
    "warmup": 20,
}
"""How families are fitted to the digits: all alike, so that their figures can be compared."""


def example(data: Dataset, rows: int = 2) -> Tensor:
    """Some training rows, as a model takes them."""
    return data.split("train").batch(slice(0, rows))["x"]


def posterior(made: Experiment) -> Callable[[Tensor], TorchDistribution]:
    """q(z | x) of a derived guide, for a VampPrior."""
    return cast(AmortizedGuide, made.guide).posterior


def width(data: Dataset) -> int:
    """The number of entries of a row."""
    return data.splits["train"]["x"].shape[1]


def digits(latents: int, hidden: int, guide: Guide = MeanField) -> Experiment:
    """A VAE of the embedded digits, of which a family's recipe changes one part."""
    data = load_data("digits")
    pixels = width(data)
    likelihood = Binomial(MLP(latents, hidden, hidden, pixels), total_count=16)
    model = VAE(StandardNormal(latents), likelihood)
    made = guide(model, MLP(pixels, hidden, hidden), example(data))
    return Experiment(model, made, data, dict(COMPARED))


def gated(data: Dataset, latents: int, hidden: int, guide: Guide = MeanField) -> Experiment:
    """A VAE of bits with gated layers, as in Tomczak & Welling 2018 (arXiv:1705.07120)."""
    pixels = width(data)
    likelihood = Bernoulli(GatedMLP(latents, hidden, hidden, pixels))
    model = VAE(StandardNormal(latents), likelihood)
    made = guide(model, GatedMLP(pixels, hidden, hidden), example(data))
    fit = {"epochs": 500, "patience": 50, "learning_rate": 1e-3, "warmup": 10}
    return Experiment(model, made, data, fit)
