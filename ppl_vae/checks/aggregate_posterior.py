"""Does the aggregate posterior match the prior?"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor
from xarray import Dataset

from ppl_vae.checks import latent_figures as figures
from ppl_vae.checks.chosen import given, numbers_of_rows
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level
from ppl_vae.data import as_dataset
from ppl_vae.draws import (
    laid_out,
    model_nodes,
    particles,
    posterior_nodes,
    rows_at_once,
    unobserved_sites,
)
from ppl_vae.guide import Prior
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, check_pair, evaluating

_FEWEST = 40  # rows
_BINS = 10  # of a coordinate, as probable under the prior each
_LISTED = 50  # coordinates, the farthest first
_PRODUCTS = 40  # coordinates up to which the classifier sees products of every two


def aggregate_posterior(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 2000,
    tolerance: float = 0.05,
) -> CheckResult:
    """Looks for latents of the data that the prior would not draw, or draws that no data have.

    Where model and guide are right, draws of q(z | x) for rows x of the data are draws of the
    prior (Hoffman & Johnson 2016, "ELBO surgery"). A classifier two-sample test (Lopez-Paz & Oquab
    2017, arXiv:1610.06545): of half of the rows, a classifier learns to tell a row's draw from one
    of the prior, all local sites together. Of each other row it says which of two such draws is
    the row's. If both have one law, it is right by chance in half of the pairs that it does not
    find alike, *exactly*, whatever it has learned, and given a row's covariates, which it sees too.
    The null hypothesis is that it is right in at most ``1/2 + tolerance`` of them, since no fit
    matches its prior exactly; the p-value is that of the exact binomial test.

    Global latents are drawn once for many rows, from the guide, and the prior is given them.

    The first record is that of the test. The others, of the 50 coordinates that are farthest apart,
    say where: their KL of aggregate posterior from prior, of histograms of ten bins that are as
    probable under the prior each, less its mean for equal laws (nats); the shift of the mean, in
    standard deviations of the prior; and the ratio of both standard deviations.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows, draws and the classifier.
        level: error rate of the verdict.
        rows: held-out rows, chosen at random; all of them where the split has fewer.
        tolerance: what the classifier may be right in above one half; 0 tests for any difference.

    Raises:
        NotApplicable: no latent of the rows; the guide is :class:`ppl_vae.Prior`, which draws from
            the prior anyway; fewer than 40 rows.
        ValueError: a tolerance or a level out of range; draws that are not finite; no column that
            the model observes, or a covariate is missing.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    if not 0 <= tolerance < 0.5:
        raise ValueError(f"tolerance={tolerance}: expected a share of the rows, from 0 to 1/2")
    if isinstance(guide, Prior):
        raise NotApplicable("the guide draws from the prior, on purpose")
    dataset = as_dataset(data)
    chosen = numbers_of_rows(len(dataset.split(split)), rows, seed)
    if len(chosen) < _FEWEST:
        raise NotApplicable(
            f"{len(chosen)} rows of {split!r}; half of them must teach a "
            f"classifier: expected at least {_FEWEST}"
        )
    with evaluating(seed, model, guide):
        columns = given(model, dataset, chosen, split=split)
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        names, aggregate, prior = _draws(model, guide, columns)
    if not names:
        raise NotApplicable(f"{type(model).__name__} has no latent for each row")
    if not (np.isfinite(aggregate).all() and np.isfinite(prior).all()):
        raise ValueError("a latent was drawn that is not finite: the fit has diverged")
    progress(0.5)
    context = [c.reshape(len(chosen), -1) for c in model.covariates_in(columns).values()]
    seen = torch.cat(context, 1).double().cpu().numpy() if context else np.empty((len(chosen), 0))
    right, pairs = _told_apart(
        np.concatenate([aggregate, seen], 1), np.concatenate([prior, seen], 1), seed
    )
    p = float(binom.sf(right - 1, pairs, 0.5 + tolerance))
    tested = {
        "what": "test",
        "name": "all",
        "accuracy": right / pairs if pairs else 0.5,
        "pairs": pairs,
        "kl": math.nan,
        "mean_shift": math.nan,
        "sd_ratio": math.nan,
        "p": p,
        "verdict": "fail" if p <= level else "pass",
    }
    coordinates = [_coordinate(n, aggregate[:, k], prior[:, k]) for k, n in enumerate(names)]
    coordinates.sort(key=lambda record: -record["kl"])
    listed = coordinates[:_LISTED]
    at = [names.index(record["name"]) for record in listed]
    return CheckResult(
        name="aggregate_posterior",
        verdict="fail" if p <= level else "pass",
        error_rate=level,
        p=p,
        statistics=(tested, *listed),
        meaning=_meaning(tested, listed, len(chosen), split),
        settings={
            "split": split,
            "seed": seed,
            "rows": len(chosen),
            "tolerance": tolerance,
            "coordinates": len(names),
        },
        groups={
            "aggregate_posterior": Dataset(
                {
                    "prior": (("row", "coordinate"), prior[:, at]),
                    "aggregate": (("row", "coordinate"), aggregate[:, at]),
                },
                coords={
                    "row": chosen.numpy(),
                    "coordinate": np.array([names[k] for k in at], dtype=str),
                },
            )
        },
        pictures={
            "aggregate_posterior": Picture(
                figures.marginals,
                "The coordinates in which posterior draws of held-out rows and draws of the prior "
                "differ most; where they do, try a learned prior: mixture, VampPrior, flow.",
            )
        },
    )


def _draws(
    model: GenerativeModel, guide: torch.nn.Module, columns: dict[str, Tensor]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the local sites' coordinates, and a draw of each row of both, ``(rows, names)``."""
    rows = len(next(iter(columns.values())))
    sites = unobserved_sites(model, columns)
    width = sum(site.event_shape.numel() for site in sites.values())
    names: list[str] = []
    both: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for part in parts(rows, rows_at_once(width)):
        some = {name: column[part] for name, column in columns.items()}
        size = part.stop - part.start
        drawn, nesting = posterior_nodes(model, guide, some, draws=1)
        local = [name for name in sites if name in drawn and sites[name].local]
        shared = {n: node["value"] for n, node in drawn.items() if n not in local}
        with particles(1, nesting):
            anew = model_nodes(model, shared, rows=size, columns=some)
        for values, nodes in zip(both, (drawn, anew), strict=True):
            flat = {n: laid_out(nodes[n], 1, nesting)[1][0].reshape(size, -1) for n in local}
            names = [coordinate for n in local for coordinate in sites[n].coordinates]
            if flat:
                values.append(torch.cat([z.double() for z in flat.values()], 1).cpu().numpy())
    if not names:
        return [], np.empty((rows, 0)), np.empty((rows, 0))
    return names, np.concatenate(both[0]), np.concatenate(both[1])


def _told_apart(aggregate: np.ndarray, prior: np.ndarray, seed: int) -> tuple[int, int]:
    """How many pairs of the second half a classifier of the first half tells apart, of how many
    that it does not find alike."""
    half = len(aggregate) // 2
    x = np.concatenate([aggregate[:half], prior[:half]])
    y = np.repeat([1, 0], half)
    linear: Any = make_pipeline(
        FunctionTransformer(_with_products),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=500),
    )
    trees: Any = HistGradientBoostingClassifier(
        max_iter=50, learning_rate=0.1, max_leaf_nodes=8, l2_regularization=1.0, random_state=seed
    )
    score = np.zeros((2, len(aggregate) - half))
    for classifier in (linear, trees):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fit that stops early, which does no harm
            classifier.fit(x, y)
        for k, draws in enumerate((aggregate, prior)):
            # Scores that differ by rounding alone would be no order.
            score[k] += classifier.decision_function(draws[half:]).round(9)
    difference = score[0] - score[1]
    return int((difference > 0).sum()), int((difference != 0).sum())


def _with_products(z: np.ndarray) -> np.ndarray:
    """With squares, and products of every two coordinates where they are few."""
    if z.shape[1] > _PRODUCTS:
        return np.concatenate([z, z**2], 1)
    i, j = np.triu_indices(z.shape[1])
    return np.concatenate([z, z[:, i] * z[:, j]], 1)


def _coordinate(name: str, aggregate: np.ndarray, prior: np.ndarray) -> dict[str, Any]:
    scale = float(prior.std())
    return {
        "what": "coordinate",
        "name": name,
        "accuracy": math.nan,
        "pairs": len(prior),
        "kl": marginal_kl(aggregate, prior),
        "mean_shift": float(aggregate.mean() - prior.mean()) / scale if scale > 0 else math.nan,
        "sd_ratio": float(aggregate.std()) / scale if scale > 0 else math.nan,
        "p": math.nan,
        "verdict": "measured",
    }


def marginal_kl(aggregate: np.ndarray, prior: np.ndarray) -> float:
    """KL of one number's law from another's, from draws ``(rows,)`` of both; nats, from 0.

    Of histograms whose bins have the same number of draws of ``prior``, with half a draw more in
    each so that none is empty; less ``(bins - 1) (1/n + 1/m) / 2``, its mean for equal laws.
    """
    values = np.unique(prior)
    # Discrete values are bins of their own; others end between them.
    quantiles = np.quantile(prior, np.arange(1, _BINS) / _BINS)
    edges = (values[1:] + values[:-1]) / 2 if len(values) <= _BINS else np.unique(quantiles)
    q, p = (
        np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1) + 0.5
        for x in (aggregate, prior)
    )
    q, p = q / q.sum(), p / p.sum()
    by_chance = len(edges) * (1 / len(aggregate) + 1 / len(prior)) / 2
    return max(0.0, float((q * np.log(q / p)).sum()) - by_chance)


def _meaning(tested: dict[str, Any], listed: list[dict[str, Any]], rows: int, split: str) -> str:
    if tested["verdict"] == "pass":
        return (
            f"Posterior draws of {rows} held-out rows ({split}) are hardly told from draws of the "
            f"prior: a classifier is right in {tested['accuracy']:.3f} of the pairs."
        )
    far = [r for r in listed[:3] if r["kl"] > 0.01]
    said = ", ".join(
        f"{r['name']} (KL {r['kl']:.2g} nats, mean shifted by {r['mean_shift']:.2g}, standard "
        f"deviation times {r['sd_ratio']:.2g})"
        for r in far
    )
    where = f"Farthest apart: {said}." if far else "Each coordinate alone is much alike: their "
    where += "" if far else "dependence differs."
    return (
        f"Posterior draws of {rows} held-out rows ({split}) are not those of the prior: a "
        f"classifier is right in {tested['accuracy']:.3f} of the pairs. {where} What the model "
        "emits comes from where no data are: try a learned prior (mixture, VampPrior, flow), or a "
        "more expressive guide."
    )
