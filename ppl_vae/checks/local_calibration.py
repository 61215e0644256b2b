"""Is the guide right for every kind of data, or only on average?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor
from xarray import Dataset

from ppl_vae.checks import local_figures
from ppl_vae.checks.ranks import polynomials
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.simulation import ASPECTS, Quantity, Simulation, simulate, words
from ppl_vae.checks.simulation_based_calibration import FEWEST
from ppl_vae.checks.statistics import check_level, holm
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating

_NAME = "local_calibration"
_COMPONENTS = 10  # principal ones
_ROUNDING = 1e-9  # share of the variance
_PENALTIES = np.logspace(0, 5, 11)
_SHOWN = 6
_SIMPLE = 0.3  # rank correlation from which a summary of x says where
_EACH = 12  # entries of a column up to which each of them is a summary
_MARKED = 2.0  # standard errors from which a part of the rows is called wrong


def local_calibration(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 2000,
    draws: int = 49,
    coordinates: int = 64,
) -> CheckResult:
    """Tests whether the guide is as right for one kind of data as for another.

    Ranks of true latents among the guide's draws are those of
    :func:`ppl_vae.checks.simulation.simulate`. Were the guide the posterior, a rank would be
    uniform given x too, so that nothing in x predicted it (Zhao et al. 2021, arXiv:2102.10473;
    Linhart et al. 2023, arXiv:2306.03580): a guide that is too narrow for large x and too wide for
    small x can be right on average. On one half of the rows a ridge regression learns to predict
    two scores of each rank, its first two orthonormal polynomials (shift and spread), from x: its
    principal components, their products, its size. On the other half, the correlation r of
    predictions, in ranks, and scores has mean 0 and variance 1 / (n - 1) if x and the rank are
    independent, and ``sqrt(n - 1) r`` is about a standard normal (Hoeffding 1951, "A combinatorial
    central limit theorem"); p is its upper tail. The verdict is Holm's over both scores of all
    quantities. An error that is the same for all x is no fault here: see
    ``simulation_based_calibration``.

    Each record has the site (empty: all latents together), the quantity, the score, the
    correlation, p, p adjusted by Holm; for the fifths of the rows with the lowest and the highest
    prediction, the mean of the score with its standard error (0 if calibrated; of shift, above 0
    where the guide lies too low; of spread, where it is too narrow); what is special about the
    highest fifth (``region``: the summary of x that goes with the prediction); the fault in words;
    and the verdict.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: family-wise error rate of the verdict.
        progress: told the fraction that is done.
        rows: simulated rows, at least 200.
        draws: L, draws of the guide for each.
        coordinates: of a site with more, so many chosen at random are ranked.

    Raises:
        NotApplicable: the simulated data do not vary; and as
            :func:`ppl_vae.checks.simulation.simulate`.
        ValueError: a level outside (0, 1), fewer than 200 rows, or than 4 draws; and as there.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    if rows < 2 * FEWEST or draws < 4:
        raise ValueError(f"{rows=}, {draws=}: expected at least {2 * FEWEST} rows and 4 draws")
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
            progress=lambda done: progress(0.9 * done),
        )
    learned = _learn(found, seed)
    records = _records(found.quantities, learned, level)
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
            "tested_rows": len(learned.rows),
            "draws": draws,
            "coordinates": coordinates,
            "correction": "Holm",
        },
        groups=_groups(found, learned),
        pictures={
            _NAME: Picture(
                local_figures.fifths,
                "Mean score of the truth's rank in fifths of the rows, from lowest to highest "
                "prediction: 0 is right; a slope is a guide that is wrong in different ways for "
                "different data: try a larger encoder, or SemiAmortized.",
            ),
            "map": Picture(
                local_figures.map_of_data,
                "Where among the data, on their first two principal components, the guide is wrong "
                "in the quantity that is predicted best: red and blue are opposite faults.",
            ),
        },
    )


@dataclass(frozen=True, eq=False)
class _Learned:
    """Predictions of scores, for rows that were not learned from.

    Attributes:
        rows: numbers of the rows.
        predictions, scores: ``(2, quantities, rows)``, by :data:`ASPECTS`.
        summaries: simple figures ``(rows,)`` of a row's data, by name.
        components: ``(rows, 1 or 2)``, the first principal components.
    """

    rows: np.ndarray
    predictions: np.ndarray
    scores: np.ndarray
    summaries: Mapping[str, np.ndarray]
    components: np.ndarray


def _learn(found: Simulation, seed: int) -> _Learned:
    features, components = _features(found.columns)
    scores = polynomials(found.draws)[:2, found.ranks].transpose(0, 2, 1)
    order = np.random.default_rng(seed).permutation(len(found.ranks))
    known, asked = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    flat = scores.reshape(-1, len(order)).T  # (rows, 2 * quantities)
    ridge = RidgeCV(_PENALTIES, alpha_per_target=True).fit(features[known], flat[known])
    predictions = ridge.predict(features[asked]).T.reshape(*scores.shape[:2], -1)
    return _Learned(
        rows=asked,
        predictions=predictions,
        scores=scores[..., asked],
        summaries={k: v[asked] for k, v in _summaries(found.columns).items()},
        components=components[asked, :2],
    )


def _features(columns: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """What scores are predicted from, ``(rows, features)``; and the principal components."""
    x = np.concatenate([_flat(column) for column in columns.values()], 1)
    x = x[:, x.std(0) > 0]
    if not x.shape[1]:
        raise NotApplicable("the data that the model emits are the same in every row")
    x = StandardScaler().fit_transform(x)
    pca = PCA(min(_COMPONENTS, *x.shape), random_state=0)
    components = pca.fit_transform(x)
    # One-hot labels, for one, have a direction in which nothing varies.
    components = components[:, pca.explained_variance_ratio_ > _ROUNDING]
    components = StandardScaler().fit_transform(components)
    size = np.sqrt(np.square(x).mean(1, keepdims=True))
    products = PolynomialFeatures(2, include_bias=False).fit_transform(components)
    return StandardScaler().fit_transform(np.concatenate([products, size], 1)), components


def _summaries(columns: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Figures of a row by which a region can be told in words."""
    found: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        x = _flat(column)
        spread = np.where(x.std(0) > 0, x.std(0), 1.0)
        away = np.abs(x - x.mean(0)) / spread
        found[f"distance of {name} from its mean"] = np.sqrt(np.square(away).mean(1))
        if x.shape[1] > 1:
            found[f"mean of {name}"] = x.mean(1)
        if x.shape[1] <= _EACH:
            for k, (entry, far) in enumerate(zip(x.T, away.T, strict=True)):
                found[f"{name}[{k}]"] = entry
                found[f"distance of {name}[{k}] from its mean"] = far
    return found


def _flat(column: Tensor) -> np.ndarray:
    return column.double().reshape(len(column), -1).numpy()


def _records(
    quantities: Sequence[Quantity], learned: _Learned, level: float
) -> list[dict[str, Any]]:
    places = [(a, k) for k in range(len(quantities)) for a in range(len(ASPECTS))]
    tests = [_correlation(learned.predictions[i], learned.scores[i]) for i in places]
    adjusted = holm([p for _, p in tests])
    records: list[dict[str, Any]] = []
    for (a, k), (r, p), p_adjusted in zip(places, tests, adjusted, strict=True):
        failed = p_adjusted <= level
        parts = local_figures.by_fifths(learned.predictions[a, k], learned.scores[a, k])
        lowest, highest = parts[0], parts[-1]
        region = _region(learned, a, k)
        records.append(
            {
                "site": quantities[k].site,
                "quantity": quantities[k].name,
                "aspect": ASPECTS[a],
                "correlation": r,
                "p": p,
                "p_adjusted": p_adjusted,
                "lowest": lowest[0],
                "lowest_se": lowest[1],
                "highest": highest[0],
                "highest_se": highest[1],
                "region": region,
                "direction": _direction(words(quantities[k], ASPECTS[a]), lowest, highest)
                if failed
                else "",
                "verdict": "fail" if failed else "pass",
            }
        )
    return records


def _correlation(prediction: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """Of the prediction's ranks with the score, and its p-value: small if they go together."""
    if np.ptp(prediction) == 0 or np.ptp(score) == 0:
        return 0.0, 1.0
    ranks = scipy.stats.rankdata(prediction)
    r = float(np.corrcoef(ranks, score)[0, 1])
    return r, float(scipy.stats.norm.sf(r * math.sqrt(len(score) - 1)))


def _region(learned: _Learned, aspect: int, quantity: int) -> str:
    """What is large or small where the prediction is high; empty if nothing simple is."""
    prediction = scipy.stats.rankdata(learned.predictions[aspect, quantity])
    if np.ptp(prediction) == 0:
        return ""
    found = {
        name: float(np.corrcoef(prediction, scipy.stats.rankdata(values))[0, 1])
        for name, values in learned.summaries.items()
        if np.ptp(values) > 0
    }
    name = max(found, key=lambda name: abs(found[name]), default="")
    if not name or abs(found[name]) < _SIMPLE:
        return ""
    return f"{'large' if found[name] > 0 else 'small'} {name}"


def _direction(
    said: tuple[str, str], lowest: tuple[float, float], highest: tuple[float, float]
) -> str:
    """The fault in words: at the region, and opposite to it."""

    def word(mean: float, error: float) -> str:
        if abs(mean) < _MARKED * error:
            return "right"
        return said[int(mean < 0)]

    here, there = word(*highest), word(*lowest)
    return f"{here} there, {'less so' if here == there else there} at the other end"


def _meaning(
    failed: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], found: Simulation
) -> str:
    notes = "".join(f" {note}" for note in found.notes)
    where = f"{len(found.ranks)} rows that the model emits"
    if not failed:
        return (
            f"On {where}, nothing that was learned of the data predicts where the truth lies among "
            f"the guide's draws, in any of {len(records) // 2} quantities: it is as right for one "
            f"kind of data as for another.{notes}"
        )
    worst = sorted(failed, key=lambda r: r["p"])[:_SHOWN]
    said = "; ".join(
        f"{r['quantity']} ({r['aspect']}), "
        f"{'for ' + r['region'] if r['region'] else 'in a region without a simple name'}: "
        f"{r['direction']}"
        for r in worst
    )
    more = f"; and {len(failed) - len(worst)} more" if len(failed) > len(worst) else ""
    return (
        f"On {where}, the guide is wrong in different ways for different data: {said}{more}. Try "
        "an encoder that sees all of the data and is larger, a longer fit, or steps for each row "
        f"(SemiAmortized).{notes}"
    )


def _groups(found: Simulation, learned: _Learned) -> dict[str, Dataset]:
    dims = ("aspect", "quantity", "row")
    return {
        _NAME: Dataset(
            {
                "prediction": (dims, learned.predictions),
                "score": (dims, learned.scores),
                "component": (("row", "principal"), learned.components),
            },
            coords={
                "aspect": list(ASPECTS),
                "quantity": [quantity.name for quantity in found.quantities],
                "row": learned.rows,
            },
        )
    }
