"""What recipes share: an example of the data, and a pair for each protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.guide import AmortizedGuide, Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.mixtures import VampPrior
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP, Gated, GatedMLP
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.schedules import HoldThenDecay

Guide = Callable[..., AmortizedGuide]

COMPARED: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 50,
    "learning_rate": 1e-3,
    "warmup": 20,
}
"""How families are fitted to the digits: all alike, so that their figures can be compared."""


def cooled(hold: int, decay: int, **more: Any) -> dict[str, Any]:
    """Settings of a fit at a learning rate that is held, then falls to 0: fewer epochs than until
    patience runs out, and lower figures. The best epoch is kept, as by the validation rows."""
    return {
        "epochs": hold + decay,
        "schedule": HoldThenDecay(hold, decay),
        "learning_rate": 1e-3,
        "warmup": 30,
        "patience": 100,
        **more,
    }


DECAYED: dict[str, Any] = {
    "batch_size": 200,
    "learning_rate": 1.5e-3,
    "optimizer": "adamw",
    "weight_decay": 0.2,
}
"""With weight decay, for models that fit static bits all too well; it may take a higher rate.
Chosen by the ELBO of the validation rows."""


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
    # Not a GatedMLP, whose last layer is linear: the guide's heads are linear themselves.
    encoder = nn.Sequential(Gated(pixels, hidden), Gated(hidden, hidden))
    made = guide(model, encoder, example(data))
    fit = {"epochs": 500, "patience": 50, "learning_rate": 1e-3, "warmup": 10}
    return Experiment(model, made, data, fit)


def two_levels(
    data: Dataset,
    latents: int,
    likelihood: nn.Module,
    *,
    middle: nn.Module,
    top: nn.Module,
    below: nn.Module,
) -> Experiment:
    """The HVAE of Tomczak & Welling 2018 (arXiv:1705.07120), section 4, out of its nets.

    Args:
        likelihood: p(x | z2, z1).
        middle, top, below: the nets of p(z1 | z2), q(z2 | x) and q(z1 | x, z2).
    """
    model = Hierarchy(StandardNormal(latents), [Normal(middle)], likelihood, skip=True)
    guide = Factorized(z2=(Normal(top), ["x"]), z1=(Normal(below), ["x", "z2"]))
    return Experiment(model, guide, data)


def he_initialized(made: Experiment) -> Experiment:
    """With weights drawn anew, normal of variance 2 / inputs (He et al. 2015, arXiv:1502.01852, eq.
    10), as in the VampPrior paper's code: six times the variance that PyTorch starts linear layers
    with."""
    for module in (made.model, made.guide):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    return made


def with_vamp(made: Experiment, components: int) -> Experiment:
    """With a VampPrior on the only latent, or on the top one of two.

    Pseudo-inputs start as in the paper's code, at a grey of 0.05 with little noise.
    """
    q = made.guide.conditionals["z2"] if isinstance(made.guide, Factorized) else posterior(made)
    made.model.prior = VampPrior.from_noise(q, width(made.data), components)
    return made
