"""Posterior predictive check: does the likelihood fit, given the latents of each row?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae.checks.population_predictive import ADVICE
from ppl_vae.checks.replication import Columns, check_settings, compare, compared
from ppl_vae.checks.result import CheckResult, Progress, silent
from ppl_vae.checks.statistics import OF_ROWS, Statistic
from ppl_vae.draws import held_out, model_nodes, one_draw, rows_at_once, unobserved_sites
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, check_pair, evaluating


def posterior_predictive(
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
    """Compares held-out rows with replicates of the same rows, drawn given their latents.

    The latents of each row are drawn *once* from the guide, and every replicate is drawn from
    those. Where model and guide are right, rows and latents are then a draw from the story, so
    that the rows and their replicates are independent draws from one law: p is uniform. A
    posterior predictive p-value with latents drawn anew for each replicate is not (Meng 1994, Ann.
    Stat. 22, 1142: it stays near 1/2). Source: Johnson 2007, "Bayesian model assessment using
    pivotal quantities" (Bayesian Anal. 2, 719-734); Gosselin 2011 (PLoS ONE 6, e14770), which calls
    them sampled posterior p-values.

    It sees less of what the prior gets wrong than
    :func:`~ppl_vae.checks.population_predictive.population_predictive`, and more of the
    likelihood: noise that is too wide, too narrow, or of another kind. A guide that is off may
    fail it too. Records, arguments and errors are those of ``population_predictive``, but that
    nothing is learned from training rows.
    """
    check_settings(level, rows, replicates)
    with evaluating(seed, model, guide):
        _, columns = held_out(model, data, split=split, rows=rows, seed=seed)
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        return compare(
            "posterior_predictive",
            model,
            columns,
            compared(model, columns, statistics, site),
            _given_latents(model, guide, columns, replicates),
            count=replicates,
            level=level,
            settings={"split": split, "seed": seed},
            against="replicates of the same rows",
            advice=ADVICE
            | dict.fromkeys(
                ("mean", *OF_ROWS),
                "Where means, totals or dependence differ, rows' latents do not explain them: try "
                "more latents, a larger decoder, or a guide that keeps more of x.",
            ),
            caption=(
                "Each statistic over replicates drawn given one draw of the rows' latents, and its "
                "value in the data: a line in the tail says that the noise of the likelihood, or "
                "the latents, do not explain the rows."
            ),
            progress=progress,
        )


def _given_latents(
    model: GenerativeModel, guide: torch.nn.Module, columns: Columns, replicates: int
) -> Iterator[dict[str, Tensor]]:
    """Data sets ``(rows, event)`` a site, all from one draw of the latents, one at a time."""
    sites = unobserved_sites(model, columns)
    observables = [name for name in model.observables if name in columns]
    rows, given = len(next(iter(columns.values()))), model.covariates_in(columns)
    at_once = min(rows, rows_at_once(sum(sites[n].event_shape.numel() for n in observables)))
    latents: list[dict[str, Tensor]] = []
    for part in parts(rows, at_once):
        own = one_draw(model, guide, {name: value[part] for name, value in columns.items()})
        # Global latents are drawn once, with the first rows.
        latents.append(own | {n: v for n, v in (latents or [own])[0].items() if not sites[n].local})

    def emit(own: Mapping[str, Tensor], part: slice) -> dict[str, Any]:
        some = {name: value[part] for name, value in given.items()}
        return model_nodes(model, own, rows=part.stop - part.start, columns=some)

    if len(observables) == 1:  # then its law is the same for all replicates: nets run once
        (name,) = observables
        laws = [emit(*one)[name]["fn"] for one in zip(latents, parts(rows, at_once), strict=True)]
        for _ in range(replicates):
            yield {name: torch.cat([law.sample() for law in laws])}
        return
    for _ in range(replicates):
        drawn = [emit(*one) for one in zip(latents, parts(rows, at_once), strict=True)]
        yield {name: torch.cat([one[name]["value"] for one in drawn]) for name in observables}
