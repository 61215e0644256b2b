"""Is the guide right? Simulation-based calibration of the latents of each row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from xarray import Dataset

from ppl_vae.checks.ranks import Smooth, band, coverage, ecdf, smooth_test
from ppl_vae.checks.result import CheckResult, Picture, Progress, silent
from ppl_vae.checks.simulation import (
    ASPECTS,
    LOG_WEIGHT,
    Quantity,
    Simulation,
    simulate,
    words,
)
from ppl_vae.checks.statistics import check_level, holm
from ppl_vae.figures import empty
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating

FEWEST = 100
"""Rows below which the tests' p-values are not what they say."""

_NAME = "simulation_based_calibration"
_MARKED = 3.0  # standard deviations of a component from which it is put into words
_NAMED = 6  # faulty quantities that a picture or a sentence names


def simulation_based_calibration(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 1000,
    draws: int = 99,
    coordinates: int = 64,
) -> CheckResult:
    """Tests whether the guide is the posterior, on rows that the fitted model emits.

    A row's latents and data are drawn from the model, then ``draws`` latents from the guide given
    the data: were the guide the posterior, the rank of the true value among them would be uniform
    (Talts et al. 2018, arXiv:1804.06788, theorem 1), whatever it is the rank of. What is ranked,
    and what stands fixed, says :func:`ppl_vae.checks.simulation.simulate`: every coordinate, and
    log-densities, which find what coordinates cannot (Modrák et al. 2023, arXiv:2211.02383): a
    guide that leaves out half of x, or that loses correlations. Each is tested by Neyman's smooth
    test (:func:`ppl_vae.checks.ranks.smooth_test`). The verdict is Holm's (1979, Scand. J. Stat. 6,
    65), valid however the quantities hang together, so that an exact guide fails with probability
    ``level`` at most, up to the test's use of the central limit theorem.

    Held-out data serve as covariates, and to draw global latents; a model that does not fit them is
    no fault here. Of global latents' own posterior nothing is said.

    Each record has the site (empty: all together), the quantity, p, p adjusted by Holm, the
    direction of a fault in words; the mean rank on a scale from 0 to 1, with its standard error
    (of the log-ratio: the probability that truth and a draw are told apart, 0.5 for an exact
    guide); how often the truth lies in the central interval of 50 and of 90 % (of the densities: in
    the region of highest density) with standard errors; and the verdict.

    The group ``prior_sbc`` holds the ranks as numbers from 0 to 1, a variable a quantity, for
    ArviZ's ``plot_ecdf_pit(report.idata)``.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: family-wise error rate of the verdict.
        progress: told the fraction that is done.
        rows: simulated rows, at least 100.
        draws: L, draws of the guide for each.
        coordinates: of a site with more, so many chosen at random are ranked.

    Raises:
        NotApplicable: as :func:`ppl_vae.checks.simulation.simulate`.
        ValueError: a level outside (0, 1), fewer than 100 rows, or than 4 draws; and as there.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    if rows < FEWEST or draws < 4:
        raise ValueError(f"{rows=}, {draws=}: expected at least {FEWEST} rows and 4 draws")
    with evaluating(seed, model, guide):
        found = simulate(
            model,
            guide,
            data,
            split=split,
            seed=seed,
            rows=rows,
            draws=draws,
            coordinates=coordinates,
            progress=progress,
        )
    records = _records(found, level)
    failed = [record for record in records if record["verdict"] == "fail"]
    return CheckResult(
        name=_NAME,
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=min(record["p_adjusted"] for record in records),
        statistics=tuple(records),
        meaning=_meaning(failed, records, found),
        settings={
            "split": split,
            "seed": seed,
            "rows": rows,
            "draws": draws,
            "coordinates": coordinates,
            "correction": "Holm",
        },
        groups=_groups(found),
        pictures={
            _NAME: Picture(
                _ranks_figure,
                "Distribution of the truth's rank among the guide's draws, less a uniform one: a "
                "bow upwards is a posterior that lies too high, downwards too low; an S that "
                "begins upwards is too narrow, downwards too wide: try a richer guide where a line "
                "leaves the grey band.",
            ),
            "coverage": Picture(
                _coverage_figure,
                "How often credible regions hold the truth: below the diagonal the guide is too "
                "sure, above it not sure enough; if it is too sure, try a guide with correlations "
                "or several modes.",
            ),
        },
    )


def _records(found: Simulation, level: float) -> list[dict[str, Any]]:
    tests = [smooth_test(ranks, found.draws) for ranks in found.ranks.T]
    adjusted = holm([test.p for test in tests])
    records: list[dict[str, Any]] = []
    for quantity, ranks, test, p_adjusted in zip(
        found.quantities, found.ranks.T, tests, adjusted, strict=True
    ):
        failed, rows = p_adjusted <= level, len(ranks)
        record = {
            "site": quantity.site,
            "quantity": quantity.name,
            "p": test.p,
            "p_adjusted": p_adjusted,
            "direction": _direction(quantity, test) if failed else "",
            "mean_rank": float(ranks.mean() / found.draws),
            "mean_rank_se": float(ranks.std(ddof=1) / found.draws / math.sqrt(rows)),
        }
        for percent in (50, 90):
            share = float(coverage(ranks, found.draws, percent / 100, highest=not quantity.site))
            record[f"coverage_{percent}"] = share
            record[f"coverage_{percent}_se"] = math.sqrt(share * (1 - share) / rows)
        records.append(record | {"verdict": "fail" if failed else "pass"})
    return records


def _direction(quantity: Quantity, test: Smooth) -> str:
    """What is wrong, in words, the largest first; of densities, a shift says all."""
    said = [
        (abs(float(component)), words(quantity, aspect)[int(component < 0)])
        for aspect, component in zip(ASPECTS, test.components[:2], strict=True)
        if quantity.site or aspect == "shift"
    ]
    said.sort(reverse=True)
    least = max(_MARKED, said[0][0] / 2)
    return ", ".join(word for size, word in said if size > least) or "of another shape"


def _meaning(
    failed: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], found: Simulation
) -> str:
    notes = "".join(f" {note}" for note in found.notes)
    where = f"{len(found.ranks)} rows that the model emits"
    if not failed:
        return (
            f"On {where}, the guide's draws are not told from the posterior's in any of "
            f"{len(records)} quantities.{notes}"
        )
    by_direction: dict[str, list[str]] = {}
    for record in failed:
        by_direction.setdefault(record["direction"], []).append(record["quantity"])
    said = "; ".join(f"{word} in {_some(names)}" for word, names in by_direction.items())
    apart = [r["mean_rank"] for r in records if r["quantity"] == LOG_WEIGHT]
    told = (
        f" The best test tells a draw from the truth with probability {apart[0]:.2f}; 0.5 is an "
        "exact guide."
        if apart
        else ""
    )
    wrong = Counter(word for r in failed for word in r["direction"].split(", "))
    return (
        f"On {where}, the guide is not the posterior: {said}.{told} {_advice(wrong)} "
        f"Rows unlike those it was fitted to may be new to it: see population_predictive.{notes}"
    )


def _advice(wrong: Counter[str]) -> str:
    if any(word.startswith("shifted") for word in wrong):
        return (
            "Posteriors that are shifted want a larger encoder, a longer fit, or steps for each "
            "row (SemiAmortized)."
        )
    return (
        "Ask gaps first: where the family is short, try correlations (FullRank), several modes "
        "(Mixture) or a flow (NormalizingFlow); where the encoder is, a larger one, or steps for "
        "each row (SemiAmortized)."
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _groups(found: Simulation) -> dict[str, Dataset]:
    names = [quantity.name for quantity in found.quantities]
    # As ArviZ's plot_ecdf_pit wants it; between the ranks, so that equal ones are no steps.
    pit = (found.ranks + 0.5) / (found.draws + 1)
    return {
        _NAME: Dataset(
            {"rank": (("row", "quantity"), found.ranks.astype(np.int32))},
            coords={"quantity": names},
            attrs={"draws": found.draws},
        ),
        "prior_sbc": Dataset(
            {name: (("chain", "draw"), pit[None, :, k]) for k, name in enumerate(names)},
            coords={"chain": [0], "draw": np.arange(len(pit))},
        ),
    }


def _panels(result: CheckResult) -> list[tuple[str, bool]]:
    """Title, and whether of all latents together."""
    alone = any(record["site"] for record in result.statistics)
    return [("each coordinate", False)] * alone + [("all latents together", True)]


def _curves(
    result: CheckResult,
    ax: Axes,
    together: bool,
    x: np.ndarray,
    y: np.ndarray,
    without: Collection[str] = (),
) -> None:
    """A line a quantity, ``y`` ``(len(x), quantities)``: grey, or in color if it fails."""
    failed = [k for k, r in enumerate(result.statistics) if r["verdict"] == "fail"]
    failed.sort(key=lambda k: result.statistics[k]["p"])
    own = [
        k
        for k, r in enumerate(result.statistics)
        if together == (not r["site"]) and r["quantity"] not in without
    ]
    for k in own:
        if k not in failed:
            ax.plot(x, y[:, k], color="0.55", linewidth=0.8)
    red = [k for k in failed if k in own]
    for number, k in reversed(list(enumerate(red))):
        record = result.statistics[k]
        label = f"{record['quantity']}: {record['direction']}" if number < _NAMED else None
        color = f"C{(1, 3, 4, 5, 6, 8)[number]}" if number < _NAMED else "mistyrose"
        ax.plot(x, y[:, k], color=color, linewidth=1.3, label=label)
    ax.spines[["top", "right"]].set_visible(False)
    if red:
        # Below, where it hides no line.
        ax.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _ranks_figure(result: CheckResult) -> Figure:
    """The ranks' empirical distribution functions less the uniform one, and a band."""
    settings = result.settings
    rows, draws = settings["rows"], settings["draws"]
    ranks = result.groups[_NAME]["rank"].values
    probability = 1 - result.error_rate / len(result.statistics)
    low, high = band(rows, draws, probability, seed=settings["seed"])
    points = np.arange(1, draws + 1) / (draws + 1)
    y = ecdf(ranks, draws) - points[:, None]
    panels = _panels(result)
    figure = empty(4.6 * len(panels), 5.0)
    for ax, (title, together) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        ax.fill_between(points, low - points, high - points, color="0.88", linewidth=0)
        ax.axhline(0, color="0.7", linewidth=0.8)
        _curves(result, ax, together, points, y)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="rank of the truth among draws, from 0 to 1", xlim=(0, 1))
        ax.set_ylabel("distribution, less uniform")
    figure.suptitle(_title(result), fontsize=10)
    return figure


def _coverage_figure(result: CheckResult) -> Figure:
    """Coverage of credible regions by their nominal probability."""
    settings = result.settings
    ranks = result.groups[_NAME]["rank"].values
    nominal = np.linspace(0, 1, 41)
    panels = _panels(result)
    figure = empty(4.6 * len(panels), 5.4)
    error = 3 * np.sqrt(nominal * (1 - nominal) / settings["rows"])
    for ax, (title, together) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        ax.fill_between(nominal, nominal - error, nominal + error, color="0.88", linewidth=0)
        y = coverage(ranks, settings["draws"], nominal, highest=together)
        ax.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        _curves(result, ax, together, nominal, y, without=(LOG_WEIGHT,))
        region = "region of highest density" if together else "central interval"
        ax.set_title(f"{title}: {region}", fontsize=10)
        ax.set(xlabel="nominal probability", xlim=(0, 1), ylim=(0, 1))
        ax.set_ylabel("share of rows whose truth is inside")
    figure.suptitle(_title(result), fontsize=10)
    return figure


def _title(result: CheckResult) -> str:
    settings = result.settings
    return (
        f"Calibration on simulated rows: {result.verdict} (family-wise error rate "
        f"{result.error_rate:.2g})\n{settings['rows']} rows from the model, "
        f"{settings['draws']} draws of the guide for each"
    )
