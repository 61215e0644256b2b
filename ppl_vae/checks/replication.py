"""Data sets that a model emits, held against the data by statistics; what such checks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from xarray import Dataset

from ppl_vae.checks import predictive_figures as figures
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress
from ppl_vae.checks.statistics import (
    OF_ROWS,
    STATISTICS,
    Statistic,
    check_level,
    check_replicates,
    compute,
    frequencies,
    max_adjusted,
    p_value,
)
from ppl_vae.draws import model_nodes, one_draw, rows_at_once, unobserved_sites
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import Site

Columns = Mapping[str, Tensor]
"""Observables and covariates of some rows, ``(rows, event)`` each, by name."""


class Compared(NamedTuple):
    """A statistic of one observable."""

    site: str
    statistic: Statistic


def compared(
    model: GenerativeModel,
    columns: Columns,
    statistics: Mapping[str, Statistic] | None,
    site: str | None,
) -> dict[str, Compared]:
    """What is compared, by the name under which records and figures show it.

    Args:
        statistics: those to compute; None: those that are ready for each observable.
        site: the one observable; None: all that the data have, or, with ``statistics``, the first.

    Raises:
        NotApplicable: there is one row.
        ValueError: no such observable, no such column, or no statistic.
    """
    if len(next(iter(columns.values()))) < 2:
        raise NotApplicable("one row; statistics of a data set need at least 2")
    names = [name for name in model.observables if name in columns]
    if site is not None and site not in names:
        raise ValueError(
            f"{type(model).__name__} has no observable {site!r} in these data, only "
            f"{', '.join(names)}: choose with site="
        )
    if statistics is not None:
        if not statistics:
            raise ValueError("statistics is empty: expected at least one")
        for name in statistics:
            if not name or "/" in name:
                raise ValueError(f"statistic {name!r}: expected a name without '/'")
        return {name: Compared(site or names[0], own) for name, own in statistics.items()}
    sites = unobserved_sites(model, columns)
    return {
        shown(name, names[0], statistic): Compared(name, own)
        for name in ([site] if site else names)
        for statistic, own in _ready(sites[name]).items()
    }


def shown(site: str, first: str, statistic: str) -> str:
    """How a statistic is called: that of the first observable by its own name alone."""
    return statistic if site == first else f"{site}: {statistic}"


def is_one_hot(site: Site) -> bool:
    return len(site.event_shape) == 1 and "OneHot" in type(site.support).__name__


def _ready(site: Site) -> Mapping[str, Statistic]:
    if is_one_hot(site):
        return frequencies(site.event_shape[0])
    return {**STATISTICS, **(OF_ROWS if site.event_shape.numel() > 1 else {})}


def check_settings(level: float, rows: int, replicates: int) -> None:
    """Refuse what could not find any fault.

    Raises:
        ValueError: it says what was expected.
    """
    check_level(level)
    if rows < 2:
        raise ValueError(f"rows={rows}: expected at least 2")
    check_replicates("replicates", replicates, level)


def from_the_start(
    model: GenerativeModel,
    guide: torch.nn.Module | None,
    columns: Columns,
    replicates: int,
) -> Iterator[dict[str, Tensor]]:
    """Data sets ``(rows, event)`` a site of the story from its start, one at a time.

    Local latents come from their priors, global ones from the guide, or, without one, from their
    priors too; covariates are those of ``columns``.
    """
    rows = len(next(iter(columns.values())))
    sites, given = unobserved_sites(model, columns), model.covariates_in(columns)
    observables = [name for name in model.observables if name in sites]
    at_once = rows_at_once(sum(sites[name].event_shape.numel() for name in observables))
    shared = [s.name for s in sites.values() if not (s.local or s.observed)]
    # Rows are independent given the global sites: several small replicates in one run.
    together = 1 if shared else max(1, at_once // rows)
    for start in range(0, replicates, together):
        fixed: dict[str, Tensor] = {}
        if shared and guide is not None:
            latents = one_draw(model, guide, columns)
            fixed = {name: latents[name] for name in shared}
        elif shared:
            drawn = model_nodes(model, {}, rows=1, columns={n: v[:1] for n, v in given.items()})
            fixed = {name: drawn[name]["value"] for name in shared}
        total = min(together, replicates - start) * rows
        parts: list[dict[str, Tensor]] = []
        for done in range(0, total, at_once):
            size = min(at_once, total - done)
            again = torch.arange(done, done + size) % rows
            repeated = {name: value[again.to(value.device)] for name, value in given.items()}
            nodes = model_nodes(model, fixed, rows=size, columns=repeated)
            parts.append({name: nodes[name]["value"] for name in observables})
        whole = {name: torch.cat([part[name] for part in parts]) for name in observables}
        for one in range(total // rows):
            yield {name: value[one * rows : (one + 1) * rows] for name, value in whole.items()}


def compare(
    name: str,
    model: GenerativeModel,
    columns: Columns,
    statistics: Mapping[str, Compared],
    replicates: Iterable[Mapping[str, Tensor]],
    *,
    count: int,
    level: float,
    settings: Mapping[str, Any],
    against: str,
    advice: Mapping[str, str],
    caption: str,
    progress: Progress,
) -> CheckResult:
    """The result of a predictive check: the data against ``count`` replicates.

    Args:
        against: what the replicates are, for people: "data sets that the model emits".
        advice: what to try, by the statistic that differs ("frequency" stands for all classes').

    Raises:
        ValueError: a replicate that is not finite, a statistic that is not one number, or none
            that is applicable.
    """
    observed = np.array(_values(statistics, columns, "the data"))
    replicated = np.empty((count, len(statistics)))
    kept: list[Mapping[str, Tensor]] = []  # for pictures of single entries
    for i, drawn in enumerate(replicates):
        _check_finite(type(model).__name__, drawn, i)
        replicated[i] = _values(statistics, drawn, f"replicate {i}")
        if i < figures.DRAWS:
            kept.append({site: figures.some_rows(value) for site, value in drawn.items()})
        progress((i + 1) / count)
    records = _records(list(statistics), observed, replicated, level)
    if all(record["verdict"] == "not applicable" for record in records):
        raise ValueError("no statistic is applicable: " + records[0]["note"])
    failed = [record for record in records if record["verdict"] == "fail"]
    rows = len(next(iter(columns.values())))
    pictures = {name: Picture(figures.statistics, caption)}
    sites = unobserved_sites(model, columns)
    for site in dict.fromkeys(one.site for one in statistics.values()):
        draws = torch.stack([one[site] for one in kept])
        entries = figures.entries(sites[site], columns[site], draws, settings["seed"])
        pictures |= {f"{site}-{kind}": picture for kind, picture in entries.items()}
    return CheckResult(
        name=name,
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=min(r["p_adjusted"] for r in records if r["verdict"] != "not applicable"),
        statistics=tuple(records),
        meaning=_meaning(failed, records, f"{rows} rows ({settings['split']})", against, advice),
        settings={
            **settings,
            "rows": rows,
            "replicates": count,
            "correction": "largest deviation",
            "against": against,
        },
        groups=_groups(name, list(statistics), observed, replicated),
        pictures=pictures,
    )


def _values(statistics: Mapping[str, Compared], columns: Columns, where: str) -> list[float]:
    return [
        compute({name: one.statistic}, columns[one.site], where)[0]
        for name, one in statistics.items()
    ]


def _check_finite(model: str, drawn: Columns, number: int) -> None:
    for site, values in drawn.items():
        if not values.isfinite().all():
            raise ValueError(
                f"replicate {number}: {model} emits {float(values[~values.isfinite()][0])} at site "
                f"{site!r}: its parameters or its likelihood have diverged"
            )


def _records(
    names: Sequence[str], observed: np.ndarray, replicated: np.ndarray, level: float
) -> list[dict[str, Any]]:
    notes = [_note(observed[k], replicated[:, k]) for k in range(len(names))]
    applicable = np.array([not note for note in notes])
    adjusted = np.ones(len(names))
    if applicable.any():
        adjusted[applicable] = max_adjusted(observed[applicable], replicated[:, applicable])
    records: list[dict[str, Any]] = []
    for k, (name, note) in enumerate(zip(names, notes, strict=True)):
        p, error = (math.nan, math.nan) if note else p_value(observed[k], replicated[:, k])
        verdict = "not applicable" if note else "fail" if adjusted[k] <= level else "pass"
        records.append(
            {
                "statistic": name,
                "observed": float(observed[k]),
                "replicated_mean": float(replicated[:, k].mean()),
                "replicated_sd": float(replicated[:, k].std(ddof=1)),
                "p": p,
                "p_standard_error": error,
                "p_adjusted": math.nan if note else float(adjusted[k]),
                "verdict": verdict,
                "note": note,
            }
        )
    return records


def _note(observed: float, replicated: np.ndarray) -> str:
    """Why a statistic is not applicable; empty if it is."""
    if (replicated == observed).all():
        return f"{observed:g} in the data and in every replicate"
    if not math.isfinite(observed):
        return f"{observed:g} in the data"
    strange = replicated[~np.isfinite(replicated)]
    return (
        f"{strange[0]:g} in {len(strange)} of {len(replicated)} replicates" if len(strange) else ""
    )


def _meaning(
    failed: list[dict[str, Any]],
    records: list[dict[str, Any]],
    data: str,
    against: str,
    advice: Mapping[str, str],
) -> str:
    missing = [r["statistic"] for r in records if r["note"].startswith(("nan", "inf", "-inf"))]
    aside = f" Not computable: {', '.join(missing)}." if missing else ""
    start = against[0].upper() + against[1:]
    if not failed:
        return (
            f"{start} look like {data} in every statistic compared; other differences may "
            f"remain.{aside}"
        )
    failed = sorted(failed, key=lambda r: r["p_adjusted"])
    found = ", ".join(
        f"{r['statistic']} too {'low' if r['replicated_mean'] < r['observed'] else 'high'} "
        f"({r['replicated_mean']:.4g} against {r['observed']:.4g})"
        for r in failed
    )
    try_ = " ".join(dict.fromkeys(_advised(r["statistic"], advice) for r in failed)).strip()
    return f"{start} differ from {data}: {found}. {try_}{aside}"


def _advised(statistic: str, advice: Mapping[str, str]) -> str:
    name = statistic.rpartition(": ")[2]  # without the observable
    return advice.get("frequency" if name.startswith("frequency") else name, "")


def _groups(
    name: str, names: Sequence[str], observed: np.ndarray, replicated: np.ndarray
) -> dict[str, Dataset]:
    return {
        f"{name}_statistics": Dataset(
            {own: (("chain", "draw"), replicated[None, :, k]) for k, own in enumerate(names)},
            coords={"chain": [0], "draw": np.arange(len(replicated))},
        ),
        f"{name}_observed": Dataset({own: observed[k] for k, own in enumerate(names)}),
    }
