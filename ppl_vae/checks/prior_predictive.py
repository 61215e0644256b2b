"""Prior predictive check: would the story emit such data before it has seen any?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppl_vae.checks.population_predictive import ADVICE, CAPTION
from ppl_vae.checks.replication import check_settings, compare, compared, from_the_start
from ppl_vae.checks.result import CheckResult, NotApplicable, Progress, silent
from ppl_vae.checks.statistics import Statistic
from ppl_vae.draws import held_out, unobserved_sites
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, evaluating


def prior_predictive(
    model: GenerativeModel,
    guide: torch.nn.Module | None,
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
    """Compares data with data sets that the story emits when all latents come from their priors.

    Global latents too, which is the difference from
    :func:`~ppl_vae.checks.population_predictive.population_predictive`: nothing of it has been
    learned from data but the parameters. Box 1980, "Sampling and Bayes' inference in scientific
    modelling and robustness" (J. R. Stat. Soc. A 143, 383-430). Without a guide it says what a
    story emits before it is fitted, at the parameters as they are.

    Records, arguments and errors are those of ``population_predictive``, but that nothing is
    learned from training rows.

    Args:
        guide: not used; None where there is none.

    Raises:
        NotApplicable: there is a guide, and no global latent: the check would be
            ``population_predictive`` once more. There is one row.
    """
    check_settings(level, rows, replicates)
    programs = (model,) if guide is None else (model, guide)
    with evaluating(seed, *programs):
        _, columns = held_out(model, data, split=split, rows=rows, seed=seed)
        check_data(model, [columns])
        story = unobserved_sites(model, columns).values()
        if guide is not None and all(site.local or site.observed for site in story):
            raise NotApplicable(
                "the model has no global latent: population_predictive is the same check"
            )
        return compare(
            "prior_predictive",
            model,
            columns,
            compared(model, columns, statistics, site),
            from_the_start(model, None, columns, replicates),
            count=replicates,
            level=level,
            settings={"split": split, "seed": seed},
            against="data sets that the priors emit",
            advice=ADVICE,
            caption=CAPTION,
            progress=progress,
        )
