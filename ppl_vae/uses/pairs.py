"""A pair on rows whose data change: latents proposed by the guide, weighed under the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from ppl_vae.assignments import Assignments
from ppl_vae.draws import example, shared_values
from ppl_vae.evaluation import check_measurable
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import Site, check_pair, read_sites


class State(NamedTuple):
    """Latents of some rows, and what guide and model say of them; all sums in float64.

    Attributes:
        values: of the local latents, ``(rows, event)``.
        log_q: their log-density under the guide given the rows, ``(rows,)``.
        log_x: log-density of the observable that is studied, ``(rows,)``.
        log_rest: that of all else in the story, latents included.
        emitted: the distribution of the observable, batch ``(rows,)``.
    """

    values: dict[str, Tensor]
    log_q: Tensor
    log_x: Tensor
    log_rest: Tensor
    emitted: Any

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x) of each row."""
        return self.log_rest + self.log_x - self.log_q


class Pair:
    """A pair, and the observable that is studied.

    Sites that the model enumerates are drawn from their exact posterior given the guide's draws.
    Global latents are held at one draw from the guide: they belong to no row.

    Args:
        site: the observable.
        columns: rows, with covariates, ``(rows, event)`` each.

    Attributes:
        shape: the observable's event shape.
        width: how many values a row has in all its sites.
        after: names of the sites that come after it in the story, and may depend on it.

    Raises:
        ValueError: no such observable; a site in a plate besides that of the rows; more values of
            enumerated sites than can be tried; a guide that draws a row's latents through an
            auxiliary site that has their density, as Pyro's autoguides do.
        PairError: the guide does not fit the model.
    """

    def __init__(
        self,
        model: GenerativeModel,
        guide: torch.nn.Module,
        site: str,
        columns: Mapping[str, Tensor],
    ) -> None:
        self._model, self._guide, self.site = model, guide, site
        few = {name: column[:2] for name, column in columns.items()}
        sites = read_sites(model, **few)
        check_measurable(sites.values())
        check_pair(model, guide, **few)
        _check_own_densities(read_sites(guide, **few).values())
        self.shape, self.width = sites[site].event_shape, _width(sites.values())
        order = list(sites)
        self.after = tuple(order[order.index(site) + 1 :])
        self._held = shared_values(model, guide, columns)
        self._combinations = Assignments(model, guide, few).of_model()

    def draw(self, columns: Mapping[str, Tensor]) -> State:
        """Latents from the guide given these rows."""
        values, log_q = self._propose(columns, {})
        if self._combinations == [{}]:
            return self._weigh(columns, values, log_q)
        tried = self._tried(columns, values, log_q)
        logits = torch.stack([s.log_rest + s.log_x for s in tried], -1)  # (rows, combinations)
        chosen = torch.distributions.Categorical(logits=logits).sample()
        for name in self._combinations[0]:
            every = torch.stack([one[name] for one in self._combinations])
            values[name] = every[chosen]
        own = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        return self._weigh(columns, values, log_q + own)

    def at(self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> State:
        """The same latents as before, given other rows."""
        summed = self._combinations[0].keys()
        own, log_q = self._propose(
            columns, {name: value for name, value in values.items() if name not in summed}
        )
        state = self._weigh(columns, values, log_q)
        if not summed:
            return state
        tried = self._tried(columns, own, log_q)
        evidence = torch.stack([s.log_rest + s.log_x for s in tried]).logsumexp(0)
        return state._replace(log_q=log_q + state.log_rest + state.log_x - evidence)

    def emitted(self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
        """The observable's distribution given these latents, batch ``(rows,)``."""
        return self._weigh(columns, values, torch.zeros(())).emitted

    def log_joint(self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z) of each row, ``(rows,)``."""
        state = self._weigh(columns, values, torch.zeros(()))
        return state.log_rest + state.log_x

    def _propose(
        self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the guide, or the values given, and their log-density."""
        conditioned = poutine.condition(self._guide, data={**values, **self._held})
        with own_parameters(self._guide):
            trace = poutine.trace(conditioned).get_trace(**columns)
        found: dict[str, Tensor] = {}
        log_q = _zeros(columns)
        for name, node in sample_nodes(trace):
            if node["infer"].get("is_auxiliary") or (node["is_observed"] and name not in values):
                continue
            if _local(node):
                found[name] = node["value"]
                log_q = log_q + node["fn"].log_prob(node["value"]).double()
        return found, log_q

    def _tried(
        self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor], log_q: Tensor
    ) -> list[State]:
        """A state for each combination of values of the enumerated sites."""
        rows = len(log_q)
        return [
            self._weigh(
                columns, {**values, **{k: v.expand(rows, *v.shape) for k, v in one.items()}}, log_q
            )
            for one in self._combinations
        ]

    def _weigh(
        self, columns: Mapping[str, Tensor], values: Mapping[str, Tensor], log_q: Tensor
    ) -> State:
        conditioned = poutine.condition(self._model, data={**values, **self._held})
        with own_parameters(self._model):
            trace = poutine.trace(conditioned).get_trace(**columns)
        log_rest = log_x = _zeros(columns)
        emitted: Any = None
        for name, node in sample_nodes(trace):
            if name == self.site:
                emitted = node["fn"]
                log_x = log_x + emitted.log_prob(node["value"]).double()
            elif _local(node):
                log_rest = log_rest + node["fn"].log_prob(node["value"]).double()
        return State(dict(values), log_q, log_x, log_rest, emitted)


def as_columns(
    model: GenerativeModel, columns: Tensor | Mapping[str, Tensor], site: str
) -> dict[str, Tensor]:
    """What the model observes, and its covariates, on its device and in its dtype.

    Args:
        columns: by name; a tensor alone is the observable ``site``.

    Raises:
        ValueError: no such observable, it is not among the columns, a covariate is missing, or no
            rows.
    """
    if site not in model.observables:
        raise ValueError(
            f"{type(model).__name__} has no observable {site!r}, only "
            f"{', '.join(model.observables)}: choose with site="
        )
    given = {site: columns} if isinstance(columns, Tensor) else dict(columns)
    if site not in given:
        raise ValueError(f"the columns {', '.join(given)} have no {site!r}")
    if not len(given[site]):
        raise ValueError(f"{site!r} has no rows: expected at least 1")
    like = example(model)
    found = model.observed(given)
    model.covariates_in(found)  # all are there
    return {name: column.to(like) for name, column in found.items()}


def entrywise_law(fn: Any) -> Any:
    """The distribution of the entries of an event, each a batch dim; None where they are not
    independent."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def repeated(columns: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """All rows again and again: ``(copies * rows, event)``, each copy's rows together."""
    return {name: c.repeat(copies, *(1,) * (c.dim() - 1)) for name, c in columns.items()}


def resample(values: Tensor, log_weights: Tensor, draws: int) -> Tensor:
    """Draws ``(draws, rows, event)`` from values ``(samples, rows, event)`` in proportion to their
    weights ``(samples, rows)``."""
    chosen = torch.distributions.Categorical(logits=log_weights.T).sample((draws,))
    return values[chosen, torch.arange(values.shape[1], device=values.device)]


def _check_own_densities(sites: Iterable[Site]) -> None:
    """Refuse a guide whose latents cannot be scored without what they were drawn through."""
    for site in sites:
        if site.auxiliary and site.local and site.name.endswith("_unconstrained"):
            raise ValueError(
                f"the guide draws {site.name.removesuffix('_unconstrained')!r} through "
                f"{site.name!r}, so that its density given other rows cannot be told: take a guide "
                "whose sites have densities of their own, such as MeanField"
            )


def _width(sites: Iterable[Site]) -> int:
    return sum(site.event_shape.numel() for site in sites if site.local)


def _local(node: Mapping[str, Any]) -> bool:
    return any(frame.name == ROWS for frame in node["cond_indep_stack"])


def _zeros(columns: Mapping[str, Tensor]) -> Tensor:
    column = next(iter(columns.values()))
    return torch.zeros(len(column), dtype=torch.float64, device=column.device)
