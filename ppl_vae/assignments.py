"""Every combination of values of enumerated sites: drawn for in turn, and put together again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vae.model import GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import aside

Key = tuple[str, str]
"""A figure and the site it belongs to ("" for all together)."""

Figures = dict[Key, Tensor]
"""Float64, ``(draws, rows, ...)``: one draw where all are alike, one row for a global site."""

MOST = 1024
"""Combinations of values that are tried; each costs a run of the model."""


class Assignments:
    """The combinations of values of a pair's enumerated sites.

    Args:
        model, guide: the pair.
        batch: some rows, as the model takes them.
        labels: sites of the guide whose values are tried too, though it may draw them.

    Attributes:
        drawn: values ``(C, event)`` of the guide's sites, by name.
        marginal: of those that the model enumerates.

    Raises:
        ValueError: more combinations than :data:`MOST`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        guide: nn.Module,
        batch: Mapping[str, Tensor],
        labels: Collection[str] = (),
    ) -> None:
        with aside(), own_parameters(model, guide):
            guide_trace = poutine.trace(guide).get_trace(**batch)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(**batch)
        self.drawn = _supports(guide_trace, labels)
        drawn = set(guide_trace.nodes)
        self.marginal = {n: v for n, v in _supports(model_trace, ()).items() if n not in drawn}
        self._sizes = [len(v) for v in (*self.drawn.values(), *self.marginal.values())]
        if math.prod(self._sizes) > MOST:
            names = ", ".join((*self.drawn, *self.marginal))
            raise ValueError(
                f"enumerated sites {names} have {math.prod(self._sizes)} combinations of values; "
                f"expected at most {MOST}: draw some of them in the guide, with another estimator"
            )

    def __bool__(self) -> bool:
        return bool(self.drawn or self.marginal)

    def of_guide(self) -> list[dict[str, Tensor]]:
        """Each combination of the guide's sites."""
        return _product(self.drawn)

    def of_model(self) -> list[dict[str, Tensor]]:
        """Each combination of the model's sites, to go with each one of the guide's."""
        return _product(self.marginal)

    def mean(self, each: Sequence[Figures], log_q: Sequence[Mapping[str, Tensor]]) -> Figures:
        """Figures of each combination of the guide's sites, averaged by its probability."""
        if not self.drawn:
            return each[0]
        return _mean(each, [_total(own, self.drawn).exp() for own in log_q])

    def combine(self, each: Sequence[Figures], log_q: Sequence[Mapping[str, Tensor]]) -> Figures:
        """Scores of all combinations, in the order of :meth:`of_guide`, then :meth:`of_model`, as
        those of one draw.

        Adds "log weight": of the draw, the log-sum of all combinations' importance weights, and of
        each site ``(draws, rows, C)``; and "probability" of each value under the guide, or, of a
        site that the model enumerates, given the draw.
        """
        if not self:
            return each[0]
        bounds = torch.stack(torch.broadcast_tensors(*(f["elbo", ""] for f in each)))
        # Of a combination's probability, on the device of its scores.
        log_p = [_total(own, self.drawn).to(bounds.device) for own in log_q]
        weights = bounds + torch.stack(torch.broadcast_tensors(*log_p))
        count = len(self.of_model())
        # Of the model's sites, the exact posterior given all else.
        posterior = bounds.unflatten(0, (-1, count)).log_softmax(1).flatten(0, 1)
        probabilities = [(own + r).exp() for own, r in zip(log_p, posterior, strict=True)]
        figures = _mean(each, probabilities)
        first = next(iter(self.marginal), None)
        if first is not None:
            entropy = sum(p * r for p, r in zip(probabilities, posterior, strict=True))
            figures["elbo", ""] = figures["elbo", ""] - entropy
            # Of several such sites, the first one's KL has the log-probability of all.
            figures["kl", first] = figures["kl", first] + entropy
        figures["log weight", ""] = weights.logsumexp(0)
        shares = torch.stack(torch.broadcast_tensors(*probabilities))
        for number, name in enumerate((*self.drawn, *self.marginal)):
            others = [n for n in range(len(self._sizes)) if n != number]
            own = weights.unflatten(0, self._sizes)
            of_value = own.logsumexp(others) if others else own
            figures["log weight", name] = of_value.movedim(0, -1)
            own = shares.unflatten(0, self._sizes)
            figures["probability", name] = (own.sum(others) if others else own).movedim(0, -1)
        return figures


def every_value(sites: Mapping[str, Any], draws: int, rows: int) -> list[dict[str, Tensor]]:
    """Every combination of values of sites, ``(draws, rows, event)`` each, from their
    distributions."""
    return [
        {name: value.expand(draws, rows, *value.shape) for name, value in values.items()}
        for values in _product({name: _support(fn) for name, fn in sites.items()})
    ]


def _supports(trace: Trace, labels: Collection[str]) -> dict[str, Tensor]:
    return {
        name: _support(node["fn"])
        for name, node in sample_nodes(trace)
        if not node["is_observed"]
        and (
            node["infer"].get("enumerate") == "parallel"
            or (name in labels and node["fn"].has_enumerate_support)
        )
    }


def _support(fn: Any) -> Tensor:
    values: Tensor = fn.enumerate_support(expand=False)
    return values.reshape(len(values), *fn.event_shape)


def _product(supports: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every combination of values, the last site's changing first."""
    return [
        dict(zip(supports, values, strict=True)) for values in itertools.product(*supports.values())
    ]


def _total(log_q: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
    terms = [log_q[name] for name in names]
    device = terms[0].device if terms else None
    return sum(terms, torch.zeros((1, 1), dtype=torch.float64, device=device))


def _mean(each: Sequence[Figures], probabilities: Sequence[Tensor]) -> Figures:
    """The sum of figures ``(draws, rows, ...)`` times probabilities ``(draws, rows)``."""

    def weighted(value: Tensor, p: Tensor) -> Tensor:
        p = p.reshape(*p.shape, *(1,) * (value.dim() - 2))
        return torch.where(p > 0, p * value, 0.0)

    return {
        key: sum(
            (weighted(f[key], p) for f, p in zip(each, probabilities, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )
        for key in each[0]
    }
