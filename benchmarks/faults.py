"""Pairs and data without a fault, and with one that was planted, for the checks to find.

A scenario makes a model, a guide and data from a seed. Without a fault, the data are the model's
and the guide is its posterior, so that whatever a check finds there is a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from benchmarks.conjugate import BetaBinomial, Clusters, GammaPoisson, TwoModes, exact
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

TRAIN, TEST = 1000, 500
"""Rows."""

Case = tuple[GenerativeModel, nn.Module, Dataset]


class Scenario(NamedTuple):
    """What a check is tried on.

    Attributes:
        make: a pair and its data, from torch's random state.
        about: in a few words.
    """

    make: Callable[[], Case]
    about: str


class LabeledPPCA(GenerativeModel):
    """PPCA around a mean for each class, which is observed.

    y_n ~ OneHotCategorical(pi)               # class     data | K
    z_n ~ Normal(0, I)                        # latent    data | Z
    x_n ~ Normal(W z_n + mu + m(y_n), s)      # data      data | D
    """

    def __init__(self, classes: int = 3, latents: int = 2, observed: int = 6) -> None:
        super().__init__()
        self.classes = classes
        self.within = PPCA(latents, observed, scale=0.7)
        self.register_buffer("means", torch.randn(classes, observed))
        self.register_buffer("logits", torch.zeros(classes))

    def y_dist(self) -> TorchDistribution:
        return dist.OneHotCategorical(logits=self.logits)

    def z_dist(self) -> TorchDistribution:
        return self.within.z_dist()

    def x_dist(self, y: Tensor, z: Tensor) -> TorchDistribution:
        middle: Any = self.within.x_dist(z)
        return dist.Normal(middle.mean + y @ self.means, middle.stddev).to_event(1)

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

    def posterior(self, x: Tensor, y: Tensor) -> TorchDistribution:
        """The exact p(z | x, y)."""
        return self.within.posterior(x - y @ self.means)

    @classmethod
    def toy(cls) -> Self:
        return cls()


class Unscaled(PPCA):
    """Forgets what its batch stands for: ``total`` scales nothing."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        return super().forward(x, n=n)


class Given(nn.Module):
    """A method of a model as a guide's conditional, its parameters staying the model's."""

    def __init__(self, posterior: Callable[..., TorchDistribution]) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, *given: Tensor) -> TorchDistribution:
        return self.posterior(*given)


def rows_of(model: GenerativeModel, train: int = TRAIN, test: int = TEST) -> Dataset:
    """Data that the model emits; one-hot labels as numbers."""
    drawn = model.simulate(train + test)
    columns = {name: drawn[name] for name in model.observables if name in drawn}
    if "y" in columns:
        columns["y"] = columns["y"].argmax(-1)
    return as_dataset(
        {
            "train": {name: value[:train] for name, value in columns.items()},
            "test": {name: value[train:] for name, value in columns.items()},
        }
    )


def ppca(latents: int = 2, observed: int = 6) -> PPCA:
    return PPCA(latents, observed, scale=0.7)


def fitted_ppca(x: Tensor, latents: int) -> PPCA:
    """The maximum of the likelihood of x ``(rows, D)``: Tipping & Bishop 1999, section 3.2."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T.double(), correction=0))
    noise = values[:-latents].mean()
    likelihood: Any = (model := PPCA(latents, x.shape[1])).likelihood
    with torch.no_grad():
        scale = (values[-latents:] - noise).clamp_min(0).sqrt()
        likelihood.net.weight.copy_(vectors[:, -latents:] * scale)
        likelihood.net.bias.copy_(x.mean(0))
        likelihood.log_scale.copy_(noise.sqrt().log())
    return model


def _alike(model: GenerativeModel, **faults: Any) -> Case:
    """A conjugate model with its own data; its guide is exact but for the faults."""
    return model, exact(model, **faults), rows_of(model)  # pyright: ignore[reportArgumentType]


def _fitted() -> Case:
    data = rows_of(ppca())
    model = fitted_ppca(data.splits["train"]["x"], 2)
    return model, exact(model), data


def _labeled(shift: float = 0.0) -> Case:
    model = LabeledPPCA()
    model.logits += shift * torch.tensor([1.0, 0.0, -1.0])
    data = rows_of(model)
    model.logits -= shift * torch.tensor([1.0, 0.0, -1.0])
    return model, Factorized(z=(Given(model.posterior), ["x", "y"])), data


def _inferred() -> Case:
    model = Clusters()
    x = rows_of(model)
    data = as_dataset({name: {"x": split["x"]} for name, split in x.splits.items()})
    return model, exact(model), data


def _withheld(sharpness: float = 1.0) -> Case:
    """Classes of which a few training rows keep theirs."""
    model = Clusters()
    return model, exact(model, sharpness=sharpness), rows_of(model).labeled(100, seed=0)


def _collapsed() -> Case:
    """The decoder leaves its latents aside, and so, rightly, does the posterior."""
    likelihood: Any = (model := ppca()).likelihood
    with torch.no_grad():
        likelihood.net.weight.zero_()
    return model, exact(model), rows_of(model)


def _overfitted() -> Case:
    """As many latents as dims allow, fitted to few rows."""
    data = rows_of(ppca(2, 12), train=40)
    model = fitted_ppca(data.splits["train"]["x"], 10)
    return model, exact(model), data


def _gaussian_for_counts() -> Case:
    data = rows_of(GammaPoisson())
    model = fitted_ppca(data.splits["train"]["x"], 3)
    return model, exact(model), data


def _bernoulli_for_grey() -> Case:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 16, 6)))
    x = torch.sigmoid(rows_of(ppca()).splits["train"]["x"])
    data = as_dataset({"train": x[:500], "test": x[500:]})
    return model, MeanField(model, MLP(6, 16, 16), x=x[:4].round()), data


def _overdispersed() -> Case:
    """Each rate varies from count to count."""
    model = GammaPoisson()
    rates = model.simulate(TRAIN + TEST)["z"].repeat_interleave(model.counts, -1)
    x = torch.poisson(rates * dist.Gamma(2.0, 2.0).sample(rates.shape))
    return model, exact(model), as_dataset({"train": x[:TRAIN], "test": x[TRAIN:]})


def _unscaled() -> Case:
    model = Unscaled(2, 6, scale=0.7)
    return model, exact(model), rows_of(model)


def _series(memory: float = 0.9) -> Case:
    """Each row's latents are much like those of the row before."""
    model = ppca()
    steps = torch.randn(TRAIN + TEST, 2) * (1 - memory**2) ** 0.5
    z = [torch.randn(2)]
    for step in steps:
        z.append(memory * z[-1] + step)
    x = model.x_dist(torch.stack(z[1:])).sample()
    return model, exact(model), as_dataset({"train": x[:TRAIN], "test": x[TRAIN:]})


SOUND: Mapping[str, Scenario] = {
    "PPCA": Scenario(lambda: _alike(ppca()), "linear-Gaussian, exact posterior"),
    "fitted PPCA": Scenario(_fitted, "maximum likelihood of 1000 rows, exact posterior"),
    "Gamma-Poisson": Scenario(lambda: _alike(GammaPoisson()), "counts, positive latents"),
    "Beta-Binomial": Scenario(lambda: _alike(BetaBinomial()), "successes, latents in (0, 1)"),
    "two modes": Scenario(lambda: _alike(TwoModes()), "x tells the size of z, not its sign"),
    "clusters": Scenario(_inferred, "a class a row, inferred exactly"),
    "labels withheld": Scenario(_withheld, "a class that few training rows show"),
    "labels": Scenario(_labeled, "an observed class beside the latents"),
}
"""Nothing is wrong."""

FAULTS: Mapping[str, Scenario] = {
    "collapsed latent": Scenario(_collapsed, "the decoder does not look at z"),
    "posterior too narrow": Scenario(lambda: _alike(ppca(), scale=0.75), "sd times 0.75"),
    "posterior too wide": Scenario(lambda: _alike(ppca(), scale=1.33), "sd times 1.33"),
    "posterior shifted": Scenario(lambda: _alike(ppca(), shift=0.3), "by 0.3 sd"),
    "posterior rotated": Scenario(lambda: _alike(ppca(), rotation=0.5), "by 0.5 rad about 0"),
    "correlations lost": Scenario(
        lambda: _alike(ppca(), independent=True), "exact marginals, independent"
    ),
    "mode dropped": Scenario(lambda: _alike(TwoModes(), modes=1), "z > 0 alone"),
    "classifier too sure": Scenario(lambda: _withheld(2.0), "log-odds of classes times 2"),
    "decoder overfitted": Scenario(_overfitted, "10 latents fitted to 40 rows"),
    "Gaussian for counts": Scenario(_gaussian_for_counts, "fitted to Gamma-Poisson data"),
    "Bernoulli for grey": Scenario(_bernoulli_for_grey, "pixels between 0 and 1"),
    "overdispersed counts": Scenario(_overdispersed, "Poisson rates vary by a Gamma(2, 2)"),
    "missing plate scale": Scenario(_unscaled, "total= is ignored"),
    "label prior shifted": Scenario(lambda: _labeled(0.5), "log-odds off by 0.5"),
    "rows in a series": Scenario(_series, "autoregression, 0.9"),
    "half the input ignored": Scenario(
        lambda: _alike(ppca(), seen=3), "posterior given 3 of 6 columns"
    ),
}
"""One thing is wrong."""
