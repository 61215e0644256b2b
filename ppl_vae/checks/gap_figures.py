"""Figures of the check of gaps."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ppl_vae.checks.result import CheckResult
from ppl_vae.figures import empty

_PARTS = {
    "amortization": ("amortization: the encoder's", "C0"),
    "by_full_rank": ("approximation: covariances get it back", "C1"),
    "rest": ("approximation: the rest", "C2"),
}
_GAPS = {"amortization": "amortization gap", "approximation": "approximation gap"}


def bars(result: CheckResult) -> Figure:
    """The parts of the inference gap, stacked, a bar for each split."""
    group = result.groups["gaps"]
    figure = empty(7.2, 1.6 + 0.6 * len(_splits(result)))
    ax = figure.subplots()
    splits = _splits(result)
    for at, split in enumerate(splits):
        rows = group["split"].values == split
        left = 0.0
        for key, (label, color) in _PARTS.items():
            values = group[key].values[rows]
            width = float(values.mean())
            ax.barh(at, width, 0.6, left, color=color, label=None if at else label)
            left += width
            error = 2 * values.std(ddof=1) / np.sqrt(len(values))
            # Below the middle of the bar, each a little lower, so that they do not cover another.
            level = at - 0.15 + 0.15 * list(_PARTS).index(key)
            ax.errorbar(left, level, xerr=error, color="black", capsize=2, linewidth=1)
    ax.set_yticks(range(len(splits)), splits)
    ax.invert_yaxis()
    ax.axvline(0, color="0.6", linewidth=1)
    ax.set_xlabel("log p(x) less ELBO, nats per row (bars: ± 2 standard errors of each part)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def histograms(result: CheckResult) -> Figure:
    """The gaps of the rows, one panel for either gap."""
    group = result.groups["gaps"]
    figure = empty(8.4, 3.2)
    for ax, (key, label) in zip(figure.subplots(1, 2), _GAPS.items(), strict=True):
        values = group[key].values
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, 31)
        for split, color in zip(_splits(result), ("C1", "C0"), strict=False):
            own = values[group["split"].values == split]
            share = np.full(len(own), 1 / len(own))
            ax.hist(own, edges, weights=share, histtype="step", color=color, label=split)
            ax.axvline(np.nanmean(own), color=color, linestyle="--", linewidth=1)
        ax.set(xlabel=f"{label}, nats (dashed: means)", ylabel="share of rows")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    return figure


def _splits(result: CheckResult) -> list[str]:
    return list(dict.fromkeys(result.groups["gaps"]["split"].values.tolist()))
