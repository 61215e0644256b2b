"""How well a score tells two kinds of rows apart: areas under ROC curves, and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from ppl_vae.figures import empty

Scores = Mapping[str, np.ndarray]
"""A number of each row, ``(rows,)``, by the score's name."""


class Auroc(NamedTuple):
    """An area under an ROC curve, or a difference of two, with its standard error over rows."""

    value: float
    se: float


def auroc(inliers: np.ndarray, outliers: np.ndarray) -> Auroc:
    """The probability that an outlier's score is above an inlier's; a tie counts for half.

    1/2 by chance. The standard error is that of DeLong, DeLong & Clarke-Pearson (1988, Biometrics
    44, 837); it is 0 where the two kinds are told apart without an error, which says no more than
    that there are too few rows to meet one.

    Args:
        inliers, outliers: scores, ``(rows,)`` each; a large one means an outlier.

    Raises:
        ValueError: fewer than 2 rows of a kind, or nan.
    """
    return _estimate(*_placements(inliers, outliers))


def auroc_difference(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> Auroc:
    """How much larger the AUROC of one score is than that of another on the same rows.

    Scores of the same row go together, so that the error is smaller than that of two areas by
    themselves (DeLong et al. 1988).

    Args:
        one, other: inliers' and outliers' scores.

    Raises:
        ValueError: as :func:`auroc`, or different numbers of rows.
    """
    mine, theirs = _placements(*one), _placements(*other)
    if [len(p) for p in mine] != [len(p) for p in theirs]:
        raise ValueError("auroc_difference: the two scores are of different numbers of rows")
    return _estimate(mine[0] - theirs[0], mine[1] - theirs[1])


def roc(inliers: np.ndarray, outliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of inliers and of outliers whose score is at least a threshold, from the highest
    threshold down."""
    thresholds = np.unique(np.concatenate([inliers, outliers]))[::-1]
    shares = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)
        for scores in (inliers, outliers)
    ]
    return np.append(0.0, shares[0]), np.append(0.0, shares[1])


def histograms(
    inside: Scores,
    outside: Scores,
    *,
    titles: Mapping[str, str],
    labels: Mapping[str, str],
    kinds: tuple[str, str],
) -> Figure:
    """The distribution of each score over the rows of both kinds.

    Args:
        titles, labels: above each score's panel, and below it.
        kinds: what rows inside and outside are called.
    """
    columns = min(4, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure = empty(3.4 * columns, 2.7 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in panels[len(titles) :]:
        ax.set_axis_off()
    for ax, (name, title) in zip(panels, titles.items(), strict=False):
        both = [values[np.isfinite(values)] for values in (inside[name], outside[name])]
        edges = np.histogram_bin_edges(np.concatenate(both), 30)
        for values, kind, color in zip(both, kinds, ("C0", "C1"), strict=True):
            weights = np.full(len(values), 1 / max(1, len(values)))
            ax.hist(values, edges, weights=weights, alpha=0.6, color=color, label=kind)
        ax.set(xlabel=labels[name])
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[::columns]:
        ax.set_ylabel("share of rows")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _placements(inliers: np.ndarray, outliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each outlier, the share of inliers below it; of each inlier, of outliers above it."""
    ranks = scipy.stats.rankdata
    for kind, scores in (("inliers", inliers), ("outliers", outliers)):
        if len(scores) < 2 or np.isnan(scores).any():
            raise ValueError(f"auroc: {kind} are {len(scores)} rows; expected at least 2, no nan")
    joint = ranks(np.concatenate([inliers, outliers]))
    below = (joint[len(inliers) :] - ranks(outliers)) / len(inliers)
    above = 1 - (joint[: len(inliers)] - ranks(inliers)) / len(outliers)
    return below, above


def _estimate(below: np.ndarray, above: np.ndarray) -> Auroc:
    variance = below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)
    return Auroc(float(below.mean()), math.sqrt(variance))
