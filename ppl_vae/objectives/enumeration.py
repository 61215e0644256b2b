"""Exact sums over the values of discrete sites, in the guide's place or in the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

Nodes = Mapping[str, Mapping[str, Any]]


def enumerated_traces(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    plates: int,
) -> tuple[Trace, Trace]:
    """One run of the guide, and the model's run on its draws: (model, guide).

    A site marked ``infer={"enumerate": "parallel"}`` takes all values of its support, in a dim of
    its own to the left of so many ``plates``.
    """
    guide = EnumMessenger(first_available_dim=-1 - plates)(guide)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    # The second messenger goes on where the first has stopped to hand out dims.
    replayed = EnumMessenger()(poutine.replay(model, trace=guide_trace))
    return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


class Enumeration:
    """The probabilities of enumerated sites' values, and means under them.

    A site that the guide enumerates has the guide's probabilities. One that the model enumerates
    has those of its exact posterior given all else, by which the sum over its values is the
    bound that would be reached with that posterior as guide:

        log sum_y p(x, y, z) = sum_y r(y) (log p(x, y, z) - log r(y)),   r(y) = p(y | x, z)

    Args:
        model_nodes, guide_nodes: of traces that :func:`enumerated_traces` made.
        model_logs, guide_logs: log-probabilities of their sites.

    Attributes:
        probabilities: of all enumerated values together ``(*values, *plates)``; None: there are no
            enumerated sites.
        drawn: dims of the sites that the guide enumerates, by name.
        marginal: dims of those that the model enumerates.
        log_q: log-probabilities of the latter, each given those before it.
    """

    def __init__(
        self,
        model_nodes: Nodes,
        guide_nodes: Nodes,
        model_logs: Mapping[str, Tensor],
        guide_logs: Mapping[str, Tensor],
    ) -> None:
        self.drawn = {n: dim for n, node in guide_nodes.items() if (dim := _dim(node)) is not None}
        self.marginal = {
            name: dim
            for name, node in model_nodes.items()
            if name not in guide_nodes and (dim := _dim(node)) is not None
        }
        self.log_q: dict[str, Tensor] = {}
        self.probabilities: Tensor | None = None
        if not (self.drawn or self.marginal):
            return
        self._plates = -1 - max((*self.drawn.values(), *self.marginal.values()))
        log_probability: Tensor | float = 0.0
        for name in self.drawn:
            log_probability = log_probability + guide_logs[name]
        left = _sum_of([v for v in model_logs.values() if self._varies(v)])
        # Each given those before it: those after it are summed out.
        for name, dim in reversed(self.marginal.items()):
            summed = left.logsumexp(dim, keepdim=True)
            self.log_q[name] = left - summed
            left = summed
        for log_q in self.log_q.values():
            log_probability = log_probability + log_q
        self.probabilities = torch.as_tensor(log_probability).exp()

    def mean(self, values: Tensor, events: int = 0) -> Tensor:
        """Over the enumerated values: ``(*values, *plates, *events)`` to ``(*plates, *events)``."""
        if self.probabilities is None:
            return values
        p = self.probabilities[(..., *(None,) * events)]
        # The log-probability of an impossible value may be infinite.
        weighted = torch.where(p > 0, p * values, 0.0)
        return weighted.sum(tuple(range(weighted.dim() - self._plates - events)))

    def log_sum(self, values: Tensor) -> Tensor:
        """``log sum exp`` over the enumerated values: ``(*values, *plates)`` to ``(*plates)``."""
        if self.probabilities is None:
            return values
        shape = torch.broadcast_shapes(self.probabilities.shape, values.shape)
        return values.expand(shape).flatten(0, len(shape) - 1 - self._plates).logsumexp(0)

    def _varies(self, values: Tensor) -> bool:
        return any(values.dim() >= -dim and values.shape[dim] > 1 for dim in self.marginal.values())


def _dim(node: Mapping[str, Any]) -> int | None:
    return None if node["is_observed"] else node["infer"].get("_enumerate_dim")


def _sum_of(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) if values else torch.zeros(())
