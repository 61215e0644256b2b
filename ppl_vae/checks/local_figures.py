"""Figures of the check of calibration by kind of data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.checks.result import CheckResult
from ppl_vae.checks.simulation import ASPECTS, Quantity, words
from ppl_vae.figures import empty

_SHOWN = 6
_PARTS = 5  # of the rows


def by_fifths(prediction: np.ndarray, score: np.ndarray) -> list[tuple[float, float]]:
    """Mean of the score and its standard error in fifths of the rows, by rising prediction."""
    parts = [score[part] for part in np.array_split(prediction.argsort(kind="stable"), _PARTS)]
    return [(float(s.mean()), float(s.std(ddof=1) / math.sqrt(len(s)))) for s in parts]


def fifths(result: CheckResult) -> Figure:
    """Mean scores in fifths of the rows, of the smallest p-values."""
    worst, held = _worst(result), result.groups[result.name]
    columns = min(3, len(worst))
    lines = math.ceil(len(worst) / columns)
    figure = empty(3.3 * columns, 2.6 * lines + 0.8)
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for ax, (a, k, record) in zip(axes, worst, strict=False):
        means, errors = zip(
            *by_fifths(held["prediction"].values[a, k], held["score"].values[a, k]), strict=True
        )
        failed = record["verdict"] == "fail"
        ax.axhline(0, color="0.6", linestyle="--", linewidth=1)
        ax.errorbar(
            range(1, _PARTS + 1),
            means,
            [2 * error for error in errors],
            fmt="o-",
            color="C3" if failed else "C0",
            markersize=4,
        )
        ax.set_title(
            f"{record['quantity']}: {record['aspect']}, adjusted p = {record['p_adjusted']:.2g}\n"
            f"to the right: {record['region'] or 'no simple summary of the data'}",
            fontsize=7.5,
            color="C3" if failed else "black",
        )
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(worst) :]:
        ax.set_visible(False)
    figure.supxlabel("fifths of the rows, by rising prediction", fontsize=9)
    figure.supylabel("mean score ± 2 standard errors", fontsize=9)
    figure.suptitle(_title(result), fontsize=10)
    return figure


def map_of_data(result: CheckResult) -> Figure:
    """Predictions of the score that is predicted best, over two principal components."""
    (a, k, record), held = _worst(result)[0], result.groups[result.name]
    figure = empty(5.6, 4.4)
    ax: Axes = figure.subplots()
    x = held["component"].values
    y = x[:, 1] if x.shape[1] > 1 else held["score"].values[a, k]
    prediction = held["prediction"].values[a, k]
    # No color for predictions that hardly differ from 0.
    most = max(0.2, float(np.quantile(np.abs(prediction), 0.98)))
    points = ax.scatter(x[:, 0], y, c=prediction, s=9, cmap="coolwarm", vmin=-most, vmax=most)
    above, below = words(Quantity(record["site"], record["quantity"]), ASPECTS[a])
    bar = figure.colorbar(points, ax=ax)
    bar.set_label(f"predicted {ASPECTS[a]}\n(below 0: {below};\nabove 0: {above})", fontsize=8)
    ax.set(xlabel="principal component 1 of the data")
    ax.set_ylabel("principal component 2" if x.shape[1] > 1 else "score")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{record['quantity']}, adjusted p = {record['p_adjusted']:.2g}", fontsize=9)
    figure.suptitle(_title(result), fontsize=10)
    return figure


def _worst(result: CheckResult) -> list[tuple[int, int, Mapping[str, Any]]]:
    """Aspect, quantity and record of the smallest p-values."""
    records = result.statistics
    order = sorted(range(len(records)), key=lambda n: records[n]["p"])[:_SHOWN]
    return [(n % len(ASPECTS), n // len(ASPECTS), records[n]) for n in order]


def _title(result: CheckResult) -> str:
    settings = result.settings
    return (
        f"Calibration by kind of data: {result.verdict} (family-wise error rate "
        f"{result.error_rate:.2g})\n{settings['tested_rows']} rows from the model, "
        f"{settings['draws']} draws of the guide for each"
    )
