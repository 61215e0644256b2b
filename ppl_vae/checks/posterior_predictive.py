"""Posterior predictive check: does the likelihood fit, given the latents of each row?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.checks.population_predictive import ADVICE
from ppl_vae.checks.replication import Columns, check_settings, compare, compared
from ppl_vae.checks.result import CheckResult, NotApplicable, Progress, silent
from ppl_vae.checks.statistics import OF_ROWS, Statistic
from ppl_vae.draws import (
    after_latents,
    held_out,
    model_nodes,
    one_draw,
    rows_at_once,
    shared_values,
    unobserved_sites,
)
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
    them sampled posterior p-values. Global latents, which were learned from other rows, are drawn
    from the guide for each replicate: their uncertainty is part of what the rows may differ by.
    Observables that the story draws before latents of the rows, such as labels, are given, and not
    compared.

    It sees less of what the prior gets wrong than
    :func:`~ppl_vae.checks.population_predictive.population_predictive`, and more of the
    likelihood: noise that is too wide, too narrow, or of another kind. A guide that is off may
    fail it too. Records, arguments and errors are those of ``population_predictive``, but that
    nothing is learned from training rows.

    Raises:
        NotApplicable: nothing is compared but observables that are given; there is one row.
    """
    check_settings(level, rows, replicates)
    with evaluating(seed, model, guide):
        _, columns = held_out(model, data, split=split, rows=rows, seed=seed)
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        names = after_latents(model, columns)
        asked = compared(model, columns, statistics, site)
        chosen = {name: one for name, one in asked.items() if one.site in names}
        if not chosen:
            given = next(iter(asked.values())).site
            raise NotApplicable(f"{given!r} comes before latents of the rows, and is given here")
        return compare(
            "posterior_predictive",
            model,
            columns,
            chosen,
            _given_latents(model, guide, columns, names, replicates),
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
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Columns,
    names: Sequence[str],
    replicates: int,
) -> Iterator[dict[str, Tensor]]:
    """Data sets ``(rows, event)`` of the sites ``names``, one at a time, all from one draw of the
    rows' latents and what else comes before."""
    sites = unobserved_sites(model, columns)
    rows, given = len(next(iter(columns.values()))), model.covariates_in(columns)
    some = list(parts(rows, rows_at_once(sum(sites[n].event_shape.numel() for n in names))))
    held: list[dict[str, Tensor]] = []
    for part in some:
        own = {name: value[part] for name, value in columns.items()}
        drawn = one_draw(model, guide, own) | {n: v for n, v in own.items() if n in sites}
        # Global latents are those of the first rows, until each replicate has its own.
        first = (held or [drawn])[0]
        alike = {name: first[name] for name in drawn if not sites[name].local}
        held.append({name: v for name, v in (drawn | alike).items() if name not in names})

    def emit(shared: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
        for part, own in zip(some, held, strict=True):
            known = {name: value[part] for name, value in given.items()}
            size = part.stop - part.start
            yield model_nodes(model, {**own, **shared}, rows=size, columns=known)

    varies = any(not sites[name].local for name in held[0])
    if len(names) == 1 and not varies:  # then its law is the same for all: nets run once
        laws = [nodes[names[0]]["fn"] for nodes in emit({})]
        for _ in range(replicates):
            yield {names[0]: torch.cat([law.sample() for law in laws])}
        return
    for _ in range(replicates):
        drawn = list(emit(shared_values(model, guide, columns) if varies else {}))
        yield {name: torch.cat([nodes[name]["value"] for nodes in drawn]) for name in names}
