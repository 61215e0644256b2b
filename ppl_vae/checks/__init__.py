"""Checks of a fitted model: each says what it found, and how often it is wrong.

A check is a function ``(model, guide, data, *, split, seed, level, ...) -> CheckResult`` in a
file of its own, listed in ``CHECKS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from xarray import DataTree

from ppl_vae.arviz import to_arviz, versions
from ppl_vae.checks.labels import (
    label_calibration,
    label_posterior,
    labels_are_inferred,
    unknown_classes,
)
from ppl_vae.checks.predictive import population_predictive
from ppl_vae.checks.result import CheckResult, Report
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.model import GenerativeModel

__all__ = [
    "CHECKS",
    "CheckResult",
    "Report",
    "check",
    "label_calibration",
    "label_posterior",
    "population_predictive",
    "unknown_classes",
]

CHECKS: Mapping[str, Callable[..., CheckResult]] = {
    "population_predictive": population_predictive,
    "label_calibration": label_calibration,
}
"""The checks there are, by name."""

_WHERE: Mapping[str, Callable[[GenerativeModel, Dataset], bool]] = {
    "label_calibration": labels_are_inferred
}
"""Where a check applies that does not apply everywhere."""


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
    **options: Mapping[str, Any],
) -> Report:
    """Runs the checks on a fitted pair.

    Leaves torch's random state as it was; one seed gives one report.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        split: the rows to check against; they should be held out.
        level: error rate of each check.
        only: names of the checks to run, in this order; all of them that apply if None: that of
            labels where the data withhold labels.
        out: a folder to save the report in (:meth:`Report.save`).
        options: a check's name = its further arguments, such as
            ``population_predictive={"replicates": 1000}``; ``to_arviz={"rows": 50}`` for the
            draws in ``Report.idata``.

    Raises:
        ValueError: an unknown check, and whatever the checks refuse.
        PairError: guide or data do not fit the model.
    """
    dataset = as_dataset(data)
    applying = (n for n in CHECKS if n not in _WHERE or _WHERE[n](model, dataset))
    names = list(applying if only is None else only)
    if unknown := [n for n in [*names, *options] if n not in CHECKS and n != "to_arviz"]:
        raise ValueError(f"there is no check {unknown[0]!r}, only {', '.join(CHECKS)}")
    common = {"split": split, "seed": seed}
    results = tuple(
        CHECKS[name](model, guide, dataset, level=level, **common, **options.get(name, {}))
        for name in names
    )
    draws = to_arviz(model, guide, dataset, **common, **options.get("to_arviz", {}))
    groups = draws.to_dict()
    for result in results:
        groups |= {f"/{name}": group for name, group in result.groups.items()}
    report = Report(
        results=results,
        idata=DataTree.from_dict(groups),
        settings={
            "model": type(model).__name__,
            "guide": type(guide).__name__,
            "data": dataset.name,
            **common,
            "versions": versions(),
        },
    )
    if out is not None:
        report.save(out)
    return report
