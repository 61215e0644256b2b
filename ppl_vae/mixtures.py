"""Priors that are mixtures: of Gaussians, or of the guide's own posteriors (VampPrior)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent
from torch.distributions import Normal as TorchNormal
from torch.distributions.constraints import Constraint

from ppl_vae.model import own_parameters
from ppl_vae.sites import PairError, aside

Posterior = Callable[[Tensor], TorchDistribution]


class Mixture(TorchDistribution):
    """A mixture whose components are the batch of one distribution, of whatever family.

    Density exact, ``log sum_k w_k p_k(value)``, and so are draws, which are not reparameterized.
    ``MixtureSameFamily`` draws from all components to keep one of them; here each draw costs one.

    Shapes: batch ``()``, or what it is expanded to; event as the components'.

    Args:
        logits: ``(K,)``, log weights up to a constant.
        components: all of them, batch ``(K,)``.
        choose: gives the components with indices ``(n,)``, batch ``(n,)``.
    """

    def __init__(
        self,
        logits: Tensor,
        components: TorchDistribution,
        choose: Callable[[Tensor], TorchDistribution],
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.logits, self.components, self.choose = logits, components, choose
        super().__init__(torch.Size(batch_shape), components.event_shape)

    @property
    def arg_constraints(self) -> dict[str, Constraint]:
        return {}

    @property
    def support(self) -> Constraint:
        return cast(Constraint, self.components.support)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Mixture:
        return Mixture(self.logits, self.components, self.choose, batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            index = dist.Categorical(logits=self.logits).sample(shape)
            drawn = self.choose(index.reshape(-1)).sample()
        return drawn.reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (self._each_log_prob(value) + self.logits.log_softmax(-1)).logsumexp(-1)

    def _each_log_prob(self, value: Tensor) -> Tensor:
        """Of each component, ``(..., K)``."""
        dim = value.dim() - len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[:dim], self.batch_shape)
        if (normals := _diagonal_normals(self.components)) is not None:
            return _log_densities(value.expand(*batch, *self.event_shape), *normals)
        # Expanded, since a flow's net may take its context from the value's shape.
        each = value.unsqueeze(dim).expand(*batch, len(self.logits), *self.event_shape)
        return self.components.log_prob(each)


def _diagonal_normals(components: TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Locations and scales, ``(K, size)``, of components that are diagonal normals."""
    one = isinstance(components, Independent) and components.reinterpreted_batch_ndims == 1
    base = components.base_dist if one else None
    return (base.loc, base.scale) if isinstance(base, TorchNormal) else None


def _log_densities(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Of diagonal normals ``(K, size)`` at ``(..., size)``: ``(..., K)``.

    The squares written out are one matrix product, where a difference an entry would take ``K``
    times the memory of the values; many times slower. In float64, since what is far from 0 cancels.
    """
    z, mean, precision = value.double(), loc.double(), scale.double().pow(-2)
    log_norm = scale.double().log().sum(-1) + z.shape[-1] * math.log(2 * math.pi) / 2
    return nn.functional.linear(
        torch.cat([z.square(), z], -1),
        torch.cat([-precision / 2, mean * precision], -1),
        -(mean.square() * precision).sum(-1) / 2 - log_norm,
    ).to(value.dtype)


class MixtureOfGaussians(nn.Module):
    """A mixture of diagonal normals with learned weights, locations and scales.

    Starts with equal weights, locations spread at random and scales such that the whole has a
    variance of about 1. The prior that the VampPrior is compared with in Tomczak & Welling 2018
    (arXiv:1705.07120).

    Shapes: no context; batch ``()``, event ``(size,)``.

    Args:
        size: number of latents.
        components: K.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, size: int, components: int) -> None:
        super().__init__()
        if min(size, components) < 1:
            raise ValueError(
                f"MixtureOfGaussians(size={size}, components={components}): expected at least 1 "
                "of each"
            )
        half = math.sqrt(0.5)  # variance: half between the components, half within
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(half * torch.randn(components, size))
        self.log_scale = nn.Parameter(torch.full((components, size), math.log(half)))

    def forward(self) -> Mixture:
        scale = self.log_scale.exp()
        return Mixture(
            self.logits,
            dist.Normal(self.loc, scale).to_event(1),
            lambda index: dist.Normal(self.loc[index], scale[index]).to_event(1),
        )


class VampPrior(nn.Module):
    """Mixture of the guide's posteriors at learned pseudo-inputs: ``sum_k w_k q(z | u_k)``.

    Source: Tomczak & Welling 2018, arXiv:1705.07120, eq. 9. The posterior stays the guide's: its
    parameters get gradients through the prior too, but are neither registered nor saved here.
    With a guide that is derived from a model, the prior comes last::

        model = VAE(StandardNormal(40), likelihood)
        guide = MeanField(model, encoder, x)
        model.prior = VampPrior.from_data(guide.posterior, x, components=500)

    Each run of the model costs a pass of the encoder over all pseudo-inputs.

    Shapes: no context; batch ``()``, event as the posterior's.

    Args:
        posterior: from ``(K, D)`` to a distribution of batch ``(K,)``: a conditional, or
            ``guide.posterior``. To be copied, model and guide are copied together.
        pseudo_inputs: u, ``(K, D)``, where learning starts.
        learned_weights: whether w is learned, or 1/K.
        trainable: whether u is learned, or stays.
        bounds: least and greatest value of the data, which pseudo-inputs are kept within by
            clamping, as in the paper's code; None for no bounds. An entry that stands on a bound,
            or that a step takes beyond one, has no gradient from then on: it stays there.

    Raises:
        ValueError: pseudo-inputs of a wrong shape, not finite or out of bounds, bounds out of
            order, or a posterior that does not take such inputs.
        PairError: a posterior that cannot score what it did not draw itself.
    """

    pseudo_inputs: Tensor
    logits: Tensor

    def __init__(
        self,
        posterior: Posterior,
        pseudo_inputs: Tensor,
        *,
        learned_weights: bool = False,
        trainable: bool = True,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_inputs(pseudo_inputs, bounds)
        _check_posterior(posterior, pseudo_inputs[:2])
        self.bounds = bounds
        # A tuple, so that the guide's parameters are not registered a second time.
        self._posterior = (posterior,)
        start = pseudo_inputs.detach().clone()
        if trainable:
            self.pseudo_inputs = nn.Parameter(start)
        else:
            self.register_buffer("pseudo_inputs", start)
        logits = start.new_zeros(len(start))
        if learned_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    @classmethod
    def from_data(
        cls,
        posterior: Posterior,
        x: Tensor,
        components: int,
        *,
        noise: float = 0.01,
        generator: torch.Generator | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        **options: Any,
    ) -> Self:
        """Pseudo-inputs that start at different rows of the data, taken at random, plus noise.

        Args:
            x: rows ``(n, D)``.
            components: K, at most n.
            noise: standard deviation of normal noise, in the data's unit, reflected at the bounds;
                0.01 in the paper's code.
            generator: of rows and noise, on the device of x; None: torch's global one.
            bounds, options: as the constructor's.

        Raises:
            ValueError: fewer rows than components, or none; and as the constructor.
        """
        if not 1 <= components <= len(x):
            raise ValueError(
                f"VampPrior(components={components}): expected 1 to {len(x)}, the number of rows"
            )
        rows = x[torch.randperm(len(x), generator=generator, device=x.device)[:components]]
        start = rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())
        return cls(posterior, _noisy(start, noise, generator, bounds), bounds=bounds, **options)

    @classmethod
    def from_noise(
        cls,
        posterior: Posterior,
        inputs: int,
        components: int,
        *,
        mean: float = 0.05,
        noise: float = 0.01,
        generator: torch.Generator | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        **options: Any,
    ) -> Self:
        """Pseudo-inputs that start at one number plus noise; its defaults are the paper's code's.

        Args:
            inputs: D.
            components: K.
            mean: of all entries, in the data's unit.
            noise, generator, bounds, options: as those of ``from_data``.

        Raises:
            ValueError: as the constructor.
        """
        start = torch.full((components, inputs), mean)
        return cls(posterior, _noisy(start, noise, generator, bounds), bounds=bounds, **options)

    def forward(self) -> Mixture:
        inputs = self.pseudo_inputs
        if self.bounds is not None:
            inputs = inputs.clamp(*self.bounds)
        return Mixture(
            self.logits, self._components(inputs), lambda index: self._components(inputs[index])
        )

    def _components(self, inputs: Tensor) -> TorchDistribution:
        # A statement of the guide's parameters is the guide's to make, not the model's.
        with poutine.block(hide_types=["param"]):
            return self._posterior[0](inputs)


def _noisy(
    start: Tensor,
    noise: float,
    generator: torch.Generator | None,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """With noise, reflected where it crosses a bound: clamped there, an entry could not learn."""
    _check_inputs(start, bounds)
    drawn = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
    start = start + noise * drawn
    if bounds is None:
        return start
    least, greatest = bounds
    start = least + (start - least).abs()
    start = greatest - (greatest - start).abs()
    return start.clamp(*bounds)


def _check_inputs(inputs: Tensor, bounds: tuple[float, float] | None) -> None:
    if inputs.dim() != 2 or 0 in inputs.shape:
        raise ValueError(
            f"VampPrior: pseudo-inputs have shape {tuple(inputs.shape)}; expected (K, D), a row "
            "for each of at least 1 component: flatten images"
        )
    if not inputs.is_floating_point() or not inputs.isfinite().all():
        raise ValueError(
            f"VampPrior: pseudo-inputs of {inputs.dtype} from {inputs.min():g} to "
            f"{inputs.max():g}; expected finite floating-point numbers: pseudo_inputs.float()"
        )
    if bounds is None:
        return
    least, greatest = bounds
    if not (least < greatest and least <= inputs.min() and inputs.max() <= greatest):
        raise ValueError(
            f"VampPrior(bounds={bounds}): pseudo-inputs reach from {inputs.min():g} to "
            f"{inputs.max():g}; give the data's bounds=(least, greatest), or None"
        )


def _check_posterior(posterior: Posterior, inputs: Tensor) -> None:
    """Refuse what cannot be a component, by one evaluation that leaves no trace."""
    with torch.no_grad(), aside(), own_parameters():
        try:
            q = posterior(inputs)
        except RuntimeError as error:
            raise ValueError(
                f"VampPrior: the posterior does not take pseudo-inputs {tuple(inputs.shape)}: "
                f"{error}"
            ) from error
        if q.batch_shape != inputs.shape[:1]:
            raise ValueError(
                f"VampPrior: the posterior of pseudo-inputs {tuple(inputs.shape)} has batch shape "
                f"{tuple(q.batch_shape)}; expected {tuple(inputs.shape[:1])}, one a row: make "
                "the latent's dims event dims with .to_event"
            )
        try:
            q.log_prob(q.sample().roll(1, 0))
        except (KeyError, NotImplementedError) as error:
            raise PairError(
                f"VampPrior: the posterior ({type(q).__name__}) cannot score a value that it did "
                "not draw, as each component must score the draws of the others. Planar, radial "
                "and Sylvester flows cannot; normals and autoregressive flows can"
            ) from error
