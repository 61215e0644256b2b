"""How pictures are drawn: grids of images, strips of a heat map, curves over epochs.

No pyplot: nothing is shown, no global state is touched, and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.conditionals import entrywise

ImageShape = tuple[int, int, int]
"""Channels (1 or 3), height, width."""


Limits = tuple[float, float]
"""The values shown as black and white, or as no and full color."""

_CURVES = {"elbo": "ELBO", "reconstruction": "Reconstruction", "kl": "KL"}


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
    figure = empty(10.5, 3.2)
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
    if (weight[np.isfinite(weight)] != 1).any():
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
        limits: smallest and largest value if None.
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
    step_y, step_x = height + space, width + space
    low, high = limits or _span(images)
    scaled = ((images.detach().cpu().double() - low) / (high - low)).clamp(0, 1)
    # Where nothing stands, white: blank cells and gaps, but for those after the last images.
    tiles = F.pad(scaled.nan_to_num(1.0), (0, space, 0, space), value=1.0)
    whole = tiles.permute(0, 3, 1, 4, 2).reshape(rows * step_y, columns * step_x, channels)
    canvas = whole[: rows * step_y - space, : columns * step_x - space].numpy()
    inches = min(0.9, max(0.35, 9 / columns)) / width  # a pixel
    figure = empty(max(3.0, canvas.shape[1] * inches + 0.7), canvas.shape[0] * inches + 0.7)
    ax = figure.subplots()
    if channels == 1:
        ax.imshow(canvas[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(canvas, interpolation="nearest")
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


def cell_grid(
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


def filled(values: Tensor, columns: int) -> Tensor:
    """Rows ``(rows, event)`` laid out in lines of ``columns``, the last one filled up with nan."""
    blank = values.new_full((-len(values) % columns, *values.shape[1:]), torch.nan)
    return torch.cat([values, blank]).unflatten(0, (-1, columns))


def limits_for(support: Any, *values: Tensor) -> Limits:
    """The bounds of a likelihood's support, where it has them, else of the values."""
    support = entrywise(support)
    if support is constraints.boolean:
        return 0.0, 1.0
    low, high = _span(*values)
    if (bound := getattr(support, "lower_bound", None)) is not None:
        low = float(torch.as_tensor(bound).min())
    if (bound := getattr(support, "upper_bound", None)) is not None:
        high = float(torch.as_tensor(bound).max())
    return low, high


def _strips(cells: Tensor, title: str, limits: Limits, row_labels: Sequence[str]) -> Figure:
    """One block of strips a row of the grid, parted by a thin line."""
    rows, columns, _ = cells.shape
    space = 1 if columns > 1 else 0
    step = columns + space
    blocks = F.pad(cells.detach().cpu().double(), (0, 0, 0, space), value=torch.nan)
    canvas = blocks.flatten(0, 1)[: rows * step - space].numpy()
    figure = empty(7, min(10.0, 1.5 + 0.14 * len(canvas)))
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


def empty(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    found = (row.get(key) for row in metrics)
    return np.array([math.nan if v is None or v == "" else float(v) for v in found])


def _span(*values: Tensor) -> Limits:
    """Smallest and largest finite value, parted where they are equal."""
    finite = torch.cat([v[v.isfinite()].double() for v in values])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)
