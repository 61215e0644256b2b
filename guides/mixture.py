"""Mixture: for each site several diagonal normals, so that a posterior may have several modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional, positive
from ppl_vae.guide import SiteBySite


class Mixture(SiteBySite):
    """A mixture of diagonal normals on each site's coordinates, moved onto its support.

        q(z1, z2, ... | x) = q(z1 | x) q(z2 | x, z1) ...,
        q(z | x) = sum_k w_k Normal(m_k(x), s_k(x))

    Components start apart: alike, they would get the same gradients and stay together. Draws carry
    gradients to all parameters (:class:`DiagonalMixture`). But a draw near one component says
    little about the weight of another, and learned weights tend to end on few: of 16 trainings on
    a posterior of two equal modes, 14 left less than a tenth to one of them; with weights 1/K, 2.

    Args:
        args, kwargs: model, encoder and example, as :class:`~ppl_vae.guide.AmortizedGuide`.
        components: K of each site.
        learned_weights: whether the weights w depend on x too, or are 1/K.

    Raises:
        PairError: as :class:`~ppl_vae.guide.AmortizedGuide`.
        ValueError: ``components`` below 1.
    """

    def __init__(
        self, *args: Any, components: int = 4, learned_weights: bool = False, **kwargs: Any
    ) -> None:
        if components < 1:
            raise ValueError(f"Mixture(components={components}): expected at least 1")
        self.components, self.learned_weights = components, learned_weights
        super().__init__(*args, **kwargs)

    def head(self, size: int, context: int) -> nn.Module:
        locs = self.components * size
        net = nn.Linear(context, 2 * locs + (self.components if self.learned_weights else 0))
        with torch.no_grad():
            net.bias[:locs].normal_()
        return MixtureOfNormals(net, size, self.components)


class MixtureOfNormals(Conditional):
    """A :class:`DiagonalMixture`; the net gives locations, pre-softplus scales, weights' logits.

    Shapes: a net with ``2 * K * Z`` outputs (all weights 1/K), or ``2 * K * Z + K``, gives batch
    ``(...)``, event ``(Z,)``.

    Args:
        size, components: Z, K.
    """

    def __init__(self, net: nn.Module, size: int, components: int) -> None:
        super().__init__(net)
        self.shape = (2, components, size)

    def distribution(self, parameters: Tensor) -> TorchDistribution:
        _, components, size = self.shape
        normals, logits = parameters.tensor_split([2 * components * size], -1)
        locs, scales = normals.unflatten(-1, self.shape).unbind(-3)
        if not logits.shape[-1]:
            logits = torch.zeros_like(locs[..., 0])
        return DiagonalMixture(locs, positive(scales), logits)


class DiagonalMixture(dist.MixtureOfDiagNormals):
    """Pyro's mixture of diagonal normals, with a mean, and with other gradients of its draws.

    A draw z moves with the parameters such that its density stays the mixture's (pathwise
    derivatives: Jankowiak & Karaletsos 2019, arXiv:1806.01856). With location and scale of a
    component it moves as a draw of it would, times the probability that it is one. Weight that
    flows between components moves it one coordinate after the other: with F and f the components'
    distribution functions and densities in one coordinate,

        q(z) dz_d = -sum_kj dw_k w_j f_j(z_1) .. f_j(z_d-1) [F_k - F_j](z_d) f_k(z_d+1) .. f_k(z_D)

    whose divergence is a telescoping sum, ``-sum_k dw_k (f_k - q)(z)``. Gradients of weights have
    long tails where components lie apart.

    Pyro's own rule (1.9.2) needs two coordinates or more, gives the weights a wrong gradient unless
    the smallest scale of each coordinate is 1, and divides by a density that may underflow.

    Shapes: locs and scales ``(..., K, D)``, logits ``(..., K)``; batch ``(...)``, event ``(D,)``.
    """

    @property
    def mean(self) -> Tensor:
        return (self.probs.unsqueeze(-1) * self.locs).sum(-2)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        which = self.categorical.sample(torch.Size(sample_shape))
        with torch.no_grad():
            own = which[..., None, None].expand(*shape[:-1], 1, shape[-1])
            loc, scale = (
                part.expand(*shape[:-1], *part.shape[-2:]).gather(-2, own).squeeze(-2)
                for part in (self.locs, self.coord_scale)
            )
            z = loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)
            standard = (z.unsqueeze(-2) - self.locs) / self.coord_scale  # (..., K, D)
            log_f = dist.Normal(0.0, 1.0).log_prob(standard) - self.coord_scale.log()
            joint = self.categorical.logits + log_f.sum(-1)
            probability = joint.softmax(-1).unsqueeze(-1)
        moves = probability * (_change(self.locs) + standard * _change(self.coord_scale))
        if self.component_logits.requires_grad:
            log_w = self.categorical.logits.detach() - joint.logsumexp(-1, keepdim=True)
            moves = moves - _flow(standard, log_f, log_w) * _change(self.probs).unsqueeze(-1)
        return z + moves.sum(-2)


def _flow(standard: Tensor, log_f: Tensor, log_w: Tensor) -> Tensor:
    """How a draw moves as its components' weights sink, ``(..., K, D)``.

    Args:
        standard, log_f: the draw in units of each component; its coordinates' log-densities.
        log_w: logarithms of each component's weight, divided by the density of the draw.
    """
    to_here = log_f.cumsum(-1)
    before = to_here - log_f + log_w.unsqueeze(-1)
    log_flow = before.unsqueeze(-3) + (to_here[..., -1:] - to_here).unsqueeze(-2)  # (..., k, j, D)
    below = torch.special.ndtr(standard)
    # Far from all components the flow may exceed every number, and the difference be 0.
    flow = log_flow.clamp(max=_LOG_MOST).exp() * (below.unsqueeze(-2) - below.unsqueeze(-3))
    return flow.sum(-2)


_LOG_MOST = 80.0  # exp of it is a number in single precision


def _change(parameter: Tensor) -> Tensor:
    """Zero, with the gradient of the parameter."""
    return parameter - parameter.detach()
