"""A fitted pair as ArviZ's DataTree: posterior, predictive, prior and data in one object.

ArviZ 1.x has no ``from_pyro``; this goes through ``arviz_base.from_dict``, which 0.8 and 1.x share.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from ppl_vae.data import as_dataset
from ppl_vae.model import ROWS, GenerativeModel, own_parameters
from ppl_vae.sites import check_data, check_pair, evaluating, read_sites, sample_nodes

if TYPE_CHECKING:
    from xarray import DataTree

_Named = dict[str, np.ndarray]
_PARTICLES = "particles"
_ROWS_AT_ONCE = 4096  # rows times draws in one run, so that nets' hidden layers stay small
_VALUES_AT_ONCE = 2**20  # and drawn values


def to_arviz(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    rows: int = 100,
    draws: int = 100,
    seed: int = 0,
) -> DataTree:
    """Draws from a fitted pair, as ArviZ and its plots read them.

    ``posterior``: latents given the rows' data, from the guide; sites that the model enumerates
    are drawn from their exact posterior given the guide's. ``posterior_predictive``: the
    observables anew from those latents, labels included. ``prior`` and ``prior_predictive``: the
    story from its start, as many rows a draw. ``observed_data``: the rows. Dims are
    ``chain, draw, row, <site>_dim``; a global site has no ``row``; a site with several event dims
    has ``<site>_dim_0, ...``; a further plate gives a dim of its name. Discrete sites are the
    smallest signed integers that hold them.

    Rows are a seeded random subset without replacement, in ascending order, with their number in
    the split as coordinate ``row``. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        rows: how many rows; all of them where the split has fewer.
        draws: draws a row.
        seed: of rows and draws.

    Raises:
        ValueError: ``rows`` or ``draws`` below 1, no such split, or no column that the model
            observes.
        PairError: guide or data do not fit the model.
    """
    from arviz_base import from_dict  # takes a second, which only those who call this pay

    if rows < 1 or draws < 1:
        raise ValueError(f"to_arviz(rows={rows}, draws={draws}): expected at least 1 of each")
    with evaluating(seed, model, guide):
        chosen, columns = held_out(model, data, split=split, rows=rows, seed=seed)
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        groups, dims = _groups(model, guide, columns, draws)
    groups["observed_data"] = {}
    sites = read_sites(model, n=2)
    for name, values in columns.items():
        groups["observed_data"][name] = _numpy(values, sites[name].support.is_discrete)
    return from_dict(
        {group: groups[group] for group in _ORDER if groups.get(group)},
        coords={"row": chosen.numpy()},
        dims=dims,
        attrs={
            "/": {
                "model": type(model).__name__,
                "guide": type(guide).__name__,
                "split": split,
                "seed": seed,
                **{f"{name}_version": number for name, number in versions().items()},
            }
        },
    )


def held_out(
    model: GenerativeModel, data: Any, *, split: str, rows: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A random subset of a split: row numbers ``(rows,)``, ascending, and what the model observes.

    Never a prefix: the rows of some test sets stand sorted by class. The columns are on the
    model's device, in its dtype.

    Raises:
        ValueError: no such split, or no column that the model observes.
    """
    held = as_dataset(data).split(split)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    chosen = order[:rows].sort().values
    like = example(model)
    batch = held.batch(chosen, device=like.device, dtype=like.dtype)
    if not (columns := model.observed(batch)):
        raise ValueError(
            f"{type(model).__name__} observes {', '.join(model.observables)}, but the data have "
            f"columns {', '.join(held.columns)}"
        )
    return chosen, columns


def posterior_nodes(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    *,
    draws: int,
    temperature: int = 1,
) -> tuple[dict[str, dict[str, Any]], int]:
    """The latents' trace nodes given the data, in ``draws`` vectorized draws; and the plates' dims.

    The particles stand to the left of the model's own batch dims, of which there are as many as
    the second return value says. Sites that the model enumerates are drawn from their exact
    posterior given the others (temperature 1), or set to its mode (temperature 0).
    """
    sites = read_sites(model, **columns)
    nesting = max(len(site.batch_shape) for site in sites.values())
    particles = pyro.plate(_PARTICLES, draws, dim=-1 - nesting)
    with own_parameters(model, guide):
        guide_trace = poutine.trace(particles(guide)).get_trace(**columns)
        nodes = {
            name: node
            for name, node in sample_nodes(guide_trace)
            if name in sites and not node["is_observed"]
        }
        enumerated = [
            s.name
            for s in sites.values()
            if s.enumerated and not s.observed and s.name not in nodes
        ]
        if any(sites[name].event_shape for name in enumerated):
            with particles:
                nodes |= _enumerate(model, nodes, columns, enumerated, temperature)
        elif enumerated:
            inferred = infer_discrete(
                particles(poutine.replay(model, trace=guide_trace)),
                first_available_dim=-2 - nesting,
                temperature=temperature,
            )
            inferred_nodes = dict(sample_nodes(poutine.trace(inferred).get_trace(**columns)))
            nodes |= {name: inferred_nodes[name] for name in enumerated}
    return nodes, nesting


def model_nodes(
    model: GenerativeModel, latents: Mapping[str, Tensor], *, rows: int
) -> dict[str, dict[str, Any]]:
    """The trace nodes of one run of the model with these latents, the rest drawn."""
    with own_parameters(model):
        conditioned = poutine.condition(model, data=dict(latents))
        return dict(sample_nodes(poutine.trace(conditioned).get_trace(n=rows)))


def versions() -> dict[str, str]:
    """Versions of what draws and numbers depend on, by import name."""
    names = {"ppl_vae": "ppl-vae", "torch": "torch", "pyro": "pyro-ppl", "arviz_base": "arviz-base"}
    return {name: version(package) for name, package in names.items()}


def _enumerate(
    model: GenerativeModel,
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


_ORDER = ("posterior", "posterior_predictive", "prior", "prior_predictive", "observed_data")


def _groups(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor], draws: int
) -> tuple[dict[str, _Named], dict[str, list[str]]]:
    """Arrays ``(1, draws, ...)`` by group and site, and each site's dims after those two."""
    rows = len(next(iter(columns.values())))
    width = sum(site.event_shape.numel() for site in read_sites(model, n=2).values())
    step = max(1, min(_ROWS_AT_ONCE, _VALUES_AT_ONCE // width) // rows)
    sizes = [min(step, draws - done) for done in range(0, draws, step)]
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    dims: dict[str, list[str]] = {}

    def add(group: str, nodes: Mapping[str, Any], size: int, nesting: int) -> None:
        for name, node in nodes.items():
            site_dims, value = laid_out(node, size, nesting)
            dims[name] = site_dims
            parts.setdefault((group, name), []).append(
                _numpy(value, node["fn"].support.is_discrete)
            )

    for size in sizes:
        latents, nesting = posterior_nodes(model, guide, columns, draws=size)
        add("posterior", latents, size, nesting)
        values = {name: node["value"] for name, node in latents.items()}
        with pyro.plate(_PARTICLES, size, dim=-1 - nesting):
            replicated = model_nodes(model, values, rows=rows)
            drawn = model_nodes(model, {}, rows=rows)
        add("posterior_predictive", {n: replicated[n] for n in columns}, size, nesting)
        add("prior_predictive", {n: drawn[n] for n in columns}, size, nesting)
        latent = {n for n, node in drawn.items() if not node["is_observed"]}.difference(columns)
        add("prior", {n: node for n, node in drawn.items() if n in latent}, size, nesting)
    groups: dict[str, _Named] = {}
    for (group, name), arrays in parts.items():
        groups.setdefault(group, {})[name] = np.concatenate(arrays)[None]
    return groups, dims


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
            sizes = [-1] * value.dim()
            sizes[axis] = plates[dim].size
            value = value.expand(sizes)
            dims.append("row" if plates[dim].name == ROWS else plates[dim].name)
        else:
            value = value.select(axis, 0)
    if "row" in dims:
        at = dims.index("row")
        value = value.movedim(1 + at, 1)
        dims.insert(0, dims.pop(at))
    name = node["name"]
    return dims + (
        [f"{name}_dim"] if events == 1 else [f"{name}_dim_{i}" for i in range(events)]
    ), value


def _numpy(value: Tensor, discrete: bool) -> np.ndarray:
    array = value.detach().cpu().numpy()
    if not discrete:
        return array
    # Signed, since differences of unsigned integers wrap around.
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.int64)


def example(model: torch.nn.Module) -> Tensor:
    """A tensor of the model's device and dtype."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in held if tensor.is_floating_point()), torch.zeros(()))
