"""Models whose posteriors are known, with guides that are exact, or wrong in a way that is known.

A check of calibration must pass the exact guides as often as it says, and fail the others. An exact
guide is a conditional: ``Factorized(z=(GammaPosterior(model), ["x"]))``; so is a faulty one, as
``GammaPosterior(model, scale=0.75)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.guide import Factorized
from ppl_vae.model import GenerativeModel
from ppl_vae.models.ppca import PPCA


class _OneLatent(GenerativeModel):
    """A local latent z and data x, each one vector a row."""

    def z_dist(self) -> TorchDistribution:
        raise NotImplementedError

    def x_dist(self, z: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(z), obs=x)


class GammaPoisson(_OneLatent):
    """Counts whose rates are Gamma.

        z_n ~ Gamma(a, b)                   # rates       data | Z
        x_n ~ Poisson(each z_n, M times)    # counts      data | D

    Args:
        latents: Z.
        counts: M, counts of each rate; D = Z M, those of one rate next to each other.
        concentration, rate: a and b.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, latents: int = 3, counts: int = 2, concentration: float = 2.0, rate: float = 0.5
    ) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("a", torch.full((latents,), concentration))
        self.register_buffer("b", torch.full((latents,), rate))

    def z_dist(self) -> TorchDistribution:
        return dist.Gamma(self.a, self.b).to_event(1)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return dist.Poisson(z.repeat_interleave(self.counts, -1)).to_event(1)

    def posterior(self, x: Tensor) -> dist.Gamma:
        """The exact p(z | x) for x ``(rows, D)``, each entry a batch dim: ``(rows, Z)``."""
        totals = x.unflatten(-1, (-1, self.counts)).sum(-1)
        return dist.Gamma(self.a + totals, self.b + self.counts)

    @classmethod
    def toy(cls) -> Self:
        return cls()


class BetaBinomial(_OneLatent):
    """Successes among trials, whose probabilities are Beta.

        z_n ~ Beta(a, b)                    # probabilities     data | Z
        x_n ~ Binomial(T, z_n)              # successes         data | Z

    Args:
        latents: Z.
        trials: T; with 1, the data are bits.
        concentrations: a and b.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, latents: int = 3, trials: int = 5, concentrations: tuple[float, float] = (2.0, 1.0)
    ) -> None:
        super().__init__()
        self.trials = trials
        self.register_buffer("a", torch.full((latents,), concentrations[0]))
        self.register_buffer("b", torch.full((latents,), concentrations[1]))

    def z_dist(self) -> TorchDistribution:
        return dist.Beta(self.a, self.b).to_event(1)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return dist.Binomial(self.trials, z).to_event(1)

    def posterior(self, x: Tensor) -> dist.Beta:
        """The exact p(z | x) for x ``(rows, Z)``, each entry a batch dim: ``(rows, Z)``."""
        return dist.Beta(self.a + x, self.b + self.trials - x)

    @classmethod
    def toy(cls) -> Self:
        return cls()


class TwoModes(_OneLatent):
    """Data that do not tell the sign of their latent.

        z_n ~ Normal(0, I)                  # latent      data | Z
        x_n ~ Normal(|z_n|, s)              # data        data | Z

    Args:
        latents: Z.
        scale: s.
    """

    zero: Tensor

    def __init__(self, latents: int = 2, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("zero", torch.zeros(latents))

    def z_dist(self) -> TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)

    def x_dist(self, z: Tensor) -> TorchDistribution:
        return dist.Normal(z.abs(), self.scale).to_event(1)

    def posterior(self, x: Tensor) -> SignedHalfNormal:
        """The exact p(z | x) for x ``(rows, Z)``, each entry a batch dim: ``(rows, Z)``."""
        precision = 1 + self.scale**-2
        return SignedHalfNormal(x / self.scale**2 / precision, x.new_tensor(precision**-0.5))

    @classmethod
    def toy(cls) -> Self:
        return cls()


class Clusters(GenerativeModel):
    """A mixture of normals, whose class can be observed.

        y_n ~ OneHotCategorical(pi)         # class       data | K
        x_n ~ Normal(mean of y_n, 1)        # data        data | D

    Args:
        classes: K.
        observed: D.
        spread: standard deviation of the means; the larger, the surer the classes.
    """

    means: Tensor
    logits: Tensor

    def __init__(self, classes: int = 4, observed: int = 2, spread: float = 1.5) -> None:
        super().__init__()
        self.classes = classes
        stream = torch.Generator().manual_seed(0)
        means = spread * torch.randn(classes, observed, generator=stream)
        self.register_buffer("means", means.to(torch.get_default_dtype()))
        self.register_buffer("logits", torch.linspace(-0.5, 0.5, classes))

    def y_dist(self) -> TorchDistribution:
        return dist.OneHotCategorical(logits=self.logits)

    def x_dist(self, y: Tensor) -> TorchDistribution:
        return dist.Normal(y @ self.means, 1.0).to_event(1)

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
            return pyro.sample("x", self.x_dist(y), obs=x)

    def posterior(self, x: Tensor) -> dist.OneHotCategorical:
        """The exact p(y | x) for x ``(rows, D)``: batch ``(rows,)``, event ``(K,)``."""
        log_likelihood = dist.Normal(self.means, 1.0).log_prob(x.unsqueeze(-2)).sum(-1)
        return dist.OneHotCategorical(logits=self.logits + log_likelihood)

    @classmethod
    def toy(cls) -> Self:
        return cls()


class SignedHalfNormal(TorchDistribution):
    """A normal cut off below 0, times a random sign: both modes of :class:`TwoModes`.

    Args:
        loc, scale: of the normal before it is cut off.
        modes: 1 for the positive mode alone.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc: Tensor, scale: Tensor, modes: int = 2) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.modes = modes
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SignedHalfNormal:
        shape = torch.Size(batch_shape)
        return SignedHalfNormal(self.loc.expand(shape), self.scale.expand(shape), self.modes)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # By the upper tail, so that a normal that is nearly all cut off keeps its digits.
        above = torch.special.ndtr(self.loc / self.scale)
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        size = self.loc - self.scale * torch.special.ndtri((u * above).clamp_min(1e-37))
        size = size.clamp_min(0.0)
        return size if self.modes == 1 else torch.where(torch.rand_like(u) < 0.5, -size, size)

    def log_prob(self, value: Tensor) -> Tensor:
        above = torch.special.log_ndtr(self.loc / self.scale)
        log_p = dist.Normal(self.loc, self.scale).log_prob(value.abs()) - above
        if self.modes == 1:
            return torch.where(value >= 0, log_p, -math.inf)
        return log_p - math.log(2)


class GaussianPosterior(nn.Module):
    """p(z | x) of PPCA as a conditional of x, exact by default.

    Args:
        model: whose posterior it is; it stays out of the guide's parameters.
        scale: factor of all standard deviations; or a function of x ``(rows, D)``, ``(rows,)``.
        shift: of all locations, in posterior standard deviations.
        rotation: of the first two coordinates, in radians.
        seen: how many columns of x it looks at: exact given these. None: all.
        independent: whether coordinates are independent, each with its exact marginal.
    """

    def __init__(
        self,
        model: PPCA,
        *,
        scale: float | Callable[[Tensor], Tensor] = 1.0,
        shift: float = 0.0,
        rotation: float = 0.0,
        seen: int | None = None,
        independent: bool = False,
    ) -> None:
        super().__init__()
        self.model = (model,)
        self.scale, self.shift, self.rotation = scale, shift, rotation
        self.seen, self.independent = seen, independent

    def forward(self, x: Tensor) -> dist.MultivariateNormal:
        exact = self._exact(x)
        loc, covariance = exact.mean, exact.covariance_matrix
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        loc = loc + self.shift * sd
        if self.independent:
            covariance = sd.square().diag_embed()
        factor = self.scale(x)[..., None, None] if callable(self.scale) else self.scale
        turn = torch.eye(loc.shape[-1]).to(loc)
        if self.rotation:
            cos, sin = math.cos(self.rotation), math.sin(self.rotation)
            turn[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]]).to(loc)
        covariance = turn @ (factor**2 * covariance) @ turn.T
        return dist.MultivariateNormal(loc @ turn.T, covariance)

    def _exact(self, x: Tensor) -> dist.MultivariateNormal:
        (model,) = self.model
        if self.seen is None:
            return model.posterior(x)
        likelihood: Any = model.likelihood
        net, seen = likelihood.net, self.seen
        part = PPCA(net.weight.shape[1], seen).to(x)
        part_likelihood: Any = part.likelihood
        with torch.no_grad():
            part_likelihood.net.weight.copy_(net.weight[:seen])
            part_likelihood.net.bias.copy_(net.bias[:seen])
            part_likelihood.log_scale.copy_(likelihood.log_scale)
        return part.posterior(x[..., :seen])


class EntrywisePosterior(nn.Module):
    """p(z | x) of a model whose latents are independent given x, as a conditional; exact by
    default.

    Args:
        model: its ``posterior`` is of batch ``(rows, Z)``; it stays out of the guide's parameters.
        scale: factor of the standard deviations, the mean being kept: of a Gamma, or, about, of a
            Beta.
        modes: of :class:`TwoModes`: 1 drops the negative one.
    """

    def __init__(
        self, model: GammaPoisson | BetaBinomial | TwoModes, *, scale: float = 1.0, modes: int = 2
    ) -> None:
        super().__init__()
        self.model, self.scale, self.modes = (model,), scale, modes

    def forward(self, x: Tensor) -> TorchDistribution:
        q = self.model[0].posterior(x)
        sharper = self.scale**-2
        if isinstance(q, dist.Gamma):
            q = dist.Gamma(q.concentration * sharper, q.rate * sharper)
        elif isinstance(q, dist.Beta):
            q = dist.Beta(q.concentration1 * sharper, q.concentration0 * sharper)
        else:
            q = SignedHalfNormal(q.loc, q.scale * self.scale, self.modes)
        return q.to_event(1)


class ClassPosterior(nn.Module):
    """p(y | x) of :class:`Clusters`, exact by default.

    Args:
        model: stays out of the guide's parameters.
        sharpness: factor of the logits: above 1, the classes are surer than they should be.
    """

    def __init__(self, model: Clusters, *, sharpness: float = 1.0) -> None:
        super().__init__()
        self.model, self.sharpness = (model,), sharpness

    def forward(self, x: Tensor) -> dist.OneHotCategorical:
        return dist.OneHotCategorical(logits=self.sharpness * self.model[0].posterior(x).logits)


def exact(
    model: PPCA | GammaPoisson | BetaBinomial | TwoModes | Clusters, **faults: Any
) -> Factorized:
    """The exact guide of a model; with the faults of its conditional, one that is wrong in them."""
    if isinstance(model, Clusters):
        return Factorized(y=(ClassPosterior(model, **faults), ["x"]))
    if isinstance(model, PPCA):
        return Factorized(z=(GaussianPosterior(model, **faults), ["x"]))
    return Factorized(z=(EntrywisePosterior(model, **faults), ["x"]))
