"""A fitted pair as ArviZ's DataTree: posterior, predictive, prior and data in one object.

ArviZ 1.x has no ``from_pyro``; this goes through ``arviz_base.from_dict``, which 0.8 and 1.x share.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from xarray import DataArray

from ppl_vae.assignments import every_value
from ppl_vae.draws import (
    after_latents,
    held_out,
    laid_out,
    model_nodes,
    particles,
    posterior_nodes,
    rows_at_once,
    unobserved_sites,
)
from ppl_vae.importance import Draws, score
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import check_data, check_pair, evaluating
from ppl_vae.weights import pareto_smoothed

if TYPE_CHECKING:
    from xarray import DataTree

_Named = dict[str, np.ndarray]
_ORDER = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)


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
    observables anew from those latents; one that comes before latents, such as a label, is drawn by
    itself, and what depends on it is given the row's own. ``prior`` and ``prior_predictive``: the
    story from its start, as many rows a draw. ``observed_data``: the rows. ``constant_data``: the
    rows' covariates, given which all is drawn, where the model has such. ``log_likelihood``: of
    each observable of a row, given the row's latents. ``sample_stats``: of each draw and row
    ``log_p``, the log-density of row and local latents together, ``log_q``, that of the latents
    under the guide, and the importance weight ``log_weight``, their difference; and of each row
    its ``pareto_k`` (:func:`ppl_vae.weights.pareto_smoothed`). With them ArviZ's
    ``loo_approximate_posterior(idata, log_p=stats.log_p, log_q=stats.log_q)`` corrects for the
    guide row by row: what is left out is the row, latents and all, so that ``elpd`` estimates the
    evidence. Models with plates besides the rows' have neither group. ArviZ's plots of single
    entries (``plot_ppc_pit``, ``plot_ppc_pava``, ``plot_ppc_rootogram``) take one column of a row:
    ``idata.isel(x_dim=0)``.

    Dims are ``chain, draw, row, <site>_dim``; a global site has no ``row``; a site with several
    event dims has ``<site>_dim_0, ...``; a further plate gives a dim of its name. Discrete sites
    are the smallest signed integers that hold them.

    Rows are a seeded random subset without replacement, in ascending order, with their number in
    the split as coordinate ``row``. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        rows: how many rows; all of them where the split has fewer.
        draws: draws a row.
        seed: of rows and draws.

    Raises:
        ValueError: ``rows`` or ``draws`` below 1, no such split, no column that the model
            observes, or a covariate is missing.
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
        sites = unobserved_sites(model, columns)
    groups["observed_data"], groups["constant_data"] = {}, {}
    for name, values in columns.items():
        if name in sites:
            groups["observed_data"][name] = _numpy(values, sites[name].support.is_discrete)
        else:
            groups["constant_data"][name] = _numpy(values, discrete=False)
            further = (f"_{i}" for i in range(values.dim() - 1)) if values.dim() > 2 else ("",)
            dims[name] = ["row", *(f"{name}_dim{i}" for i in further if values.dim() > 1)]
    tree = from_dict(
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
    row = {"row": chosen.numpy()}
    for group in ("log_likelihood", "sample_stats"):
        if group in groups:  # of one number a row each, under names that are taken
            one_number = {name: ["row"] for name in groups[group]}
            tree[group] = from_dict({group: groups[group]}, coords=row, dims=one_number)[group]
    if "sample_stats" in groups:
        weights = torch.from_numpy(groups["sample_stats"]["log_weight"][0])
        k = DataArray(pareto_smoothed(weights).pareto_k.numpy(), row, "row")
        tree["sample_stats/pareto_k"] = k
    return tree


def versions() -> dict[str, str]:
    """Versions of what draws and numbers depend on, by import name."""
    names = {"ppl_vae": "ppl-vae", "torch": "torch", "pyro": "pyro-ppl", "arviz_base": "arviz-base"}
    return {name: version(package) for name, package in names.items()}


def _groups(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor], draws: int
) -> tuple[dict[str, _Named], dict[str, list[str]]]:
    """Arrays ``(1, draws, ...)`` by group and site, and each site's dims after those two."""
    rows = len(next(iter(columns.values())))
    sites = unobserved_sites(model, columns)
    width = sum(site.event_shape.numel() for site in sites.values())
    step = max(1, rows_at_once(width) // rows)
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

    seen = [name for name in columns if name in sites]
    later = after_latents(model, columns)
    before = {name: columns[name] for name in seen if name not in later}
    for size in sizes:
        latents, nesting = posterior_nodes(model, guide, columns, draws=size, scored=True)
        add("posterior", latents, size, nesting)
        values = {name: node["value"] for name, node in latents.items()}
        with particles(size, nesting):
            replicated = model_nodes(model, values | before, rows=rows, columns=columns)
            drawn = model_nodes(model, {}, rows=rows, columns=columns)
        # Those before latents depend on no latent of the row.
        anew = {n: (drawn if n in before else replicated)[n] for n in seen}
        add("posterior_predictive", anew, size, nesting)
        add("prior_predictive", {n: drawn[n] for n in seen}, size, nesting)
        latent = {n for n, node in drawn.items() if not node["is_observed"]}.difference(columns)
        add("prior", {n: node for n, node in drawn.items() if n in latent}, size, nesting)
        if nesting == 1:
            for group, found in _densities(model, columns, latents, size).items():
                for name, value in found.items():
                    parts.setdefault((group, name), []).append(value.numpy(force=True))
    groups: dict[str, _Named] = {}
    for (group, name), arrays in parts.items():
        groups.setdefault(group, {})[name] = np.concatenate(arrays)[None]
    return groups, dims


def _densities(
    model: GenerativeModel,
    columns: Mapping[str, Tensor],
    latents: Mapping[str, Any],
    draws: int,
) -> dict[str, dict[str, Tensor]]:
    """Float64 ``(draws, rows)``, by group and name, of draws given the data."""
    log_q = {name: node["log_q"] for name, node in latents.items() if "log_q" in node}
    drawn = Draws({name: latents[name]["value"] for name in log_q}, log_q, {})
    summed = {n: n_["fn"] for n, n_ in latents.items() if n not in log_q}
    # Of sites that the model enumerates a weight has the sum, whichever value was drawn.
    each = [
        score(model, columns, drawn._replace(values=drawn.values | values), draws)["elbo", ""]
        for values in every_value(summed, draws, len(next(iter(columns.values()))))
    ]
    weight = torch.stack(torch.broadcast_tensors(*each)).logsumexp(0)
    values = {name: node["value"] for name, node in latents.items()}
    with own_parameters(model):
        given = poutine.condition(model, data=values)
        trace = poutine.trace(particles(draws, 1)(given)).get_trace(**columns)
    log_p: Tensor | float = 0.0
    likelihood: dict[str, Tensor] = {}
    for name, node in sample_nodes(trace):
        if any(frame.name == ROWS for frame in node["cond_indep_stack"]):
            own = node["fn"].log_prob(node["value"]).double()
            log_p = log_p + own
            if name in columns:
                likelihood[name] = own
    shape = (draws, len(next(iter(columns.values()))))
    joint = torch.as_tensor(log_p).expand(shape)
    weight = weight.expand(shape)
    stats = {"log_p": joint, "log_q": joint - weight, "log_weight": weight}
    likelihood = {name: value.expand(shape) for name, value in likelihood.items()}
    return {"log_likelihood": likelihood, "sample_stats": stats}


def _numpy(value: Tensor, discrete: bool) -> np.ndarray:
    array = value.detach().cpu().numpy()
    if not discrete:
        return array
    # Signed, since differences of unsigned integers wrap around.
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.int64)
