"""Masked autoregressive nets, and the distribution that one defines by its conditionals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl_vae.conditionals import join, positive
from ppl_vae.elementwise import SOFTPLUS_IS_1


class MADE(ConditionalAutoRegressiveNN):
    """A net whose numbers for a coordinate depend on the coordinates before it, and on the context.

    Begins near 0. Source: Germain et al. 2015 (arXiv:1502.03509), section 4, with direct
    connections; context as in Paige & Wood 2016 (arXiv:1602.06701), section 3.3.

    Shapes: x ``(..., size)`` and context ``(..., context)`` to ``(..., parameters, size)``.

    Args:
        size: number of coordinates.
        context: width of the context; 0 for none.
        parameters: numbers for each coordinate, at least 2.
        hidden: widths of the hidden layers, each at least ``size``; None: one of
            ``max(32, 2 * size)``.
        reverse: whether the last coordinate comes first.

    Raises:
        ValueError: a size below 1, no hidden layer, or one narrower than ``size``.
    """

    def __init__(
        self,
        size: int,
        context: int,
        parameters: int,
        hidden: Sequence[int] | None = None,
        *,
        reverse: bool = False,
    ) -> None:
        widths = hidden_widths(hidden, size)
        if size < 1 or not widths or min(widths) < size:
            raise ValueError(
                f"size {size}, hidden widths {tuple(widths)}: expected at least 1 coordinate, and "
                "at least one hidden layer, none narrower than size: every coordinate needs a unit "
                "that may see it"
            )
        order = torch.arange(size)
        with warnings.catch_warnings():
            # One coordinate depends on the context alone, which is what is meant.
            warnings.filterwarnings("ignore", "ConditionalAutoRegressiveNN input_dim = 1")
            super().__init__(
                size,
                context,
                widths,
                param_dims=[parameters],
                permutation=order.flip(0) if reverse else order,  # pyright: ignore[reportArgumentType]
                skip_connections=True,
                nonlinearity=nn.ELU(),
            )
        self.order = range(size)[::-1] if reverse else range(size)
        for layer in (self.layers[-1], self.skip_layer):
            shrink(layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = self._forward(x if context is None else join(context, x))
        assert isinstance(out, Tensor)
        return out.to(x.dtype)  # autocast would leave it too coarse for a density

    def coordinates(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each coordinate in the net's order: its number, and a mask ``(size,)`` of its place."""
        places = torch.eye(self.input_dim, dtype=torch.bool, device=x.device)
        return ((i, places[i]) for i in self.order)


def hidden_widths(hidden: Sequence[int] | None, size: int) -> list[int]:
    """Hidden widths as given, or one that suits ``size`` coordinates."""
    return [max(32, 2 * size)] if hidden is None else list(hidden)


def shrink(layer: nn.Module | None, factor: float = 0.01) -> None:
    """Scale the parameters of a net's last layer, so that what it gives begins near 0."""
    if layer is not None:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(factor)


class AutoregressiveMixture(dist.TorchDistribution):
    """Each coordinate a mixture of normals given those before it.

        p(z) = prod_i sum_c w_c(z_<i) Normal(z_i; m_c(z_<i), s_c(z_<i))

    One pass of the net scores all coordinates; a draw takes ``size`` passes, and carries no
    gradient.

    Shapes: batch ``batch_shape``, event ``(size,)``.

    Args:
        net: gives log-weights, locations and pre-softplus scales: ``3 C`` numbers a coordinate,
            for C components. The scale is 1 at 0.
    """

    def __init__(self, net: MADE, batch_shape: Sequence[int] = ()) -> None:
        self.net = net
        super().__init__(torch.Size(batch_shape), torch.Size([net.input_dim]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AutoregressiveMixture:
        return AutoregressiveMixture(self.net, batch_shape)

    @property
    def arg_constraints(self) -> dict[str, Constraint]:
        return {}

    @property
    def support(self) -> Constraint:
        return constraints.real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        value = value.expand(shape)
        log_weights, loc, scale = self._conditionals(value)
        components = dist.Normal(loc, scale).log_prob(value.unsqueeze(-2)) + log_weights
        return components.logsumexp(-2).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            z = next(self.net.parameters()).new_zeros(shape)
            for i, here in self.net.coordinates(z):
                log_weights, loc, scale = (part[..., i] for part in self._conditionals(z))
                drawn = dist.Categorical(logits=log_weights).sample().unsqueeze(-1)
                chosen = dist.Normal(loc.gather(-1, drawn), scale.gather(-1, drawn))
                z = torch.where(here, chosen.sample(), z)
            return z

    def _conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, locations and scales, ``(..., C, size)`` each."""
        logits, loc, raw = self.net(z).chunk(3, -2)
        return logits.log_softmax(-2), loc, positive(raw + SOFTPLUS_IS_1)
