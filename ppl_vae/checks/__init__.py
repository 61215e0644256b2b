"""Checks of a fitted model: each says what it found, and how often it is wrong.

A check is a function ``(model, guide, data, *, split, seed, level, progress, ...) -> CheckResult``
in a file of its own, listed in ``CHECKS``; the first line of its docstring says what it looks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from xarray import DataTree

from ppl_vae.arviz import to_arviz, versions
from ppl_vae.checks.aggregate_posterior import aggregate_posterior
from ppl_vae.checks.evidence import evidence
from ppl_vae.checks.gaps import gaps
from ppl_vae.checks.generalization import generalization
from ppl_vae.checks.labels import label_calibration, label_posterior, unknown_classes
from ppl_vae.checks.latent_use import latent_use
from ppl_vae.checks.local_calibration import local_calibration
from ppl_vae.checks.population_predictive import population_predictive
from ppl_vae.checks.posterior_predictive import posterior_predictive
from ppl_vae.checks.prior_predictive import prior_predictive
from ppl_vae.checks.report import Report
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture
from ppl_vae.checks.row_order import row_order
from ppl_vae.checks.simulation_based_calibration import simulation_based_calibration
from ppl_vae.checks.statistics import check_level
from ppl_vae.checks.structure import structure
from ppl_vae.checks.support import support
from ppl_vae.data import as_dataset
from ppl_vae.model import GenerativeModel
from ppl_vae.progress import checking_progress
from ppl_vae.zoo import first_line

__all__ = [
    "CHECKS",
    "CheckResult",
    "NotApplicable",
    "Picture",
    "Report",
    "aggregate_posterior",
    "check",
    "evidence",
    "gaps",
    "generalization",
    "label_calibration",
    "label_posterior",
    "latent_use",
    "local_calibration",
    "population_predictive",
    "posterior_predictive",
    "prior_predictive",
    "row_order",
    "simulation_based_calibration",
    "structure",
    "support",
    "unknown_classes",
]

CHECKS: Mapping[str, Callable[..., CheckResult]] = {
    "support": support,
    "structure": structure,
    "row_order": row_order,
    "prior_predictive": prior_predictive,
    "population_predictive": population_predictive,
    "posterior_predictive": posterior_predictive,
    "generalization": generalization,
    "simulation_based_calibration": simulation_based_calibration,
    "local_calibration": local_calibration,
    "latent_use": latent_use,
    "aggregate_posterior": aggregate_posterior,
    "evidence": evidence,
    "gaps": gaps,
    "label_calibration": label_calibration,
}
"""The checks there are, by name, in the order in which they run."""

EXACT = frozenset({"support", "structure", "gaps"})
"""Those that chance cannot make fail, so that they need no share of the error rate."""


def check(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    only: Iterable[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Mapping[str, Any],
) -> Report:
    """Runs the checks on a fitted pair.

    The report as a whole fails a pair without a fault with probability ``level`` at most: each of
    its m checks that chance enters has the error rate ``level / m``. Where the model cannot have
    emitted the data (:func:`support`), nothing else is checked. Leaves torch's random state as it
    was; one seed gives one report.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        split: the rows to check against; they should be held out.
        level: error rate of the report.
        only: names of the checks to run, in this order; all of them if None. Those that do not
            apply to this model, guide or data are left out, with the reason in
            ``Report.skipped``.
        out: a folder to save the report in (:meth:`Report.save`).
        progress: whether to show on standard error which check is at work.
        options: a check's name = its further arguments, such as
            ``population_predictive={"replicates": 1000}``; ``to_arviz={"rows": 50}`` for the
            draws in ``Report.idata``.

    Raises:
        ValueError: an unknown check, and whatever the checks refuse.
        PairError: the guide does not fit the model.
    """
    dataset = as_dataset(data)
    names = list(dict.fromkeys(CHECKS if only is None else only))
    if unknown := [n for n in [*names, *options] if n not in CHECKS and n != "to_arviz"]:
        raise ValueError(f"there is no check {unknown[0]!r}, only {', '.join(CHECKS)}")
    check_level(level)
    own = level / max(1, len(set(names) - EXACT))
    common = {"split": split, "seed": seed}
    results: list[CheckResult] = []
    skipped: dict[str, str] = {}
    foreign = False  # data that the model cannot have emitted
    with checking_progress(len(names), enabled=progress) as started:
        for name in names:
            if foreign:
                skipped[name] = "the model cannot have emitted the data: see support"
                continue
            show = started(name)
            try:
                result = CHECKS[name](
                    model,
                    guide,
                    dataset,
                    **({"level": own, "progress": show} | common | dict(options.get(name, {}))),
                )
            except NotApplicable as reason:
                skipped[name] = str(reason)
                continue
            results.append(result)
            foreign = name == "support" and not result.passed
    groups: dict[str, Any] = {}
    if not foreign:
        draws = to_arviz(model, guide, dataset, **common, **options.get("to_arviz", {}))
        groups |= draws.to_dict()
    for result in results:
        groups |= {f"/{name}": group for name, group in result.groups.items()}
    report = Report(
        results=tuple(results),
        skipped=skipped,
        questions={name: first_line(CHECKS[name]) for name in names},
        idata=DataTree.from_dict(groups),
        settings={
            "model": type(model).__name__,
            "guide": type(guide).__name__,
            "data": dataset.name,
            "level": level,
            **common,
            "versions": versions(),
        },
    )
    if out is not None:
        report.save(out)
    return report
