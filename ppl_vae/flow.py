"""What a normalizing flow is here: a module that gives transforms, with or without a context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import Transform
from torch import Tensor, nn

from ppl_vae.conditionals import Normal, join
from ppl_vae.made import shrink
from ppl_vae.nn import MLP


class Flow(nn.Module, ABC):
    """An invertible map of ``(..., size)``, as transforms that may depend on a context.

    To implement: ``transforms``. They are made anew at each call, since a transform keeps its
    last value and log-determinant: nothing of a call is left in the module.

    Args:
        size: number of coordinates.
        context: width of the context; 0: the flow depends on none.
        layers: number of steps.

    Attributes:
        invertible: whether values can be scored that the flow did not draw.

    Raises:
        ValueError: a size or number of layers below 1, or a negative width of the context; in a
            call, a context of another width.
    """

    invertible = True

    def __init__(self, size: int, context: int = 0, *, layers: int) -> None:
        super().__init__()
        if size < 1 or layers < 1 or context < 0:
            raise ValueError(
                f"{type(self).__name__}(size={size}, context={context}, layers={layers}): "
                "expected at least 1 coordinate, at least 1 layer, and no negative width"
            )
        self.size, self.context, self.layers = size, context, layers

    def forward(self, context: Tensor | None = None) -> list[Transform]:
        width = 0 if context is None else context.shape[-1]
        if width != self.context:
            raise ValueError(
                f"{type(self).__name__} was built for a context of width {self.context} "
                f"(0: none), and was given one of {width}"
            )
        return self.transforms(context)

    @abstractmethod
    def transforms(self, context: Tensor | None) -> list[Transform]:
        """The transforms, first to last, for a context ``(..., context)``."""


class FlowNormal(nn.Module):
    """A diagonal normal of the context, moved by a flow of the same context.

    A conditional, as those of :mod:`ppl_vae.conditionals`: several tensors of context are joined.

    Shapes: batch ``(...)``, event ``(size,)``.

    Args:
        net: gives the normal's locations, then pre-softplus scales: ``2 * size`` outputs.
        flow: of the same context as the net, or of none.

    Raises:
        ValueError: in a call, a net whose outputs are not twice the flow's size.
    """

    def __init__(self, net: nn.Module, flow: Flow) -> None:
        super().__init__()
        self.base = Normal(net)
        self.flow = flow

    def forward(self, *context: Tensor) -> TorchDistribution:
        joined = join(*context)
        base = self.base(joined)
        if base.event_shape != (self.flow.size,):
            raise ValueError(
                f"FlowNormal: the net has {2 * base.event_shape[0]} outputs; expected "
                f"{2 * self.flow.size}, a location and a scale for each coordinate of the flow"
            )
        transforms = self.flow(joined if self.flow.context else None)
        return dist.TransformedDistribution(base, transforms)


class RawNumbers(nn.Module):
    """Numbers that set a flow: a net's, or without context learned constants. Begin near ``start``.

    Shapes: context ``(..., context)`` to ``(..., *start.shape)``.

    Args:
        context: width of the context; 0 for none.
        hidden: hidden widths of the net from it.
        start: where the numbers begin, but for a small random part that parts steps alike.
    """

    def __init__(self, context: int, hidden: Sequence[int], start: Tensor) -> None:
        super().__init__()
        self.shape = start.shape
        self.net = MLP(context, *hidden, start.numel(), activation=nn.ELU) if context else None
        if self.net is None:
            self.constant = nn.Parameter(start + 0.01 * torch.randn_like(start))
        else:
            last = self.net[-1]
            assert isinstance(last, nn.Linear)
            shrink(last)
            with torch.no_grad():
                last.bias.add_(start.flatten())

    def forward(self, context: Tensor | None) -> Tensor:
        if self.net is None or context is None:
            return self.constant
        # Autocast would leave them too coarse for a density.
        return self.net(context).to(context.dtype).unflatten(-1, self.shape)
