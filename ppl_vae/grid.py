"""Which parts of the zoo go together: every two of them tried on a small instance.

A pairing that cannot work is refused, when it is built or first run, with a sentence that says why.
Here the sentences are collected; nothing is known of any pair in advance.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae import likelihoods, mixtures, objectives, priors, zoo
from ppl_vae.flows import MaskedAutoregressive
from ppl_vae.guide import AmortizedGuide, Prior
from ppl_vae.model import GenerativeModel, own_parameters
from ppl_vae.nn import MLP
from ppl_vae.objectives import Objective, plain_elbo
from ppl_vae.sites import PairError, aside, check_pair, read_sites

ROWS = 4

PRIORS: dict[str, Callable[[int, AmortizedGuide, Tensor], nn.Module]] = {
    "StandardNormal": lambda size, guide, x: priors.StandardNormal(size),
    "MixtureOfGaussians": lambda size, guide, x: mixtures.MixtureOfGaussians(size, 2),
    "FlowPrior": lambda size, guide, x: priors.FlowPrior(MaskedAutoregressive(size)),
    "Autoregressive": lambda size, guide, x: priors.Autoregressive(size),
    "VampPrior": lambda size, guide, x: mixtures.VampPrior(guide.posterior, x[:2], bounds=None),
}
"""How to make a small one, from the number of latents, the guide and an example of the data."""

LIKELIHOODS: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
    "Bernoulli": (1, likelihoods.Bernoulli),
    "Binomial": (1, lambda net: likelihoods.Binomial(net, 4)),
    "ContinuousBernoulli": (1, likelihoods.ContinuousBernoulli),
    "Gaussian": (1, likelihoods.Gaussian),
    "Laplace": (1, likelihoods.Laplace),
    "DiscretizedLogistic": (2, lambda net: likelihoods.DiscretizedLogistic(net, 4)),
    "DiscretizedLogisticMixture": (
        6,
        lambda net: likelihoods.DiscretizedLogisticMixture(net, 2, 4),
    ),
    "Categorical": (4, lambda net: likelihoods.Categorical(net, 4)),
}
"""How many numbers an entry takes from the net, and how to make a small one."""

OBJECTIVES: dict[str, Callable[[int], Objective | None]] = {
    "ELBO": lambda size: None,
    "EnumeratedELBO": lambda size: objectives.EnumeratedELBO(),
    "SemiSupervised": lambda size: objectives.SemiSupervised(),
    "Beta": lambda size: objectives.Beta(4.0),
    "Capacity": lambda size: objectives.Capacity(1.0, epochs=1),
    "FreeBits": lambda size: objectives.FreeBits(0.1),
    "IWAE": lambda size: objectives.IWAE(2),
    "DReG": lambda size: objectives.DReG(2),
    "StickingTheLanding": lambda size: objectives.StickingTheLanding(),
    "VIMCO": lambda size: objectives.VIMCO(2),
    "LeaveOneOut": lambda size: objectives.LeaveOneOut(2),
    "ReweightedWakeSleep": lambda size: objectives.ReweightedWakeSleep(2, sleep=1.0),
    "BetaTC": lambda size: objectives.BetaTC(4.0),
    "FactorVAE": lambda size: objectives.FactorVAE(MLP(size, 4, 1)),
    "DIPVAE": lambda size: objectives.DIPVAE(1.0, 1.0),
    "InfoVAE": lambda size: objectives.InfoVAE(),
}
"""How to make a small one, from the number of latents; None: Pyro's estimator that fits."""


@dataclass(frozen=True)
class Refusal:
    """Two parts that do not go together, and why."""

    one: str
    other: str
    why: str


def axes() -> dict[str, dict[str, str]]:
    """The parts by what they are: name and first line of each."""
    classes = {
        "models": zoo.models(),
        "guides": zoo.guides(),
        "priors": _classes(PRIORS, priors, mixtures),
        "likelihoods": _classes(LIKELIHOODS, likelihoods),
        "objectives": _classes(OBJECTIVES, objectives),
    }
    lines = {
        axis: {name: zoo.first_line(member) for name, member in found.items()}
        for axis, found in classes.items()
    }
    lines["objectives"] = {"ELBO": zoo.first_line(plain_elbo)} | lines["objectives"]
    return lines


def refusals() -> Iterator[Refusal]:
    """Every two parts that cannot work together, the other parts being the plainest.

    A likelihood is tried with every model alone: guides, priors and objectives meet it through the
    model's density only.
    """
    tried = {name: list(lines) for name, lines in axes().items()}
    for (kind, ones), (other_kind, others) in itertools.combinations(tried.items(), 2):
        if "likelihoods" in (kind, other_kind) and "models" not in (kind, other_kind):
            continue
        for one, other in itertools.product(ones, others):
            if (why := refused(**{kind: one, other_kind: other})) is not None:
                yield Refusal(one, other, why)


def refused(
    models: str = "VAE",
    guides: str | None = None,
    priors: str | None = None,
    likelihoods: str | None = None,
    objectives: str = "ELBO",
) -> str | None:
    """Why these parts do not go together; None if they do. Tried on a small instance.

    Without a guide's name, it is MeanField, or for a model without latents, Prior.
    """
    try:
        with aside():
            torch.manual_seed(0)
            _run(models, guides, priors, likelihoods, objectives)
    except (PairError, ValueError, TypeError) as error:
        return str(error).partition("\n")[0]  # below it, Pyro's traces add shapes
    return None


def _run(
    model_name: str,
    guide_name: str | None,
    prior: str | None,
    likelihood: str | None,
    objective: str,
) -> None:
    model = zoo.models()[model_name].toy()
    if likelihood is not None:
        _check_choosable(model, "likelihood")
        kinds, make = LIKELIHOODS[likelihood]
        net: Any = model.likelihood.net
        entries = model.simulate(2, **model.example_covariates(2))["x"].shape[-1]
        model.likelihood = make(MLP(net.inputs, 8, kinds * entries))
    example = model.observed(model.simulate(ROWS, **model.example_covariates(ROWS)))
    width = sum(x.shape[-1] for x in example.values())
    size = 1
    if guide_name is None and all(s.observed for s in read_sites(model, **example).values()):
        guide: Any = Prior(model)
    else:
        guide = zoo.guides()[guide_name or "MeanField"](model, MLP(width, 8, 7), **example)
        size = next(iter(guide.local_sites.values())).event_shape.numel()
    if prior is not None:
        _check_choosable(model, "prior")
        model.prior = PRIORS[prior](size, guide, next(iter(example.values())))
    check_pair(model, guide, **example)
    maximized = OBJECTIVES[objective](size) or plain_elbo(model, guide, **example)
    with own_parameters(model, guide):
        maximized.loss(model, guide, **example, total=2 * ROWS)


def _check_choosable(model: GenerativeModel, part: str) -> None:
    if part not in inspect.signature(type(model).__init__).parameters:
        raise PairError(f"{type(model).__name__} has no {part} to choose: its story fixes it")


def _classes(named: Mapping[str, Any], *modules: Any) -> dict[str, type]:
    held = {name: value for module in modules for name, value in vars(module).items()}
    return {name: held[name] for name in named if name in held}
