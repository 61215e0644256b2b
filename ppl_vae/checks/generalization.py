"""Do the rows that a pair was fitted to get more probability than others?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from xarray import Dataset

from ppl_vae.checks.chosen import numbers_of_rows, score_chosen
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level, holm
from ppl_vae.data import Dataset as Data
from ppl_vae.data import as_dataset
from ppl_vae.evaluation import Scored
from ppl_vae.figures import empty
from ppl_vae.model import GenerativeModel

_EVIDENCE, _ELBO = "log p(x)", "ELBO"
_TESTED = (_EVIDENCE, _ELBO)
_FEWEST = 10  # rows


def generalization(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 2000,
    samples: int = 50,
    tolerance: float = 0.1,
) -> CheckResult:
    """Looks for overfitting: training rows that get clearly more probability than held-out ones.

    Rows of both at random, with as many draws. Every fit gains a little on the rows that
    it has seen, so that no gap at all is no useful null hypothesis. It is that the gap, the
    mean over training rows less that over held-out rows, is at most ``tolerance`` standard
    deviations of the held-out rows. That has no unit: densities may be of either sign and of any
    size, and scaling x shifts all of them alike. For Gaussian figures 0.1 means that a training row
    has a higher one than a held-out row in 53 % of all pairs of rows.

    Two gaps are tested, one-sided, by Welch's t with the error of the estimated deviation taken in,
    and corrected by Holm: of log p(x), where the model is overfitted; and of the ELBO, where the
    guide may be (Cremer et al. 2018, arXiv:1801.03558, section 5.5). The gaps of its two parts, the
    reconstruction and the KL with its sign, are shown besides. The p-value is exact for many rows,
    and conservative for a pair that gains less than the tolerance.

    Each record has the figure, its mean of both splits, gap, standard error, tolerance (nats per
    datum all), p, adjusted p, and the verdict.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: family-wise error rate of the verdict.
        rows: of each split; all of them where it has fewer.
        samples: importance draws a row.
        tolerance: in standard deviations over held-out rows; 0 tests for any gap at all.

    Raises:
        NotApplicable: ``split`` is "train", or holds the same rows; fewer than 10 rows; a
            site stands in a plate besides that of the rows.
        ValueError: a negative tolerance; a level outside (0, 1); and as :func:`ppl_vae.evaluate`.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a number of standard deviations, from 0")
    dataset = as_dataset(data)
    counts = {name: min(rows, len(dataset.split(name))) for name in ("train", split)}
    _check_splits(dataset, split, min(counts.values()))
    figures: dict[str, dict[str, np.ndarray]] = {}
    for number, name in enumerate(counts):
        chosen = numbers_of_rows(len(dataset.split(name)), rows, seed)
        scored = score_chosen(model, guide, dataset, chosen, split=name, samples=samples, seed=seed)
        figures[name] = _figures(scored)
        progress((1 + number) / 2)
    records = [
        _record(name, figures["train"][name], figures[split][name], tolerance)
        for name in figures[split]
    ]
    tested = [record for record in records if record["figure"] in _TESTED]
    for record, p in zip(tested, holm([record["p"] for record in tested]), strict=True):
        record |= {"p_adjusted": p, "verdict": "fail" if p <= level else "pass"}
    failed = [record for record in tested if record["verdict"] == "fail"]
    return CheckResult(
        name="generalization",
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=min(record["p_adjusted"] for record in tested),
        statistics=tuple(records),
        meaning=_meaning(failed, records, counts[split], split),
        settings={
            "split": split,
            "seed": seed,
            "rows": counts[split],
            "train_rows": counts["train"],
            "samples": samples,
            "tolerance": tolerance,
            "correction": "Holm",
        },
        groups={
            "generalization": Dataset(
                {
                    name: (("split", "row"), _stacked([figures[s][name] for s in counts]))
                    for name in figures[split]
                },
                coords={"split": ["train", split]},
            )
        },
        pictures={"generalization": Picture(_figure, _CAPTION)},
    )


_CAPTION = (
    "Left: log p(x) of training and held-out rows; right: how much more training rows get, with 95 "
    "% intervals, and the gap that is tolerated; try early stopping, a smaller decoder, or more "
    "rows."
)


def _check_splits(dataset: Data, split: str, rows: int) -> None:
    if split == "train":
        raise NotApplicable("training rows were asked for; a gap needs others besides")
    train, others = dataset.splits["train"], dataset.splits[split]
    if all(torch.equal(column, others[name]) for name, column in train.items()):
        raise NotApplicable(f"{split!r} holds the training rows; a gap needs others besides")
    if rows < _FEWEST:
        raise NotApplicable(f"{rows} rows; a gap needs at least {_FEWEST} of each split")


def _figures(scored: Scored) -> dict[str, np.ndarray]:
    """Nats of each row, all the more the better; the KL of global sites is not the rows'."""
    elbo, reconstruction = scored.columns["elbo", ""], scored.columns["reconstruction", ""]
    figures = {
        _EVIDENCE: scored.columns["log evidence", ""],
        _ELBO: elbo,
        "reconstruction": reconstruction,
        "-KL": elbo - reconstruction,
    }
    return {name: values.numpy() for name, values in figures.items()}


def _stacked(splits: list[np.ndarray]) -> np.ndarray:
    """``(splits, rows)``, nan where a split has fewer."""
    rows = max(map(len, splits))
    return np.stack([np.pad(own, (0, rows - len(own)), constant_values=np.nan) for own in splits])


def _record(name: str, train: np.ndarray, held: np.ndarray, tolerance: float) -> dict[str, Any]:
    gap, scale, counts = train.mean() - held.mean(), held.std(ddof=1), (len(train), len(held))
    error = math.sqrt(train.var(ddof=1) / len(train) + scale**2 / len(held))
    p = math.nan
    if name in _TESTED:
        # What each row adds to the sum of mean and tolerated deviations (the latter's derivative).
        bent = (held - held.mean()) ** 2 / (2 * scale) if scale > 0 else 0.0
        spread = train.var(ddof=1), (held + tolerance * bent).var(ddof=1)
        variances = [v / n for v, n in zip(spread, counts, strict=True)]
        total = sum(variances)
        excess = gap - tolerance * scale
        if total > 0:
            freedom = total**2 / sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
            p = float(student.sf(excess / math.sqrt(total), freedom))
        else:
            p = 1.0 if excess <= 0 else 0.0
    return {
        "figure": name,
        "train": float(train.mean()),
        "held_out": float(held.mean()),
        "gap": float(gap),
        "gap_se": error,
        "tolerated": float(tolerance * scale) if name in _TESTED else math.nan,
        "p": p,
        "p_adjusted": math.nan,
        "verdict": "measured",
    }


def _meaning(
    failed: list[dict[str, Any]], records: list[dict[str, Any]], rows: int, split: str
) -> str:
    by_name = {record["figure"]: record for record in records}
    said = ", ".join(
        f"{r['gap']:.3g} ± {r['gap_se']:.2g} of {r['figure']} (tolerated: {r['tolerated']:.3g})"
        for r in (failed or [by_name[name] for name in _TESTED])
    )
    parts = (
        f"reconstruction {by_name['reconstruction']['gap']:.3g}, -KL {by_name['-KL']['gap']:.3g}"
    )
    if not failed:
        return (
            f"Training rows get no clearly larger figures than {rows} held-out ones ({split}): "
            f"gaps in nats per datum are {said}."
        )
    evidence = by_name[_EVIDENCE]
    guilty = (
        "The model is overfitted, or the splits differ otherwise: stop earlier, or try a smaller "
        "decoder, dropout, or more rows."
        if evidence["verdict"] == "fail"
        else f"The gap of log p(x) is {evidence['gap']:.3g} ± {evidence['gap_se']:.2g}; as far as "
        "that of the ELBO exceeds it, the guide is overfitted and not the model: try a smaller "
        "encoder, or fit the guide further on rows that the model emits."
    )
    return (
        f"Training rows get more probability than {rows} held-out ones ({split}), in nats per "
        f"datum {said}; of its parts: {parts}. {guilty}"
    )


def _figure(result: CheckResult) -> Figure:
    """Distributions of log p(x), and the gaps."""
    split = result.settings["split"]
    figure = empty(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    values = result.groups["generalization"][_EVIDENCE]
    low, high = np.nanpercentile(values.values, [0.5, 100])
    bins = max(8, min(40, values.sizes["row"] // 8))
    edges = np.linspace(low, high if high > low else low + 1, bins)
    for name, color in (("train", "C1"), (split, "C0")):
        of_rows = values.sel(split=name).dropna("row").values
        weights = np.full(len(of_rows), 1 / len(of_rows))
        left.hist(of_rows, edges, weights=weights, histtype="step", color=color, label=name)
        left.axvline(of_rows.mean(), color=color, linewidth=1, linestyle="--")
    left.set(xlabel="log p(x), nats (dashed: means)", ylabel="share of rows")
    left.legend(frameon=False, loc="upper left")
    for number, record in enumerate(reversed(result.statistics)):
        color = {"fail": "C3", "pass": "C0"}.get(record["verdict"], "0.5")
        error = 1.96 * record["gap_se"]
        right.errorbar(record["gap"], number, xerr=error, fmt="o", color=color, capsize=3)
        if record["verdict"] != "measured":
            right.plot([record["tolerated"]] * 2, [number - 0.3, number + 0.3], color="black")
    right.axvline(0, color="0.6", linewidth=1, linestyle="--")
    names = [record["figure"] for record in reversed(result.statistics)]
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("train less held-out, nats per datum\n(bar: tolerated; red: fails)")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Generalization: {result.verdict} (family-wise error rate {result.error_rate:.2g}), "
        f"{result.settings['train_rows']} and {result.settings['rows']} rows",
        fontsize=11,
    )
    return figure
