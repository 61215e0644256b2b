"""Drawing from a pair given data: the rows held out, the latents given them, the model anew.

Draws are made together, in a plate of particles to the left of the model's own plates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from ppl_vae.data import Dataset, Rows, as_dataset
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import Site, read_sites

_PARTICLES = "particles"
_ROWS_AT_ONCE = 4096  # rows times draws in one run, so that nets' hidden layers stay small
_VALUES_AT_ONCE = 2**20  # and drawn values


def example(model: torch.nn.Module) -> Tensor:
    """A tensor of the model's device and dtype."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in held if tensor.is_floating_point()), torch.zeros(()))


def observed(
    model: GenerativeModel, rows: Rows, indices: Tensor | slice, withheld: Collection[str] = ()
) -> dict[str, Tensor]:
    """What the model observes of these rows but for ``withheld`` sites, and its covariates, on its
    device and in its dtype."""
    like = example(model)
    columns = rows.batch(indices, device=like.device, dtype=like.dtype)
    return model.observed({k: column for k, column in columns.items() if k not in withheld})


def held_out(
    model: GenerativeModel, data: Any, *, split: str, rows: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A random subset of a split: row numbers ``(rows,)``, ascending, and what the model observes
    of them, with its covariates. Labels that are withheld from some rows of the split are left out.

    Never a prefix: the rows of some test sets stand sorted by class.

    Raises:
        ValueError: no such split, no column that the model observes, or a covariate is missing.
    """
    held = as_dataset(data).split(split)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    chosen = order[:rows].sort().values
    withheld = {"y"}.intersection(model.observables) if held.labeled is not None else ()
    columns = observed(model, held, chosen, withheld)
    if not columns.keys() & set(model.observables):
        raise ValueError(
            f"{type(model).__name__} observes {', '.join(model.observables)}, but the data have "
            f"columns {', '.join(held.columns)}"
        )
    model.covariates_in(columns)  # all are there
    return chosen, columns


def some_covariates(
    model: GenerativeModel, data: Dataset, n: int, *, seed: int
) -> dict[str, Tensor]:
    """Covariates of ``n`` rows of the test split, at random; again from the first where it has
    fewer. Of the training split, where there is no other.

    Raises:
        ValueError: a covariate is missing.
    """
    if not model.covariates:
        return {}
    held = data.split("test" if "test" in data.splits else "train")
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    return model.covariates_in(observed(model, held, order[torch.arange(n) % len(held)]))


def unobserved_sites(model: GenerativeModel, columns: Mapping[str, Tensor]) -> dict[str, Site]:
    """The model's sites where nothing is observed, given the covariates among some columns."""
    given = {name: column[:2] for name, column in model.covariates_in(columns).items()}
    return read_sites(model, n=min(2, *map(len, given.values())) if given else 2, **given)


def after_latents(model: GenerativeModel, columns: Mapping[str, Tensor]) -> list[str]:
    """Observables that the story draws after all latents on which the last of them may depend.

    Those before are given where a row is replicated: with one drawn anew, such as a label, latents
    that came of it would be another's.
    """
    order = list(unobserved_sites(model, columns))
    seen = [name for name in order if name in columns]
    before = [name for name in order[: order.index(seen[-1])] if name not in seen]
    start = order.index(before[-1]) if before else -1
    return [name for name in seen if order.index(name) > start]


def particles(draws: int, nesting: int) -> pyro.plate:
    """The plate in which draws are made, left of ``nesting`` plates of the model."""
    return pyro.plate(_PARTICLES, draws, dim=-1 - nesting)


def rows_at_once(width: int) -> int:
    """How many rows, times draws, one run may have that draws ``width`` values a row."""
    return max(1, min(_ROWS_AT_ONCE, _VALUES_AT_ONCE // width))


def posterior_nodes(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    *,
    draws: int,
    temperature: int = 1,
    fixed: Mapping[str, Tensor] | None = None,
    scored: bool = False,
) -> tuple[dict[str, dict[str, Any]], int]:
    """The latents' trace nodes given the data, under particles; and how many plates nest in those.

    Sites that the model enumerates are drawn from their exact posterior given the others
    (temperature 1), or set to its mode (temperature 0). Latents that are ``fixed`` have the value
    given here, and no node: global ones, as :func:`shared_values` draws them. With ``scored``, the
    guide's nodes have an entry ``log_q``: the log-density of their value, that of an auxiliary site
    through which it was drawn included.
    """
    sites = read_sites(model, **columns)
    nesting = max(len(site.batch_shape) for site in sites.values())
    plate = particles(draws, nesting)
    fixed = dict(fixed or {})
    with own_parameters(model, guide):
        story, conditioned = (poutine.condition(p, data=fixed) for p in (model, guide))
        guide_trace = poutine.trace(plate(conditioned)).get_trace(**columns)
        nodes = {
            name: node
            for name, node in sample_nodes(guide_trace)
            if name in sites and not node["is_observed"]
        }
        if scored:
            drawn: dict[str, dict[str, Any]] = dict(sample_nodes(guide_trace))
            for name, node in nodes.items():
                through = drawn.get(f"{name}_unconstrained")
                node["log_q"] = sum(
                    one["fn"].log_prob(one["value"]).double() for one in (node, through) if one
                )
        enumerated = [
            s.name
            for s in sites.values()
            if s.enumerated and not s.observed and s.name not in nodes
        ]
        if any(sites[name].event_shape for name in enumerated):
            with plate:
                nodes |= _enumerate(story, nodes, columns, enumerated, temperature)
        elif enumerated:
            # Not replayed: a replayed value that depends on an enumerated one loses its dims.
            values = {name: node["value"] for name, node in nodes.items()}
            inferred = infer_discrete(
                plate(poutine.condition(story, data=values)),
                first_available_dim=-2 - nesting,
                temperature=temperature,
            )
            inferred_nodes = dict(sample_nodes(poutine.trace(inferred).get_trace(**columns)))
            nodes |= {name: inferred_nodes[name] for name in enumerated}
    return nodes, nesting


def one_draw(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One draw of every latent given the data, by site, each shaped as in a plain run."""
    sites = read_sites(model, **columns)
    nodes, _ = posterior_nodes(model, guide, columns, draws=1)
    return {
        name: node["value"].reshape(sites[name].batch_shape + sites[name].event_shape)
        for name, node in nodes.items()
    }


def shared_values(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One draw of the global latents from the guide given the data, in the shape that they have in
    a run without particles."""
    shared = [s.name for s in read_sites(model, **columns).values() if not (s.local or s.observed)]
    if not shared:
        return {}
    with own_parameters(model, guide):
        drawn = dict(sample_nodes(poutine.trace(guide).get_trace(**columns)))
    return {name: drawn[name]["value"] for name in shared if name in drawn}


def model_nodes(
    model: GenerativeModel,
    latents: Mapping[str, Tensor],
    *,
    rows: int,
    columns: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """The trace nodes of one run of the model with these latents, the rest drawn.

    Args:
        columns: among them the covariates, of ``rows`` rows.

    Raises:
        ValueError: a covariate is missing.
    """
    given = model.covariates_in(columns)
    with own_parameters(model):
        conditioned = poutine.condition(model, data=dict(latents))
        return dict(sample_nodes(poutine.trace(conditioned).get_trace(n=rows, **given)))


def laid_out(node: Mapping[str, Any], draws: int, nesting: int) -> tuple[list[str], Tensor]:
    """A site's dims, rows first, and its value ``(draws, *dims)``, from a run under particles."""
    value: Tensor = node["value"]
    events = node["fn"].event_dim
    plates = {f.dim: f for f in node["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES}
    value = value.reshape((1,) * (nesting + 1 + events - value.dim()) + value.shape)
    value = value.expand(draws, *value.shape[1:])
    dims: list[str] = []
    for dim in range(-nesting, 0):
        axis = 1 + len(dims)
        if dim in plates:
            value = value.expand(*value.shape[:axis], plates[dim].size, *value.shape[axis + 1 :])
            dims.append("row" if plates[dim].name == ROWS else plates[dim].name)
        else:
            value = value.select(axis, 0)
    if "row" in dims:
        at = dims.index("row")
        value = value.movedim(1 + at, 1)
        dims.insert(0, dims.pop(at))
    name = node["name"]
    dims += [f"{name}_dim"] if events == 1 else [f"{name}_dim_{i}" for i in range(events)]
    return dims, value


def _enumerate(
    model: Callable[..., Any],
    nodes: Mapping[str, dict[str, Any]],
    columns: Mapping[str, Tensor],
    names: list[str],
    temperature: int,
) -> dict[str, dict[str, Any]]:
    """Draws of enumerated sites from their exact posterior, by trying every combination.

    Pyro's ``infer_discrete`` (1.9.2) does the same without trying all, but cannot gather values
    with event dims, such as one-hot labels.
    """
    values = {name: node["value"] for name, node in nodes.items()}
    given = poutine.condition(model, data=values)
    found = dict(sample_nodes(poutine.trace(given).get_trace(**columns)))
    supports = {name: found[name]["fn"].enumerate_support(expand=False) for name in names}
    choices = list(itertools.product(*(range(len(supports[name])) for name in names)))
    scores: list[Tensor] = []
    for choice in choices:
        tried = {
            name: supports[name][k].expand(found[name]["fn"].shape())
            for name, k in zip(names, choice, strict=True)
        }
        trace = poutine.trace(poutine.condition(given, data=tried)).get_trace(**columns)
        terms = [
            node["fn"].log_prob(node["value"])
            for _, node in sample_nodes(trace)
            if any(frame.name == ROWS for frame in node["cond_indep_stack"])
        ]
        scores.append(torch.stack(torch.broadcast_tensors(*terms)).sum(0))
    logits = torch.stack(scores, -1)  # (draws, rows, choices)
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        chosen = torch.distributions.Categorical(logits=logits).sample()
    index = torch.tensor(choices, device=chosen.device)[chosen]  # (draws, rows, sites)
    return {
        name: found[name]
        | {"value": supports[name].flatten(1, -1 - found[name]["fn"].event_dim)[index[..., k], 0]}
        for k, name in enumerate(names)
    }
