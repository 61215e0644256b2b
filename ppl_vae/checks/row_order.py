"""Are the rows exchangeable in the order in which they stand?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor
from xarray import Dataset

from ppl_vae.checks.chosen import numbers_of_rows, score_chosen
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level, check_replicates, max_adjusted
from ppl_vae.data import Dataset as Data
from ppl_vae.data import as_dataset
from ppl_vae.draws import observed
from ppl_vae.figures import empty
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating

_FEWEST = 10  # rows, of which anything could be said
_LATENTS = 5  # coordinates of posterior means, those that vary most
_COMPONENTS = 3  # principal ones of the data
_SHOWN = 4  # figures in the picture


def row_order(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 2000,
    samples: int = 10,
    permutations: int = 1999,
) -> CheckResult:
    """Looks for an order in the rows: sorted files, time series, copies that stand together.

    An exact permutation test. Figures of each row are log p(x), the coordinates of posterior means
    that vary most, the first principal components of all columns, and the label, where there is
    one. Of each figure's ranks, two statistics: the correlation of a row's with the next row's, and
    with the row's number. If every order of the rows is as probable, so are the statistics of
    permuted rows, whose largest deviation is compared: p is adjusted by the single-step maxT method
    (Westfall & Young 1993), and can be as small as ``1 / (1 + permutations)``.

    Rows are consecutive: the whole split, or a stretch of it that begins at random. Figures are
    computed in random order, so that draws that some rows share are no order of theirs.

    Each record has figure, statistic, its value and standard deviation under permutation, adjusted
    p, and the verdict.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of the stretch, of draws and permutations.
        level: error rate of the verdict.
        rows: how many consecutive ones; all of them where the split has fewer.
        samples: importance draws a row.
        permutations: of the rows.

    Raises:
        NotApplicable: fewer than 10 rows; rows that are all alike; a site stands in a plate besides
            that of the rows.
        ValueError: too few permutations for p to be below ``level``; a level outside (0, 1); and as
            :func:`ppl_vae.evaluate`.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    check_replicates("permutations", permutations, level)
    dataset = as_dataset(data)
    stretch = _stretch(len(dataset.split(split)), rows, seed)
    if len(stretch) < _FEWEST:
        raise NotApplicable(f"{len(stretch)} rows of {split!r}; an order needs at least {_FEWEST}")
    figures = _figures(model, guide, dataset, stretch, split=split, samples=samples, seed=seed)
    if not figures:
        raise NotApplicable(f"all rows of {split!r} are alike, so that they have no order")
    progress(0.7)
    ranks = np.stack([_standard(rankdata(values)) for values in figures.values()], 1)
    stream = np.random.default_rng(seed)
    found = _statistics(ranks)
    permuted = np.stack([_statistics(stream.permutation(ranks)) for _ in range(permutations)])
    adjusted = max_adjusted(found, permuted)
    records = [
        {
            "figure": figure,
            "statistic": statistic,
            "value": float(found[k]),
            "permuted_sd": float(permuted[:, k].std()),
            "p_adjusted": float(adjusted[k]),
            "verdict": "fail" if adjusted[k] <= level else "pass",
        }
        for k, (statistic, figure) in enumerate((s, f) for s in _NAMES for f in figures)
    ]
    failed = [record for record in records if record["verdict"] == "fail"]
    return CheckResult(
        name="row_order",
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=float(adjusted.min()),
        statistics=tuple(records),
        meaning=_meaning(failed, len(stretch), split),
        settings={
            "split": split,
            "seed": seed,
            "rows": len(stretch),
            "first_row": int(stretch[0]),
            "samples": samples,
            "permutations": permutations,
            "correction": "maxT",
        },
        groups={
            "row_order": Dataset(
                {name: ("row", values) for name, values in figures.items()},
                coords={"row": stretch.numpy()},
            )
        },
        pictures={"row_order": Picture(_figure, _CAPTION)},
    )


_NAMES = ("correlation with the next row", "correlation with the row number")
_CAPTION = (
    "Figures of rows in the order in which they stand, and their running mean: where it wanders, "
    "neighbors are alike; shuffle the rows, or model the series."
)


def _stretch(total: int, rows: int, seed: int) -> Tensor:
    """Consecutive row numbers, that begin at random."""
    first = int(numbers_of_rows(max(1, total - rows + 1), 1, seed))
    return torch.arange(first, min(first + rows, total))


def _figures(
    model: GenerativeModel,
    guide: torch.nn.Module,
    dataset: Data,
    stretch: Tensor,
    *,
    split: str,
    samples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """What is known of each row, ``(rows,)`` each, in the order of the stretch."""
    shuffled = stretch[numbers_of_rows(len(stretch), len(stretch), seed)]
    scored = score_chosen(model, guide, dataset, shuffled, split=split, samples=samples, seed=seed)
    figures = {"log p(x)": scored.columns["log evidence", ""]}
    means = {
        name: values
        for kind, site in scored.columns
        if kind == "posterior mean"
        for name, values in zip(
            scored.sites[site].coordinates,
            scored.columns[kind, site].reshape(len(shuffled), -1).T,
            strict=True,
        )
    }
    # By the variance, which is the same in every order.
    most = sorted(means, key=lambda name: -float(means[name].var()))[:_LATENTS]
    figures |= {f"posterior mean of {name}": means[name] for name in most}
    with evaluating(seed, model, guide):
        columns = observed(model, dataset.split(split), shuffled)
        flat = torch.cat([c.reshape(len(c), -1).double().cpu() for c in columns.values()], 1)
        count = min(_COMPONENTS, *flat.shape)
        components, scale, _ = torch.pca_lowrank(flat, q=count, niter=4)
    for k, values in enumerate(components.T):
        if scale[k] > 1e-9 * (1 + scale[0]):
            figures[f"principal component {k + 1}"] = values
    if (labels := dataset.splits[split].get("y")) is not None:
        figures["label"] = labels.cpu()[shuffled].double()
    back = shuffled.argsort()
    # Alike in all rows up to rounding, they would be noise.
    return {
        name: values[back].numpy()
        for name, values in figures.items()
        if values.std() > 1e-9 * (1 + values.abs().max())
    }


def _standard(ranks: np.ndarray) -> np.ndarray:
    return (ranks - ranks.mean()) / ranks.std()


def _statistics(ranks: np.ndarray) -> np.ndarray:
    """Correlations of ``(rows, figures)`` standardized ranks: ``(2 * figures,)``."""
    rows = len(ranks)
    numbers = _standard(np.arange(rows, dtype=float))
    return np.concatenate([(ranks[1:] * ranks[:-1]).sum(0) / (rows - 1), numbers @ ranks / rows])


def _meaning(failed: list[dict[str, Any]], rows: int, split: str) -> str:
    if not failed:
        return f"No order is found in {rows} consecutive rows ({split}): they might be shuffled."
    worst = sorted(failed, key=lambda record: -abs(record["value"] / record["permuted_sd"]))[:3]
    said = ", ".join(f"{r['statistic']} of {r['figure']} {r['value']:.2f}" for r in worst)
    alike = max((r["value"] for r in failed if r["statistic"] == _NAMES[0]), default=0.0)
    # Of a mean over an autoregressive series of the first order.
    wider = math.sqrt((1 + alike) / (1 - min(alike, 0.999)))
    series = (
        f" If they are a series, standard errors over rows are too small, by a factor of about "
        f"{wider:.1f}, and rows have more to tell of each other than the model knows."
        if alike > 0
        else ""
    )
    return (
        f"{rows} consecutive rows ({split}) stand in an order: {said}. If the file is sorted, or "
        "copies stand together, take no prefix of it, and shuffle before splitting and fitting."
        + series
    )


def _figure(result: CheckResult) -> Figure:
    """The figures with the smallest p in the order of the rows."""
    p: dict[str, float] = {}
    for record in result.statistics:
        p[record["figure"]] = min(p.get(record["figure"], 1.0), record["p_adjusted"])
    shown = sorted(p, key=lambda name: p[name])[:_SHOWN]
    group = result.groups["row_order"]
    figure = empty(8.4, 1.5 * len(shown) + 0.9)
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    number = group["row"].values
    width = max(3, len(number) // 25)
    for ax, name in zip(axes, shown, strict=True):
        values = group[name].values
        color = "C3" if p[name] <= result.error_rate else "C0"
        ax.plot(number, values, ".", color="0.75", markersize=2)
        inner = slice((width - 1) // 2, (width - 1) // 2 + len(number) - width + 1)
        running = np.convolve(values, np.ones(width) / width, "valid")
        ax.plot(number[inner], running, color=color)
        low, high = np.percentile(values, [0.5, 99.5])
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        ax.set_title(f"{name}: adjusted p = {p[name]:.2g}", fontsize=9, color=color)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"row of {result.settings['split']}")
    figure.suptitle(
        f"Order of the rows: {result.verdict} (error rate {result.error_rate:.2g})\n"
        f"running mean over {width} rows",
        fontsize=11,
    )
    return figure
