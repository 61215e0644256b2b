"""Importance weights of each draw and row, and what they say of log p(x) and of themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.assignments import Assignments
from ppl_vae.importance import Compile, budget, each_figure, log_weight
from ppl_vae.model import GenerativeModel

RELIABLE = 0.7
"""Pareto-k above which importance sampling is not to be believed (Vehtari et al. 2024)."""

ALIKE = 1e-4
"""Nats: log weights that differ by less are alike, and what differs is rounding."""


def log_weights(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    *,
    samples: int,
    memory: int = 512,
    compile: Compile = "auto",
    given: Mapping[str, Tensor] | None = None,
    withheld: Collection[str] = (),
) -> Tensor:
    """log p(x, z) - log q(z | x) of each draw from the guide: float64 ``(samples, rows)``, on the
    CPU, in nats.

    Enumerated sites are summed out. A global site's density belongs to no row and is in no weight:
    the weights are those of p(x, z | w), w being drawn anew for each of the draws.

    Call it within :func:`ppl_vae.sites.evaluating`: it draws from torch's global random state.

    Args:
        columns: what the model observes, and its covariates, ``(rows, event)`` each, as
            :func:`ppl_vae.draws.held_out` gives them.
        samples: K, draws a row.
        memory: MiB that the intermediate tensors may take.
        compile: see :func:`ppl_vae.evaluate`.
        given: values of global sites that are not drawn, ``(event)`` each.
        withheld: observables that are inferred, of which ``columns`` has none: every value is
            tried, as of enumerated sites, also where the guide would draw them.

    Raises:
        ValueError: more values of enumerated sites than can be tried.
    """
    rows = len(next(iter(columns.values())))
    probe = {name: column[:4] for name, column in columns.items()}
    found = torch.empty(samples, rows, dtype=torch.float64)
    for figures, draws, part in each_figure(
        model,
        guide,
        lambda part: {name: column[part] for name, column in columns.items()},
        rows,
        samples=samples,
        budget=budget(model, guide, probe, samples=samples, memory=memory, withheld=withheld),
        compile=compile,
        assignments=Assignments(model, guide, probe, withheld),
        given=given,
    ):
        if (weight := log_weight(figures)) is not None:
            found[draws, part] = weight.cpu()
    return found


def bound(log_weights: Tensor, draws: int) -> Tensor:
    """The IWAE bound of ``draws`` draws, a row: ``(rows,)``, from log weights ``(samples, rows)``.

    The mean over ``samples // draws`` groups of the log-mean-exp in each: of 1 draw the ELBO, of
    all of them the importance-sampled log p(x) (Burda et al. 2016, arXiv:1509.00519, eq. 8).

    Raises:
        ValueError: fewer samples than draws.
    """
    groups = len(log_weights) // draws
    if draws < 1 or not groups:
        raise ValueError(f"draws={draws}: expected 1 to {len(log_weights)}, the samples there are")
    grouped = log_weights[: groups * draws].unflatten(0, (groups, draws))
    return (grouped.logsumexp(1) - math.log(draws)).mean(0)


def effective_samples(log_weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2`` a row: as many draws from the posterior would be worth as much.

    ``(rows,)``, from log weights ``(samples, rows)`` (Kong 1992; Owen 2013, chapter 9.3).
    """
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


class Smoothed(NamedTuple):
    """Pareto-smoothed importance sampling, a row.

    Attributes:
        log_evidence: float64 ``(rows,)``, in nats.
        pareto_k: the shape of the weights' tail, float64 ``(rows,)``: above 0.7 neither this
            estimate nor the plain one is to be believed. -inf where all weights are alike; nan
            where there is no telling: of fewer than 25 draws, or where many weights are equal.
    """

    log_evidence: Tensor
    pareto_k: Tensor


def pareto_smoothed(log_weights: Tensor) -> Smoothed:
    """Replaces the largest weights of each row by quantiles of the Pareto law fitted to them.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv:1507.02646), sections 2 and 3. Where
    nothing can be fitted, the weights stay as they are.

    Args:
        log_weights: ``(samples, rows)``.
    """
    # Takes a second to import.
    from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]

    evidence = bound(log_weights, len(log_weights))
    k = torch.full_like(evidence, math.nan)
    for row, own in enumerate(log_weights.T.cpu().double().numpy()):
        if np.ptp(own) < ALIKE:
            k[row] = -math.inf
            continue
        try:
            # Where many weights are equal, no law fits: nan, which is nothing to warn of.
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                # Takes ratios the other way up, as those of leave-one-out are: the negated logs.
                smoothed, shape = array_stats.psislw(-own)
        except (ValueError, IndexError):  # fewer than five draws in the tail, or all alike
            continue
        if np.isfinite(shape):
            k[row] = float(shape)
            # They come normalized; the median, which no smoothing touches, says by how much.
            middle = own.argsort()[len(own) // 2]
            evidence[row] = float(own[middle] - np.asarray(smoothed)[middle]) - math.log(len(own))
    return Smoothed(evidence, k)
