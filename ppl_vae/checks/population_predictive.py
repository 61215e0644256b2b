"""Population predictive check: does the fitted model emit data like those that were held out?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae.checks.replication import (
    Columns,
    Compared,
    check_settings,
    compare,
    compared,
    from_the_start,
    is_one_hot,
    shown,
)
from ppl_vae.checks.result import CheckResult, Progress, silent
from ppl_vae.checks.statistics import (
    OF_ROWS,
    STATISTICS,
    Statistic,
    distance_to,
    told_apart,
)
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.draws import held_out, unobserved_sites
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, check_pair, evaluating

_PRIOR = (
    "Where totals or dependence differ, latents drawn from the prior are not those of real rows: "
    "try a learned prior (mixture, VampPrior, flow), or more latents."
)
_LIKELIHOOD = (
    "Where spread, zeros, whole numbers or extremes differ, try another likelihood, or a learned "
    "scale."
)
ADVICE = {
    "mean": "Where the mean differs, a longer fit may help, if the ELBO is still rising.",
    **dict.fromkeys([*STATISTICS][1:], _LIKELIHOOD),
    **dict.fromkeys(OF_ROWS, _PRIOR),
    "frequency": "Where classes differ in frequency, learn the labels' prior, or set it.",
    "distance to training rows": (
        "Where rows are nearer to training rows than held-out ones are, the decoder has learned "
        "them by heart: take a smaller one, or a shorter fit; where they are farther, look at "
        "samples."
    ),
    "log-odds of being real": "A classifier tells the model's rows from real ones: see samples.",
}
CAPTION = (
    "Each statistic over data sets from the model, and its value in the data: a line in the tail "
    "is a way in which the model differs; try the prior where totals differ, the likelihood where "
    "spread, zeros or extremes do."
)
_LEARNED_FROM = 5000  # training rows at most


def population_predictive(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 1000,
    replicates: int = 500,
    statistics: Mapping[str, Statistic] | None = None,
    site: str | None = None,
) -> CheckResult:
    """Compares held-out data with data sets of as many rows that the fitted model emits.

    Replicates are drawn from the story's start: local latents, labels included, from their
    priors, global ones from the guide; covariates are those of the held-out rows. For a statistic
    T, ``p = 2 min(P(T_rep <= T), P(T_rep >= T))``, at most 1, each probability estimated by ``(1 +
    count) / (1 + replicates)``, so that the p-value is valid whatever the number of replicates
    (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39). Ties count on both sides, which is
    conservative. The verdict is by the largest deviation among all statistics
    (:func:`ppl_vae.checks.statistics.max_adjusted`), so that a model that is the truth fails with
    probability ``level`` at most. The check is the population predictive check of Moran, Blei &
    Ranganath 2019 (arXiv:1908.00882), with the fitted parameters as they are.

    The statistics that are ready: of every observable those of
    :data:`~ppl_vae.checks.statistics.STATISTICS`, and of rows with several entries also those of
    :data:`~ppl_vae.checks.statistics.OF_ROWS`; of labels the frequency of each class; and, where
    there are training rows beside the held-out ones, two that are learned from those: the distance
    to the nearest training row, and what a classifier says that tells training rows from the
    model's.

    Each record has the statistic's name, its observed value, mean and standard deviation over
    replicates, p with its Monte Carlo standard error, p adjusted for all of them, and the verdict:
    "pass", "fail", or "not applicable" (with the reason in ``note``) for a statistic that is nan,
    or the same in the data and every replicate. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows, draws and classifier.
        level: family-wise error rate of the verdict.
        progress: told the fraction that is done.
        rows: held-out rows, chosen at random; all of them where the split has fewer.
        replicates: number of replicated data sets.
        statistics: name -> function of a data set ``(rows, D)`` in float64, D all the event's
            dims, to a number; None: those that are ready.
        site: the observable that is compared; None: all of them, or, with ``statistics``, the
            first.

    Raises:
        NotApplicable: there is one row.
        ValueError: too few rows, or too few replicates for any p-value to be below ``level`` after
            correction; a level outside (0, 1); a statistic that does not return one number; none
            that is applicable; a model that emits values that are not finite.
        PairError: guide or data do not fit the model.
    """
    check_settings(level, rows, replicates)
    dataset = as_dataset(data)
    with evaluating(seed, model, guide):
        _, columns = held_out(model, dataset, split=split, rows=rows, seed=seed)
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        chosen = compared(model, columns, statistics, site)
        if statistics is None:
            sites = {one.site for one in chosen.values()}
            chosen |= _learned(model, guide, dataset, columns, sites, split=split, seed=seed)
        return compare(
            "population_predictive",
            model,
            columns,
            chosen,
            from_the_start(model, guide, columns, replicates),
            count=replicates,
            level=level,
            settings={"split": split, "seed": seed},
            against="data sets that the model emits",
            advice=ADVICE,
            caption=CAPTION,
            progress=progress,
        )


def _learned(
    model: GenerativeModel,
    guide: torch.nn.Module,
    dataset: Dataset,
    columns: Columns,
    sites: set[str],
    *,
    split: str,
    seed: int,
) -> dict[str, Compared]:
    """Statistics that are learned from training rows, of each observable that has some."""
    if "train" not in dataset.splits or _same_rows(dataset, "train", split):
        return {}
    _, train = held_out(model, dataset, split="train", rows=_LEARNED_FROM, seed=seed)
    story = unobserved_sites(model, columns)
    names = [n for n in sites if story[n].event_shape.numel() > 1 and not is_one_hot(story[n])]
    count, first = len(next(iter(train.values()))), next(n for n in model.observables if n in sites)
    learned: dict[str, Compared] = {}
    if count < 2 * _FEWEST or not names:
        return {}
    simulated = next(from_the_start(model, guide, train, 1))
    for name in sorted(names, key=model.observables.index):
        near = train[name][torch.randperm(count)]  # rows come in ascending order
        learned[shown(name, first, "distance to training rows")] = Compared(name, distance_to(near))
        learned[shown(name, first, "log-odds of being real")] = Compared(
            name, told_apart(_flat(train[name]), _flat(simulated[name]), seed)
        )
    return learned


_FEWEST = 50  # rows of a kind from which a classifier can learn


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).double()


def _same_rows(dataset: Dataset, one: str, other: str) -> bool:
    """Whether two splits are the same tensors, so that none of them is held out."""
    return all(
        value.data_ptr() == dataset.splits[other][name].data_ptr()
        for name, value in dataset.splits[one].items()
        if name in dataset.splits[other]
    )
