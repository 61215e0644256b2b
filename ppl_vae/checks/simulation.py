"""Rows that the fitted model emits, and where their true latents stand among the guide's draws.

If the guide were the posterior, the true latents of a simulated row and the guide's L draws for it
would be exchangeable, so that the rank of the truth among the draws, in any function of latents and
data, would be uniform on 0, ..., L (Cook, Gelman & Rubin 2006; Talts et al. 2018,
arXiv:1804.06788, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.checks.result import NotApplicable, Progress
from ppl_vae.data import as_dataset
from ppl_vae.draws import (
    example,
    held_out,
    laid_out,
    model_nodes,
    particles,
    posterior_nodes,
    rows_at_once,
    shared_values,
)
from ppl_vae.evaluation import NotMeasurable, check_measurable, inferred
from ppl_vae.importance import parts
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import Site, check_data, check_pair, read_sites

LOG_P, LOG_Q, LOG_WEIGHT = "log p(x, z)", "log q(z | x)", "log p(x, z) - log q(z | x)"
"""The quantities of all latents together: log-densities of the model and of the guide."""

_STEPS = {LOG_P: 1e-3, LOG_Q: 1e-3, LOG_WEIGHT: 1e-2}
"""Nats to which they are rounded: what is equal but for rounding errors must be a tie. The weights
of a guide that is exact are all equal, up to the errors of both densities."""


_DIGITS = 16  # times the precision of a log-density: what sums of many terms may be off
_WITH_Q = (LOG_Q, LOG_WEIGHT)


class Quantity(NamedTuple):
    """What truth and draws are compared in.

    Attributes:
        site: the latent that it is a coordinate of; empty for those of all latents together.
        name: such as "z[3]".
    """

    site: str
    name: str


Aspect = Literal["shift", "spread"]

ASPECTS: tuple[Aspect, Aspect] = get_args(Aspect)
"""What is wrong with ranks: too many are high or low; or lie at both ends, or in the middle."""


def words(quantity: Quantity, aspect: Aspect) -> tuple[str, str]:
    """What the guide is where the truth's ranks are too high, or at both ends; and the reverse."""
    if quantity.site:
        # The truth ranks high where the draws lie low.
        return {
            "shift": ("shifted down", "shifted up"),
            "spread": ("too narrow", "too wide"),
        }[aspect]
    if aspect == "spread":
        return "of another shape", "of another shape"
    return {
        LOG_P: ("too wide, or blind to part of the data", "too narrow"),
        LOG_Q: ("too wide", "too narrow"),
        LOG_WEIGHT: ("another than the posterior", "another than the posterior"),
    }[quantity.name]


@dataclass(frozen=True, eq=False)
class Simulation:
    """Ranks of true latents among a guide's draws, for rows that the model emitted.

    Attributes:
        columns: what the guide was given: observables and covariates, ``(rows, ...)`` each.
        quantities: what is ranked.
        ranks: ``(rows, quantities)``, whole numbers from 0 to ``draws``; ties are broken at random.
        draws: L.
        notes: what could not be compared, one sentence each.
    """

    columns: Mapping[str, Tensor]
    quantities: tuple[Quantity, ...]
    ranks: np.ndarray
    draws: int
    notes: tuple[str, ...]


def simulate(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str,
    seed: int,
    rows: int,
    draws: int,
    coordinates: int,
    progress: Progress,
) -> Simulation:
    """Latents and data of ``rows`` rows from the fitted model, and ranks of those latents among
    ``draws`` draws of the guide given those data.

    Ranked are the coordinates of every latent that each row has, labels that the data withhold
    included; and, as they show how latents hang together and on the data (Modrák et al. 2023,
    arXiv:2211.02383), the log-densities log p(x, z) of the model and log q(z | x) of the guide, the
    latter being that of highest-density regions (Hermans et al. 2022, arXiv:2110.06581), and their
    difference: within a row that is the log-ratio of posterior and guide, which parts truth and
    draws better than anything else (Neyman & Pearson). Sites that the model enumerates are drawn
    from their exact posterior given the others; log q is then that of the others. Global latents
    are drawn once from the guide given held-out data; true rows and the guide's draws share this
    value, so that nothing is said of the global latents' own posterior. Covariates are those of
    held-out rows, again from the first where there are fewer.

    To be called where torch's random state is the caller's own (:func:`ppl_vae.sites.evaluating`).

    Args:
        rows, draws: how many.
        coordinates: of a site with more, so many chosen at random are ranked.

    Raises:
        NotApplicable: no row has a latent; a site stands in a plate besides that of the rows.
        ValueError: fewer than 1 of ``rows``, ``draws`` or ``coordinates``; the model emits values
            that are not finite; and as :func:`ppl_vae.draws.held_out`.
        PairError: guide or data do not fit the model.
    """
    if min(rows, draws, coordinates) < 1:
        raise ValueError(f"{rows=}, {draws=}, {coordinates=}: expected at least 1 of each")
    dataset = as_dataset(data)
    hidden = inferred(model, dataset, None)
    _, held = held_out(model, dataset, split=split, rows=rows, seed=seed)
    held = {name: column for name, column in held.items() if name not in hidden}
    check_data(model, [held])
    check_pair(model, guide, **held)
    sites = read_sites(model, **held)
    try:
        check_measurable(sites.values())
    except NotMeasurable as error:
        raise NotApplicable(str(error)) from None
    latent = {name: s for name, s in sites.items() if s.local and not s.observed}
    if not latent:
        raise NotApplicable(f"{type(model).__name__} has no latent that each row has")
    fixed = shared_values(model, guide, held)
    again = torch.arange(rows) % len(next(iter(held.values())))
    given = {k: v[again.to(v.device)] for k, v in model.covariates_in(held).items()}
    seen = [name for name in held if name in model.observables]
    ranker = _Ranker(model, guide, latent, fixed, draws, coordinates)
    at_once = rows_at_once(sum(site.event_shape.numel() for site in sites.values()))
    step = max(1, at_once // (draws + 1))
    columns: list[dict[str, Tensor]] = []
    ranks: list[Tensor] = []
    for part in parts(rows, step):
        size = part.stop - part.start
        own = {name: column[part] for name, column in given.items()}
        story = model_nodes(model, fixed, rows=size, columns=own)
        batch = own | {name: laid_out(story[name], 1, 1)[1][0] for name in seen}
        truth = {name: laid_out(story[name], 1, 1)[1][0] for name in latent}
        _check_finite(model, batch | truth)
        ranks.append(ranker(batch, truth))
        columns.append({name: column.cpu() for name, column in batch.items()})
        progress(part.stop / rows)
    return Simulation(
        columns={name: torch.cat([c[name] for c in columns]) for name in columns[0]},
        quantities=ranker.quantities,
        ranks=torch.cat(ranks).cpu().numpy(),
        draws=draws,
        notes=ranker.notes,
    )


class _Ranker:
    """Ranks of true latents among draws of a guide, batch by batch.

    Args:
        latent: the local latent sites.
        fixed: values of the global ones.
        draws, coordinates: as in :func:`simulate`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        guide: torch.nn.Module,
        latent: Mapping[str, Site],
        fixed: Mapping[str, Tensor],
        draws: int,
        coordinates: int,
    ) -> None:
        self._model, self._guide, self._fixed, self._draws = model, guide, dict(fixed), draws
        self._chosen = {
            name: _some(s.event_shape.numel(), coordinates) for name, s in latent.items()
        }
        self._scores_q = True
        self.quantities = (
            *(
                Quantity(name, coordinates[k])
                for name, coordinates in ((n, site.coordinates) for n, site in latent.items())
                for k in self._chosen[name]
            ),
            *(Quantity("", name) for name in _STEPS),
        )
        self.notes = tuple(
            f"{len(self._chosen[name])} of the {site.event_shape.numel()} coordinates of "
            f"{name} are compared."
            for name, site in latent.items()
            if len(self._chosen[name]) < site.event_shape.numel()
        )

    def __call__(self, batch: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Tensor:
        """Ranks ``(rows, quantities)``, of true latents ``(rows, event)`` of a batch."""
        nodes, nesting = posterior_nodes(
            self._model, self._guide, batch, draws=self._draws, fixed=self._fixed
        )
        ranks: list[Tensor] = []
        values: dict[str, Tensor] = {}
        precision = torch.finfo(example(self._model).dtype).eps
        for name, chosen in self._chosen.items():
            drawn = laid_out(nodes[name], self._draws, nesting)[1]
            values[name] = torch.cat([truth[name].unsqueeze(0).to(drawn), drawn])
            flat = values[name].reshape(*values[name].shape[:2], -1)
            ranks.append(_rank(flat[..., chosen.to(flat.device)]))
        for name, found in self._densities(batch, truth, values, nodes).items():
            ranks.append(_rank(_rounded(found, _STEPS[name], precision).unsqueeze(-1)))
        return torch.cat(ranks, -1)

    def _densities(
        self,
        batch: Mapping[str, Tensor],
        truth: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        nodes: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The log-densities ``(1 + draws, rows)``, those of the truth first."""
        log_p = self._log_p(batch, values)
        if not self._scores_q:
            return {LOG_P: log_p}
        try:
            log_q = self._log_q(batch, truth, nodes)
        except NotImplementedError as reason:  # in the first batch, or in none
            self._scores_q = False
            self.quantities = tuple(q for q in self.quantities if q.name not in _WITH_Q)
            self.notes = (*self.notes, f"The guide's density is not compared: {reason}.")
            return {LOG_P: log_p}
        return {LOG_P: log_p, LOG_Q: log_q, LOG_WEIGHT: log_p - log_q}

    def _log_p(self, batch: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z), of truth and draws in one run of the model."""
        count = 1 + self._draws
        given = poutine.condition(self._model, data=dict(values) | self._fixed)
        with own_parameters(self._model):
            trace = poutine.trace(particles(count, 1)(given)).get_trace(**batch)
        return _total([node for _, node in sample_nodes(trace)], count)

    def _log_q(
        self,
        batch: Mapping[str, Tensor],
        truth: Mapping[str, Tensor],
        nodes: Mapping[str, Any],
    ) -> Tensor:
        """log q(z | x); each draw is scored by what it was drawn from."""
        given = poutine.condition(self._guide, data=dict(truth) | self._fixed)
        with own_parameters(self._guide):
            trace = poutine.trace(given).get_trace(**batch)
        found = dict(sample_nodes(trace))
        if any(node["infer"].get("is_auxiliary") and _local(node) for node in found.values()):
            raise NotImplementedError("it draws auxiliary variables, which the truth lacks")
        names = [name for name in found if name in truth]
        if not names:
            raise NotImplementedError("it draws no latent that each row has")
        of_truth = _total([found[name] for name in names], 1)
        return torch.cat([of_truth, _total([nodes[name] for name in names], self._draws)])


def _rank(values: Tensor) -> Tensor:
    """The rank of the first among the others ``(1 + draws, rows, K)``: ``(rows, K)``, from 0."""
    below = (values[1:] < values[0]).sum(0)
    ties = (values[1:] == values[0]).sum(0)
    u = torch.rand(ties.shape, dtype=torch.float64, device=ties.device)
    return below + (u * (ties + 1)).long()


def _rounded(value: Tensor, step: float, precision: float) -> Tensor:
    """In whole steps, which are larger where ``value`` ``(1 + draws, rows)`` has fewer digits."""
    most = value.abs().amax(0).nan_to_num(0.0, 0.0, 0.0)
    steps = (value / (step + _DIGITS * precision * most)).round()
    return steps.nan_to_num(-math.inf, math.inf, -math.inf)


def _total(nodes: list[dict[str, Any]], draws: int) -> Tensor:
    """The sum of the local sites' log-densities, ``(draws, rows)`` in float64."""
    each = [node["fn"].log_prob(node["value"]).double() for node in nodes if _local(node)]
    total = torch.stack(torch.broadcast_tensors(*each)).sum(0)
    return total.expand(draws, total.shape[-1])


def _some(size: int, most: int) -> Tensor:
    """At most so many of the numbers below ``size``, at random, ascending."""
    return torch.randperm(size)[:most].sort().values


def _local(node: Mapping[str, Any]) -> bool:
    return any(frame.name == ROWS for frame in node["cond_indep_stack"])


def _check_finite(model: GenerativeModel, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{type(model).__name__} emits {float(value[~value.isfinite()][0])} at site "
                f"{name!r}: its parameters or its likelihood have diverged"
            )
