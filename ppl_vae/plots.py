"""Pictures of a fitted pair and of its fit; every function returns a matplotlib ``Figure``.

No pyplot: nothing is shown, no global state is touched, and no display is needed; ``savefig``
writes the figure. Rows of images are given with ``image_shape`` (channels, height, width), one or
three channels; with None, rows are drawn as strips of a heat map. Limits of grey and color are
shared over a figure: the likelihood's bounds where it has them, else the smallest and largest
value shown. The random state is left as it was. An observable that the model does not have, and an
``image_shape`` that does not fit the rows, are a ``ValueError`` everywhere.

Latents are set to their posterior means, or what stands for those: see :mod:`ppl_vae.centers`. A
conditional model needs ``covariates``, its covariates by name, with a row for each row of x (for
each row drawn, in :func:`samples`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Independent, biject_to

from ppl_vae.centers import AtCenters, decode, mean, posterior_centers
from ppl_vae.draws import example, model_nodes, unobserved_sites
from ppl_vae.figures import ImageShape, cell_grid, curves, filled, image_grid, limits_for
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import Site, evaluating

__all__ = [
    "curves",
    "image_grid",
    "interpolation",
    "manifold",
    "reconstructions",
    "samples",
    "traversal",
]


def samples(
    model: GenerativeModel,
    image_shape: ImageShape | None,
    n: int = 64,
    seed: int = 0,
    *,
    draw: bool = False,
    site: str = "x",
    covariates: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Rows that the model emits: the mean of x given drawn latents, as papers show, or drawn x.

    Raises:
        ValueError: ``n`` below 1, or a likelihood without a mean where ``draw`` is False.
    """
    if n < 1:
        raise ValueError(f"samples(n={n}): expected at least 1")
    with evaluating(seed, model):
        given = _given(model, covariates)
        shown = _sites(model, site, given)[site]
        node = model_nodes(model, {}, rows=n, columns=given)[site]
        values = node["value"] if draw else mean(node["fn"], site)
    return cell_grid(
        filled(values, math.ceil(math.sqrt(n)) if image_shape else 1),
        image_shape,
        title=f"{site} drawn from the model"
        if draw
        else f"Means of {site} given latents drawn from the prior",
        limits=limits_for(shown.support, values),
    )


def reconstructions(
    model: GenerativeModel,
    guide: torch.nn.Module,
    x: Tensor,
    image_shape: ImageShape | None,
    *,
    site: str = "x",
    covariates: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Rows of data, each above its mean given the posterior means of the latents.

    Args:
        x: ``(rows, D)``; 8 to 32 look best.

    Raises:
        ValueError: a likelihood without a mean.
    """
    with evaluating(0, model, guide):
        given = _given(model, covariates)
        shown = _sites(model, site, given)[site]
        x = x.to(example(model))
        latents = posterior_centers(model, guide, {site: x, **given})
        means = decode(model, latents, site, given)
    if image_shape is None:
        lines, labels = torch.stack([x, means], 1), ["data\nmean"] * len(x)
    else:
        columns = min(len(x), 16)
        lines = torch.stack([filled(x, columns), filled(means, columns)], 1).flatten(0, 1)
        labels = ["data", "mean"] * (len(lines) // 2)
    return cell_grid(
        lines,
        image_shape,
        title=f"Data and reconstructions: means of {site} at the latents' posterior means",
        row_labels=labels,
        limits=limits_for(shown.support, x, means),
    )


def interpolation(
    model: GenerativeModel,
    guide: torch.nn.Module,
    x: Tensor,
    image_shape: ImageShape | None,
    *,
    steps: int = 9,
    site: str = "x",
    covariates: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Means of x on the way between the posterior means of pairs of rows.

    Rows 0 and 1 of x are the ends of the first line, 2 and 3 of the second. All local continuous
    latents go straight from one end to the other, on the unconstrained scale where their support
    is bounded; discrete ones change half way, and so do covariates.

    Args:
        x: ``(2 * pairs, D)``.
        steps: decoded means a line, both ends included.

    Raises:
        ValueError: an odd number of rows, fewer than 2 steps, or a model without local continuous
            latents.
    """
    if len(x) % 2 or not len(x):
        raise ValueError(f"interpolation: {len(x)} rows; expected pairs, an even number")
    if steps < 2:
        raise ValueError(f"interpolation(steps={steps}): expected at least 2")
    with evaluating(0, model, guide):
        given = _given(model, covariates)
        sites = _sites(model, site, given)
        _latent(model, None, site, given)  # there is something to move
        x = x.to(example(model))
        at = torch.linspace(0, 1, steps).to(x)
        path = posterior_centers(model, guide, {site: x, **given})
        for name, value in path.items():
            if sites[name].local:
                path[name] = _between(value, at, sites[name].support).flatten(0, 1)
        changed = {name: _halfway(value, at).flatten(0, 1) for name, value in given.items()}
        means = decode(model, path, site, changed).unflatten(0, (-1, steps))
    cells = torch.cat([x[0::2, None], means, x[1::2, None]], 1)
    return cell_grid(
        cells,
        image_shape,
        title="Between posterior means of pairs of rows",
        column_labels=["data", *[f"{t:.2g}" for t in at.tolist()], "data"],
        limits=limits_for(sites[site].support, cells),
    )


def traversal(
    model: GenerativeModel,
    guide: torch.nn.Module,
    x: Tensor,
    image_shape: ImageShape | None,
    *,
    latent: str | None = None,
    units: int = 10,
    steps: int = 9,
    site: str = "x",
    covariates: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Means of x as one coordinate of a latent moves over its prior, the others staying.

    The start is the posterior mean of the first row. The coordinate takes the quantiles 0.02 to
    0.98 of its prior, given the sites before it where it has such; sites between it and x follow at
    their means. Coordinates stand in descending order of activity, the variance over the rows of
    x of the posterior mean (Burda et al. 2016, arXiv:1509.00519, section 5.2).

    Args:
        x: ``(rows, D)``: the first is drawn, all of them measure activity. Of a single row,
            coordinates keep their order.
        latent: the site that moves; the last local continuous one before x if None.
        units: coordinates shown.
        steps: quantiles.

    Raises:
        ValueError: fewer than 1 row, unit or step, or no such local continuous latent.
    """
    if min(len(x), units, steps) < 1:
        raise ValueError(
            f"traversal: {len(x)} rows, units={units}, steps={steps}; expected at least 1 of each"
        )
    with evaluating(0, model, guide):
        given = _given(model, covariates)
        sites = _sites(model, site, given)
        moved = _latent(model, latent, site, given)
        centers = posterior_centers(model, guide, {site: x.to(example(model)), **given})
        given = {name: value[:1] for name, value in given.items()}
        flat = centers[moved.name].reshape(len(x), -1)  # (rows, coordinates)
        activity = flat.var(0, correction=0)
        order = activity.argsort(descending=True, stable=True)[:units].tolist()
        start: dict[str, Tensor] = {}  # the sites before the moved one
        for name in sites:
            if name == moved.name:
                break
            if name in centers:
                start[name] = centers[name][:1] if sites[name].local else centers[name]
        quantiles = (
            torch.linspace(0.02, 0.98, steps).to(flat) if steps > 1 else flat.new_tensor([0.5])
        )
        ladder = _quantiles(model, start, moved, quantiles, given)  # (steps, coordinates)
        varied = flat[0].repeat(len(order), steps, 1)
        for line, unit in enumerate(order):
            varied[line, :, unit] = ladder[:, unit]
        values = {moved.name: varied.reshape(-1, *moved.event_shape)}
        rows = len(order) * steps
        for name, value in start.items():
            values[name] = value.expand(rows, *value.shape[1:]) if sites[name].local else value
        repeated = {name: value.expand(rows, *value.shape[1:]) for name, value in given.items()}
        means = decode(model, values, site, repeated).unflatten(0, (-1, steps))
    return cell_grid(
        means,
        image_shape,
        title=f"Means of {site} as one coordinate of {moved.name} moves over its prior",
        row_labels=[f"{moved.name}[{u}]" if moved.event_shape else moved.name for u in order],
        column_labels=[f"{q:.0%}" for q in quantiles.tolist()],
        limits=limits_for(sites[site].support, means),
    )


def manifold(
    model: GenerativeModel,
    image_shape: ImageShape | None,
    n: int = 20,
    *,
    latent: str | None = None,
    site: str = "x",
    covariates: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Means of x on the grid of prior quantiles of a two-dimensional latent.

    Quantiles ``(i + 1/2) / n`` of each coordinate's own distribution (Kingma & Welling 2014,
    arXiv:1312.6114, figure 4); the first coordinate runs to the right, the second upward. All are
    given the first row of the covariates.

    Raises:
        ValueError: a latent that is not two-dimensional, ``n`` below 2, or rows that are no images.
    """
    if n < 2:
        raise ValueError(f"manifold(n={n}): expected at least 2")
    if image_shape is None:
        raise ValueError("manifold draws images: give image_shape=(channels, height, width)")
    with evaluating(0, model):
        given = {name: value[:1] for name, value in _given(model, covariates).items()}
        sites = _sites(model, site, given)
        moved = _latent(model, latent, site, given)
        if moved.event_shape.numel() != 2:
            raise ValueError(
                f"manifold: {moved.name!r} of {type(model).__name__} has "
                f"{moved.event_shape.numel()} dims; expected 2: see traversal"
            )
        quantiles = ((torch.arange(n) + 0.5) / n).to(example(model))
        ladder = _quantiles(model, {}, moved, quantiles, given)  # (n, 2)
        across, up = torch.meshgrid(ladder[:, 0], ladder[:, 1].flip(0), indexing="xy")
        z = torch.stack([across, up], -1).reshape(n * n, *moved.event_shape)
        repeated = {name: value.expand(n * n, *value.shape[1:]) for name, value in given.items()}
        means = decode(model, {moved.name: z}, site, repeated).unflatten(0, (n, n))
    return cell_grid(
        means,
        image_shape,
        title=f"Means of {site} over quantiles of {moved.name}'s prior",
        limits=limits_for(sites[site].support, means),
        axis_labels=(f"{moved.name}[0] →", f"{moved.name}[1] →"),
        gap=False,
    )


def _given(model: GenerativeModel, covariates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's covariates, on its device and in its dtype."""
    like = example(model)
    found = model.covariates_in(covariates or {})
    return {name: value.to(like) for name, value in found.items()}


def _sites(model: GenerativeModel, site: str, given: Mapping[str, Tensor]) -> dict[str, Site]:
    """The model's sites, of which ``site`` is an observable."""
    if site not in model.observables:
        raise ValueError(
            f"{type(model).__name__} has no observable {site!r}, only "
            f"{', '.join(model.observables)}: choose with site="
        )
    return unobserved_sites(model, given)


def _latent(
    model: GenerativeModel, latent: str | None, site: str, given: Mapping[str, Tensor]
) -> Site:
    """The local continuous latent of this name, or the last one before x."""
    found: dict[str, Site] = {}
    for name, s in unobserved_sites(model, given).items():
        if name == site:
            break
        if s.local and not (s.observed or s.support.is_discrete):
            found[name] = s
    if not found or (latent is not None and latent not in found):
        wanted = "" if latent is None else f" {latent!r}"
        raise ValueError(
            f"{type(model).__name__} has no local continuous latent{wanted} before {site!r}; "
            f"it has {', '.join(found) or 'none'}"
        )
    return found[latent] if latent else list(found.values())[-1]


def _halfway(value: Tensor, at: Tensor) -> Tensor:
    """Each even row, then the next one: ``(pairs, steps, ...)``."""
    first = at.reshape(-1, *[1] * (value.dim() - 1)) < 0.5
    return torch.where(first, value[0::2, None], value[1::2, None])


def _between(value: Tensor, at: Tensor, support: Any) -> Tensor:
    """From each even row to the next one: ``(pairs, steps, event)``."""
    left, right = value[0::2, None], value[1::2, None]  # (pairs, 1, event)
    t = at.reshape(-1, *[1] * (value.dim() - 1))
    if support.is_discrete:
        return _halfway(value, at)
    move: Any = biject_to(support)
    left, right = move.inv(left), move.inv(right)
    return move(left + t * (right - left))


def _quantiles(
    model: GenerativeModel,
    before: Mapping[str, Tensor],
    moved: Site,
    levels: Tensor,
    given: Mapping[str, Tensor],
) -> Tensor:
    """Quantiles of each coordinate's prior given the sites before and the covariates of one row:
    ``(levels, coordinates)``."""
    with AtCenters():
        prior: Any = model_nodes(model, before, rows=1, columns=given)[moved.name]["fn"]
    base = prior
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        values = base.icdf(levels.reshape(-1, *[1] * (1 + len(moved.event_shape))))
    except NotImplementedError:
        values = prior.sample((4096,)).quantile(levels, 0)
    return values.reshape(len(levels), -1)
