"""The programs that are timed, as Pyro models and guides; nets come from `benchmarks.sizes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from benchmarks.sizes import CLASSES, SIZES, Size, inputs_of
from ppl_vae.conditionals import Conditional, Normal
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel, Program
from ppl_vae.models import VAE
from ppl_vae.priors import StandardNormal


class Pair(NamedTuple):
    """A model and a guide over given nets, and Pyro's estimators of their ELBO."""

    model: GenerativeModel
    guide: Program
    elbo: Callable[[], Any]
    jit_elbo: Callable[[], Any]


class OneHot(Conditional):
    """A one-hot class, from the net's logits."""

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        return dist.OneHotCategorical(logits=parameters)


class TwoLevels(GenerativeModel):
    """A latent above a latent (Sønderby et al. 2016, arXiv:1602.02282, eq. 1-3).

        z2_n ~ Normal(0, I)               # top        data | A
        z1_n ~ Normal(f(z2_n), g(z2_n))   # latent     data | B
        x_n  ~ Bernoulli(h(z1_n))         # image      data | D

    Args:
        nets: ``p_z1`` (f and g), ``decoder`` (h).
    """

    def __init__(self, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.prior = StandardNormal(inputs_of(nets["p_z1"]))
        self.middle = Normal(nets["p_z1"])
        self.likelihood = Bernoulli(nets["decoder"])

    def z2_dist(self) -> TorchDistribution:
        return self.prior()

    def z1_dist(self, z2: Tensor) -> TorchDistribution:
        return self.middle(z2)

    def x_dist(self, z1: Tensor) -> TorchDistribution:
        return self.likelihood(z1)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z2 = pyro.sample("z2", self.z2_dist())
            z1 = pyro.sample("z1", self.z1_dist(z2))
            return pyro.sample("x", self.x_dist(z1), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(SIZES["two-level"].build())


class M2(GenerativeModel):
    """Labels as latents (Kingma et al. 2014, arXiv:1406.5298, eq. 2).

        y_n ~ OneHotCategorical(1/K)      # label      data | K
        z_n ~ Normal(0, I)                # style      data | Z
        x_n ~ Bernoulli(f(y_n, z_n))      # image      data | D

    Args:
        nets: ``decoder`` (f), of the label and the style joined.
    """

    no_logits: Tensor

    def __init__(self, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.register_buffer("no_logits", torch.zeros(CLASSES))
        self.prior = StandardNormal(inputs_of(nets["decoder"]) - CLASSES)
        self.likelihood = Bernoulli(nets["decoder"])

    def y_dist(self) -> TorchDistribution:
        return dist.OneHotCategorical(logits=self.no_logits)

    def z_dist(self) -> TorchDistribution:
        return self.prior()

    def x_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        return self.likelihood(y, z)

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, y, n=n, total=total):
            y = pyro.sample("y", self.y_dist(), obs=y)
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(y, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(SIZES["m2"].build())


class M2Guide(Program):
    """q(y | x) q(z | x, y), with a label that is not given summed over."""

    def __init__(self, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.q_y = OneHot(nets["q_y"])
        self.q_z = Normal(nets["q_z"])

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> None:
        with self.rows(x, y, n=n, total=total):
            if y is None:
                y = pyro.sample("y", self.q_y(x), infer={"enumerate": "parallel"})
            pyro.sample("z", self.q_z(x, y))


class BeliefNet(GenerativeModel):
    """Bits above bits: a sigmoid belief net (Neal 1992; Mnih & Gregor 2014, arXiv:1402.0030).

        z_n ~ Bernoulli(1/2)              # units      data | Z
        x_n ~ Bernoulli(f(z_n))           # image      data | D

    Args:
        nets: ``decoder`` (f).
    """

    no_logits: Tensor

    def __init__(self, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.register_buffer("no_logits", torch.zeros(inputs_of(nets["decoder"])))
        self.likelihood = Bernoulli(nets["decoder"])

    def z_dist(self) -> TorchDistribution:
        return dist.Bernoulli(logits=self.no_logits).to_event(1)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return self.likelihood(z)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls(SIZES["belief-net"].build())


class BeliefNetGuide(Program):
    """q(z | x), whose score-function gradient has a baseline that a net predicts from x."""

    def __init__(self, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.q_z = Bernoulli(nets["encoder"])
        self.baseline = nn.Sequential(nets["baseline"], nn.Flatten(0))  # (rows,)

    def forward(self, x: Tensor, *, n: int | None = None, total: int | None = None) -> None:
        infer: Any = {"baseline": {"nn_baseline": self.baseline, "nn_baseline_input": x}}
        with self.rows(x, n=n, total=total):
            pyro.sample("z", self.q_z(x), infer=infer)


def _vae(nets: nn.ModuleDict) -> Pair:
    model = VAE(StandardNormal(inputs_of(nets["decoder"])), Bernoulli(nets["decoder"]))
    guide = Factorized(z=(Normal(nets["encoder"]), ["x"]))
    return Pair(model, guide, pyro.infer.Trace_ELBO, pyro.infer.JitTrace_ELBO)


def _two_levels(nets: nn.ModuleDict) -> Pair:
    guide = Factorized(z1=(Normal(nets["q_z1"]), ["x"]), z2=(Normal(nets["q_z2"]), ["z1"]))
    return Pair(TwoLevels(nets), guide, pyro.infer.Trace_ELBO, pyro.infer.JitTrace_ELBO)


def _m2(nets: nn.ModuleDict) -> Pair:
    return Pair(
        M2(nets),
        M2Guide(nets),
        lambda: pyro.infer.TraceEnum_ELBO(max_plate_nesting=1),
        lambda: pyro.infer.JitTraceEnum_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
    )


def _belief_net(nets: nn.ModuleDict) -> Pair:
    return Pair(
        BeliefNet(nets),
        BeliefNetGuide(nets),
        pyro.infer.TraceGraph_ELBO,
        pyro.infer.JitTraceGraph_ELBO,
    )


PAIRS: dict[str, Callable[[nn.ModuleDict], Pair]] = {
    "vae": _vae,
    "two-level": _two_levels,
    "m2": _m2,
    "belief-net": _belief_net,
}


def pair(size: Size, nets: nn.ModuleDict) -> Pair:
    """The model and the guide of a size, over ``nets`` (``size.build()``), which they share."""
    return PAIRS[size.program](nets)
