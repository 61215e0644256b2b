"""Pictures of a fitted pair and of its fit; every function returns a matplotlib ``Figure``.

No pyplot: nothing is shown, no global state is touched, and no display is needed; ``savefig``
writes the figure. Rows of images are given with ``image_shape`` (channels, height, width), one or
three channels; with None, rows are drawn as strips of a heat map. Limits of grey and color are
shared over a figure: the likelihood's bounds where it has them, else the smallest and largest
value shown. The random state is left as it was.

Latents are set to their posterior means: where a guide's distribution has no mean in closed form,
as for a flow, to the image of its base distribution's mean; discrete ones to their mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, biject_to, constraints

from ppl_vae.arviz import example, laid_out, model_nodes, posterior_nodes
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import Site, evaluating, read_sites

ImageShape = tuple[int, int, int]
Limits = tuple[float, float]


def samples(
    model: GenerativeModel,
    image_shape: ImageShape | None,
    n: int = 64,
    seed: int = 0,
    *,
    draw: bool = False,
    site: str = "x",
) -> Figure:
    """Rows that the model emits: the mean of x given drawn latents, as papers show, or drawn x.

    Raises:
        ValueError: ``n`` below 1, an unknown site, a shape that does not fit the rows, or a
            likelihood without a mean where ``draw`` is False.
    """
    if n < 1:
        raise ValueError(f"samples(n={n}): expected at least 1")
    with evaluating(seed, model):
        shown = _site(model, site)
        node = model_nodes(model, {}, rows=n)[site]
        values = node["value"] if draw else _mean(node["fn"], site)
    cells = _filled(values, math.ceil(math.sqrt(n)) if image_shape else 1)
    what = (
        f"{site} drawn from the model"
        if draw
        else f"Means of {site} given latents drawn from the prior"
    )
    return _cells(cells, image_shape, title=what, limits=_limits(shown, values))


def reconstructions(
    model: GenerativeModel,
    guide: torch.nn.Module,
    x: Tensor,
    image_shape: ImageShape | None,
    *,
    site: str = "x",
) -> Figure:
    """Rows of data, each above its mean given the posterior means of the latents.

    Args:
        x: ``(rows, D)``; 8 to 32 look best.

    Raises:
        ValueError: an unknown site, a shape that does not fit, or a likelihood without a mean.
    """
    with evaluating(0, model, guide):
        shown = _site(model, site)
        centers, x = _centers(model, guide, x, site)
        means = _decode(model, centers, site)
    if image_shape is None:
        lines, labels = torch.stack([x.to(means), means], 1), ["data\nmean"] * len(x)
    else:
        columns = min(len(x), 16)
        pair = [_filled(x.to(means), columns), _filled(means, columns)]
        lines = torch.stack(pair, 1).flatten(0, 1)
        labels = ["data", "mean"] * (len(lines) // 2)
    return _cells(
        lines,
        image_shape,
        title=f"Data and reconstructions: means of {site} at the latents' posterior means",
        row_labels=labels,
        limits=_limits(shown, x, means),
    )


def interpolation(
    model: GenerativeModel,
    guide: torch.nn.Module,
    x: Tensor,
    image_shape: ImageShape | None,
    *,
    steps: int = 9,
    site: str = "x",
) -> Figure:
    """Means of x on the way between the posterior means of pairs of rows.

    Rows 0 and 1 of x are the ends of the first line, 2 and 3 of the second. All local continuous
    latents go straight from one end to the other, on the unconstrained scale where their support
    is bounded; discrete ones change half way.

    Args:
        x: ``(2 * pairs, D)``.
        steps: decoded means a line, both ends included.

    Raises:
        ValueError: an odd number of rows, fewer than 2 steps, an unknown site, a shape that does
            not fit, or a model without local continuous latents.
    """
    if len(x) % 2 or not len(x):
        raise ValueError(f"interpolation: {len(x)} rows; expected pairs, an even number")
    if steps < 2:
        raise ValueError(f"interpolation(steps={steps}): expected at least 2")
    with evaluating(0, model, guide):
        shown = _site(model, site)
        centers, x = _centers(model, guide, x, site)
        sites = read_sites(model, n=2)
        _latent(model, None, site)  # there is something to move
        pairs = len(x) // 2
        at = torch.linspace(0, 1, steps).to(x)
        path: dict[str, Tensor] = {}
        for name, value in centers.items():
            if not sites[name].local:
                path[name] = value
                continue
            left, right = value[0::2, None], value[1::2, None]  # (pairs, 1, event)
            t = at.reshape(steps, *[1] * (value.dim() - 1))
            if sites[name].support.is_discrete:
                between = torch.where(t < 0.5, left, right)
            else:
                move: Any = biject_to(sites[name].support)
                left, right = move.inv(left), move.inv(right)
                between = move(left + t * (right - left))
            path[name] = between.flatten(0, 1)
        means = _decode(model, path, site).unflatten(0, (pairs, steps))
    cells = torch.cat([x[0::2, None].to(means), means, x[1::2, None].to(means)], 1)
    return _cells(
        cells,
        image_shape,
        title="Between posterior means of pairs of rows",
        column_labels=["data", *[f"{t:.2g}" for t in at.tolist()], "data"],
        limits=_limits(shown, cells),
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
        ValueError: fewer than 1 row, unit or step, no such local continuous latent, an unknown
            site, or a shape that does not fit.
    """
    if min(len(x), units, steps) < 1:
        raise ValueError(
            f"traversal: {len(x)} rows, units={units}, steps={steps}; expected at least 1 of each"
        )
    with evaluating(0, model, guide):
        shown = _site(model, site)
        moved = _latent(model, latent, site)
        centers, x = _centers(model, guide, x, site)
        flat = centers[moved.name].reshape(len(x), -1)  # (rows, coordinates)
        activity = flat.var(0, correction=0)
        order = activity.argsort(descending=True, stable=True)[:units]
        local = {name for name, s in read_sites(model, n=2).items() if s.local}
        before = _before(model, moved.name)
        start = {
            name: value[:1] if name in local else value
            for name, value in centers.items()
            if name in before or name == moved.name
        }
        quantiles = (
            torch.linspace(0.02, 0.98, steps).to(flat) if steps > 1 else flat.new_tensor([0.5])
        )
        ladder = _quantiles(model, start, moved, quantiles)  # (steps, coordinates)
        varied = flat[:1].repeat(len(order) * steps, 1).unflatten(0, (len(order), steps))
        for line, unit in enumerate(order.tolist()):
            varied[line, :, unit] = ladder[:, unit]
        rows = len(order) * steps
        values = {
            name: value.expand(rows, *value.shape[1:]) if name in local else value
            for name, value in start.items()
        }
        values[moved.name] = varied.reshape(rows, *moved.event_shape)
        means = _decode(model, values, site).unflatten(0, (len(order), steps))
    scalar = not moved.event_shape
    return _cells(
        means,
        image_shape,
        title=f"Means of {site} as one coordinate of {moved.name} moves over its prior",
        row_labels=[moved.name if scalar else f"{moved.name}[{u}]" for u in order.tolist()],
        column_labels=[f"{q:.0%}" for q in quantiles.tolist()],
        limits=_limits(shown, means),
    )


def manifold(
    model: GenerativeModel,
    image_shape: ImageShape | None,
    n: int = 20,
    *,
    latent: str | None = None,
    site: str = "x",
) -> Figure:
    """Means of x on the grid of prior quantiles of a two-dimensional latent.

    Quantiles ``(i + 1/2) / n`` of each coordinate's own distribution (Kingma & Welling 2014,
    arXiv:1312.6114, figure 4); the first coordinate runs to the right, the second upward.

    Raises:
        ValueError: a latent that is not two-dimensional, ``n`` below 2, rows that are no images,
            an unknown site, or a shape that does not fit.
    """
    if n < 2:
        raise ValueError(f"manifold(n={n}): expected at least 2")
    if image_shape is None:
        raise ValueError("manifold draws images: give image_shape=(channels, height, width)")
    with evaluating(0, model):
        shown = _site(model, site)
        moved = _latent(model, latent, site)
        if moved.event_shape.numel() != 2:
            raise ValueError(
                f"manifold: {moved.name!r} of {type(model).__name__} has "
                f"{moved.event_shape.numel()} dims; expected 2: see traversal"
            )
        quantiles = (torch.arange(n) + 0.5) / n
        ladder = _quantiles(model, {}, moved, quantiles)  # (n, 2)
        across, up = torch.meshgrid(ladder[:, 0], ladder[:, 1].flip(0), indexing="xy")
        z = torch.stack([across, up], -1).reshape(n * n, *moved.event_shape)
        means = _decode(model, {moved.name: z}, site).unflatten(0, (n, n))
    return _cells(
        means,
        image_shape,
        title=f"Means of {site} over quantiles of {moved.name}'s prior",
        limits=_limits(shown, means),
        axis_labels=(f"{moved.name}[0] →", f"{moved.name}[1] →"),
        gap=False,
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """A fit's ELBO, and its two parts, by epoch: nats per datum, training and validation.

    Args:
        metrics: one mapping an epoch, with ``epoch``, ``elbo``, ``reconstruction``, ``kl``, and,
            where there are such, ``validation_elbo``, ``validation_reconstruction``,
            ``validation_kl`` and ``weight``, the annealing weight of the KL, which is shown where
            it ever differs from 1. An empty or missing number is left out.

    Raises:
        ValueError: no metrics, or one of the four that must be there is not.
    """
    if not metrics:
        raise ValueError("curves: no metrics; expected one mapping an epoch")
    if missing := [k for k in ("epoch", *_CURVES) if k not in metrics[0]]:
        raise ValueError(f"curves: metrics have no {missing[0]!r}, only {', '.join(metrics[0])}")
    figure = Figure(figsize=(10.5, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    epochs = _series(metrics, "epoch")
    marker = "." if len(metrics) < 30 else ""
    axes = figure.subplots(1, 3, sharex=True)
    for ax, (key, title) in zip(axes, _CURVES.items(), strict=True):
        for name, label, color in (
            (key, "training", "C0"),
            (f"validation_{key}", "validation", "C1"),
        ):
            values = _series(metrics, name)
            if np.isfinite(values).any():
                ax.plot(epochs, values, marker=marker, color=color, label=label)
        ax.set(title=title, xlabel="epoch", ylabel="nats per datum")
        ax.spines[["top", "right"]].set_visible(False)
    weight = _series(metrics, "weight")
    if np.isfinite(weight).any() and not np.all(weight[np.isfinite(weight)] == 1):
        right = axes[2].twinx()
        right.plot(epochs, weight, color="0.6", linestyle="--", label="weight of KL (right)")
        right.set(ylim=(0, max(1.05, 1.05 * float(np.nanmax(weight)))), ylabel="weight")
        right.spines["top"].set_visible(False)
    handles = {
        label: h
        for ax in figure.axes
        for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def image_grid(
    images: Tensor,
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    axis_labels: tuple[str, str] = ("", ""),
    limits: Limits | None = None,
    gap: bool = True,
) -> Figure:
    """Images in a grid, as one picture: pixels are square and limits are shared.

    Args:
        images: ``(rows, columns, C, H, W)`` with C 1 (grey) or 3 (red, green, blue); a cell of
            nan stays blank.
        limits: values shown as black and white, or as no and full color; smallest and largest
            value if None.
        gap: whether a thin line parts the images.

    Raises:
        ValueError: images in another shape, or labels in another number.
    """
    if images.dim() != 5 or images.shape[2] not in (1, 3) or not images.numel():
        raise ValueError(
            f"image_grid: images of shape {tuple(images.shape)}; expected (rows, columns, 1 or 3 "
            "channels, height, width)"
        )
    rows, columns, channels, height, width = images.shape
    for labels, count, what in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if labels and len(labels) != count:
            raise ValueError(f"image_grid: {len(labels)} {what} labels for {count} {what}s")
    space = max(1, height // 14) if gap else 0
    low, high = limits or _span(images)
    scaled = ((images.detach().cpu().double() - low) / (high - low)).clamp(0, 1)
    step_y, step_x = height + space, width + space
    canvas = np.full((rows * step_y - space, columns * step_x - space, channels), np.nan)
    for r in range(rows):
        for c in range(columns):
            y, x = r * step_y, c * step_x
            canvas[y : y + height, x : x + width] = scaled[r, c].movedim(0, -1).numpy()
    inches = min(0.9, max(0.35, 9 / columns)) / width  # a pixel
    size = canvas.shape[1] * inches + 0.7, canvas.shape[0] * inches + 0.7
    figure = Figure(figsize=(max(size[0], 3.0), size[1]), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    # Where nothing stands, white: the gaps and blank cells.
    shown = np.where(np.isnan(canvas), 1.0, canvas)
    if channels == 1:
        ax.imshow(shown[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(shown, interpolation="nearest")
    ax.xaxis.tick_top()
    ax.set_xticks([c * step_x + (width - 1) / 2 for c in range(columns)] if column_labels else [])
    ax.set_yticks([r * step_y + (height - 1) / 2 for r in range(rows)] if row_labels else [])
    ax.set_xticklabels(column_labels)
    ax.set_yticklabels(row_labels)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(axis_labels[0])
    ax.set_ylabel(axis_labels[1])
    figure.suptitle(title, fontsize=10)
    return figure


_CURVES = {"elbo": "ELBO", "reconstruction": "Reconstruction", "kl": "KL"}


class _AtCenters(Messenger):
    """Sets the sites of a program to their distributions' centers, instead of drawing them."""

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["done"] or msg["is_observed"] or poutine.util.site_is_subsample(msg)):
            center = _center(msg["fn"])
            if center is not None:
                msg["value"], msg["done"] = center, True


def _center(fn: Any) -> Tensor | None:
    """Mean, mode of a discrete distribution, image of the base's mean; None if there is none."""
    try:
        if isinstance(fn, Independent):
            return _center(fn.base_dist)
        if isinstance(fn, TransformedDistribution):
            value = _center(fn.base_dist)
            for transform in fn.transforms if value is not None else ():
                value = transform(value)
            return value
        return fn.mode if fn.support.is_discrete else fn.mean
    except NotImplementedError:
        return None


def _centers(
    model: GenerativeModel, guide: torch.nn.Module, x: Tensor, site: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Posterior centers of the latents, ``(rows, event)`` or ``(event)``; x as the model has it."""
    x = x.to(example(model))
    with _AtCenters():
        nodes, nesting = posterior_nodes(model, guide, {site: x}, draws=1, temperature=0)
    if nesting > 1:
        raise ValueError(
            f"{type(model).__name__}: pictures need sites that stand in no plate but the rows'"
        )
    return {name: laid_out(node, 1, nesting)[1][0] for name, node in nodes.items()}, x


def _decode(model: GenerativeModel, latents: Mapping[str, Tensor], site: str) -> Tensor:
    """Means of x given latents, ``(rows, event)``; latents not given are at their centers."""
    local = {name for name, s in read_sites(model, n=2).items() if s.local}
    rows = next(len(value) for name, value in latents.items() if name in local)
    with _AtCenters():
        return _mean(model_nodes(model, latents, rows=rows)[site]["fn"], site)


def _mean(fn: Any, site: str) -> Tensor:
    try:
        if not (mean := fn.mean).isnan().any():
            return mean
    except NotImplementedError:
        pass
    raise ValueError(f"the distribution of {site!r} has no mean: samples(draw=True) shows draws")


def _site(model: GenerativeModel, site: str) -> Site:
    if site not in model.observables:
        raise ValueError(
            f"{type(model).__name__} has no observable {site!r}, only "
            f"{', '.join(model.observables)}: choose with site="
        )
    return read_sites(model, n=2)[site]


def _latent(model: GenerativeModel, latent: str | None, site: str) -> Site:
    """The local continuous latent of this name, or the last one before x."""
    found: dict[str, Site] = {}
    for name, s in read_sites(model, n=2).items():
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


def _before(model: GenerativeModel, name: str) -> set[str]:
    names = list(read_sites(model, n=2))
    return set(names[: names.index(name)])


def _quantiles(
    model: GenerativeModel, start: Mapping[str, Tensor], moved: Site, levels: Tensor
) -> Tensor:
    """Quantiles of each coordinate's prior given ``start``: ``(levels, coordinates)``."""
    given = {name: value for name, value in start.items() if name != moved.name}
    with _AtCenters():
        prior: Any = model_nodes(model, given, rows=1)[moved.name]["fn"]
    base = prior
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        values = base.icdf(levels.reshape(-1, *[1] * (1 + len(moved.event_shape))))
    except NotImplementedError:
        values = prior.sample((4096,)).quantile(levels, 0)
    return values.reshape(len(levels), -1)


def _limits(shown: Site, *values: Tensor) -> Limits:
    """The bounds of the likelihood's support, where it has them, else of the values."""
    support: Any = shown.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return 0.0, 1.0
    low, high = _span(*values)
    if (bound := getattr(support, "lower_bound", None)) is not None:
        low = float(torch.as_tensor(bound).min())
    if (bound := getattr(support, "upper_bound", None)) is not None:
        high = float(torch.as_tensor(bound).max())
    return low, high


def _span(*values: Tensor) -> Limits:
    finite = torch.cat([v[v.isfinite()].double() for v in values])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _filled(values: Tensor, columns: int) -> Tensor:
    """Rows ``(rows, event)`` laid out in lines of ``columns``, the last one filled up with nan."""
    blank = values.new_full((-len(values) % columns, *values.shape[1:]), torch.nan)
    return torch.cat([values, blank]).unflatten(0, (-1, columns))


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    found = (row.get(key) for row in metrics)
    return np.array([math.nan if v is None or v == "" else float(v) for v in found])


def _cells(
    cells: Tensor,
    image_shape: ImageShape | None,
    *,
    title: str,
    limits: Limits,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    axis_labels: tuple[str, str] = ("", ""),
    gap: bool = True,
) -> Figure:
    """A grid ``(rows, columns, event)`` as images, or as strips of a heat map."""
    if image_shape is None:
        return _strips(cells.flatten(2), title, limits, row_labels)
    if len(image_shape) != 3 or math.prod(image_shape) != cells[0, 0].numel():
        raise ValueError(
            f"image_shape {tuple(image_shape)} does not fit rows of {cells[0, 0].numel()} values; "
            "expected (channels, height, width)"
        )
    return image_grid(
        cells.flatten(2).unflatten(2, image_shape),
        title=title,
        row_labels=row_labels,
        column_labels=column_labels,
        axis_labels=axis_labels,
        limits=limits,
        gap=gap,
    )


def _strips(cells: Tensor, title: str, limits: Limits, row_labels: Sequence[str]) -> Figure:
    """One block of strips a row of the grid, parted by a thin line."""
    rows, columns, _ = cells.shape
    space = 1 if columns > 1 else 0
    step = columns + space
    canvas = np.full((rows * step - space, cells.shape[2]), np.nan)
    for r in range(rows):
        canvas[r * step : r * step + columns] = cells[r].detach().cpu().numpy()
    figure = Figure(figsize=(7, min(10.0, 1.5 + 0.14 * len(canvas))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    image = ax.imshow(
        canvas, aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1]
    )
    figure.colorbar(image, ax=ax, label="value")
    labeled = row_labels and rows <= 40
    ax.set_yticks([r * step + (columns - 1) / 2 for r in range(rows)] if labeled else [])
    ax.set_yticklabels(row_labels if labeled else [])
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set_xlabel("dimension")
    ax.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure
