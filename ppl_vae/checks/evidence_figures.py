"""Figures of the check of evidence."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from xarray import DataArray

from ppl_vae.checks.result import CheckResult
from ppl_vae.figures import empty
from ppl_vae.weights import RELIABLE


def pareto_k(result: CheckResult) -> Figure:
    """Pareto-k of each row, by its rank, and effective draws against it."""
    group, settings = result.groups["evidence"], result.settings
    k = group["pareto_k"].values
    effective = group["effective_draws"].values
    known = np.isfinite(k)
    figure = empty(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    order = np.argsort(k[known])
    for ax, x, y in (
        (left, np.arange(known.sum()), k[known][order]),
        (right, k[known], effective[known]),
    ):
        high = k[known][order] > RELIABLE if ax is left else k[known] > RELIABLE
        for chosen, color in ((~high, "C0"), (high, "C3")):
            ax.plot(x[chosen], y[chosen], "o", color=color, markersize=3)
        ax.spines[["top", "right"]].set_visible(False)
    left.axhline(RELIABLE, color="0.5", linestyle="--", linewidth=1, label=f"{RELIABLE}")
    right.axvline(RELIABLE, color="0.5", linestyle="--", linewidth=1)
    left.set(xlabel="rows, sorted", ylabel="Pareto-k")
    right.set(xlabel="Pareto-k", ylabel=f"effective draws of {settings['samples']}", yscale="log")
    right.set_ylim(0.8, 1.25 * settings["samples"])  # also where no row is shown
    alike = int(np.isneginf(k).sum())
    aside = f"; {alike} with weights all alike are not shown" if alike else ""
    share = float((k > RELIABLE).mean())
    figure.suptitle(
        f"Importance weights of {len(k)} rows ({settings['split']}): Pareto-k above {RELIABLE} in "
        f"{share:.0%}{aside}",
        fontsize=11,
    )
    return figure


def bounds(result: CheckResult) -> Figure:
    """IWAE bounds by the number of draws, against annealing, on the same rows."""
    settings, group = result.settings, result.groups["evidence_annealed"]
    draws, bound = group["draws"].values, group["bound"]
    annealed = group["log_evidence"]
    figure = empty(8.4, 4.0)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(draws, bound.mean("row"), "o-", color="C0", label="importance sampling")
    level = float(annealed.mean())
    left.axhline(level, color="C1", label="annealing, lower bound")
    simulated = result.groups.get("evidence_simulated")
    if simulated is not None:
        gap = max(0.0, float(simulated["gap"].mean()))
        left.axhspan(
            level, level + gap, color="C1", alpha=0.25, label=f"and {gap:.2f} nats: bracket's width"
        )
    left.set(xscale="log", xlabel="draws K", ylabel="nats per row")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    # Paired, since rows differ by far more than methods do.
    differences = bound - annealed
    error = _standard_error(differences)
    right.errorbar(
        draws, differences.mean("row"), 2 * error, marker="o", color="C0", capsize=3, linewidth=1
    )
    tolerance = settings["tolerance"]
    right.axhspan(-tolerance, tolerance, color="0.85", zorder=0)
    right.axhline(0, color="C1")
    right.set(xscale="log", xlabel="draws K", ylabel="bound less annealing, nats (+- 2 se)")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"log p(x): {result.verdict} (error rate {result.error_rate:.2g}; gray: within "
        f"{tolerance:g} nats)\n{annealed.size} held-out rows ({settings['split']})",
        fontsize=11,
    )
    return figure


def _standard_error(differences: DataArray) -> np.ndarray:
    return differences.std("row", ddof=1).values / np.sqrt(differences.sizes["row"])
