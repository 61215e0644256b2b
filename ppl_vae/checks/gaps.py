"""Where is the bound lost: by the encoder, by the family, or not at all?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xarray import Dataset

from ppl_vae.assignments import Assignments
from ppl_vae.checks import gap_figures as figures
from ppl_vae.checks import gap_report as report
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.data import as_dataset
from ppl_vae.density import Density, NotAnnealable
from ppl_vae.draws import held_out, shared_values
from ppl_vae.evaluation import check_measurable, inferred
from ppl_vae.importance import Compile, parts
from ppl_vae.model import GenerativeModel
from ppl_vae.refining import Climber, RowWise, Scores, climb, scored
from ppl_vae.row_wise import Freed, FullRankRows
from ppl_vae.sites import check_data, check_pair, evaluating, read_sites
from ppl_vae.weights import pareto_smoothed

MOST_COORDINATES = 200
"""Latent coordinates of a row above which no covariances are fitted: they are as many squared."""


def gaps(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 100,
    steps: int = 400,
    draws: int = 4,
    learning_rate: float = 0.02,
    samples: int = 500,
    compile: Compile = "auto",
) -> CheckResult:
    """Looks for where the ELBO falls short of log p(x): at the encoder, or at the family of q.

    For each row, q is refined with the model fixed, and nothing shared with other rows, from the
    guide's q on: within the guide's family (:class:`ppl_vae.row_wise.Freed`), which gives q*, and
    then as a normal with all covariances over all continuous latents together
    (:class:`ppl_vae.row_wise.FullRankRows`), which starts from the moments of q*. In nats a row
    (Cremer, Li & Duvenaud 2018, arXiv:1801.03558, eq. 4 to 6):

        inference gap      log p(x) - ELBO(q)   =  amortization gap + approximation gap
        amortization gap   ELBO(q*) - ELBO(q)      the encoder's
        approximation gap  log p(x) - ELBO(q*)     the family's

    A row keeps the q before where the refined one is worse, by draws (a quarter of ``samples``)
    that serve for nothing else. All figures are of ``samples`` further draws from what was kept:
    neither the climb nor the choice makes them look better than they are. log p(x) is the
    Pareto-smoothed importance sampling estimate from the best q of each row, whose expectation is
    a little below log p(x); a Pareto-k above 0.7 says that it is not to be believed. Refining may
    stop short of the best q*: then the amortization gap is larger than it is said to be, and the
    approximation gap smaller by as much. What the later half of the steps brought says how far; so
    does what covariances get back where the guide has them itself.

    Nothing is tested: the verdict is "measured". Discrete latents are summed out, by the guide's
    probabilities in the ELBO. Global latents are held at one draw from the guide, and figures are
    given them. Leaves torch's random state as it was.

    Each record has the split, the figure, rows, value, standard error over rows (nan for one
    row) and unit.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes. Labels that are withheld
            from training rows are summed out.
        split: held-out rows, next to those of "train", if there are such.
        seed: of rows and draws.
        level: not used; here since all checks have it.
        rows: of each split, chosen at random; all of them where a split has fewer.
        steps, draws, learning_rate: of each of both climbs (:class:`ppl_vae.refining.Climber`).
        samples: draws of each row and q that figures are computed from.
        compile: see :func:`ppl_vae.evaluate`.

    Raises:
        NotApplicable: no latent of the rows; a site in a plate besides that of the rows; discrete
            latents with more values than can be tried; a guide without nets.
        ValueError: numbers too small.
        PairError: guide or data do not fit the model.
    """
    if rows < 2 or samples < 8:
        raise ValueError(f"rows={rows}, samples={samples}: expected at least 2 rows, 8 samples")
    dataset = as_dataset(data)
    splits = [name for name in dict.fromkeys(("train", split)) if name in dataset.splits]
    withheld = inferred(model, dataset, None)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    how = {"steps": steps, "draws": draws, "learning_rate": learning_rate, "compile": compile}
    with evaluating(seed, model, guide):
        for name in splits:
            chosen, columns = held_out(model, dataset, split=name, rows=rows, seed=seed)
            kept = {k: column for k, column in columns.items() if k not in withheld}
            check_data(model, [kept])
            found.append((chosen, kept))
        # Rows do not meet, so that all splits are refined together.
        columns = {
            key: torch.cat([own[key] for _, own in found])
            for key in found[0][1]
            if all(key in own for _, own in found)
        }
        check_pair(model, guide, **columns)
        refined = _refine(model, guide, columns, withheld, how, samples, progress)
    of = np.repeat(splits, [len(chosen) for chosen, _ in found])
    group = Dataset(
        {name: ("row", values.numpy()) for name, values in refined.figures.items()},
        coords={
            "split": ("row", of),
            "number": ("row", torch.cat([chosen for chosen, _ in found]).numpy()),
        },
    )
    table = report.records(group, splits)
    return CheckResult(
        name="gaps",
        verdict="measured",
        error_rate=0.0,
        p=None,
        statistics=tuple(table),
        meaning=report.meaning(table, splits, refined.note),
        settings={
            "split": split,
            "seed": seed,
            "rows": len(of),
            "samples": samples,
            **how,
        },
        groups={"gaps": group},
        pictures={
            "gaps": Picture(figures.bars, _BARS),
            "gaps_of_rows": Picture(figures.histograms, _HISTOGRAMS),
        },
    )


_BARS = (
    "What the ELBO lacks to log p(x), in parts: a large lowest part asks for a better encoder, the "
    "middle one for covariances in q, the top one for a family that is richer otherwise."
)
_HISTOGRAMS = (
    "The gaps of each row: a long tail is of rows that the encoder, or the family, does not serve."
)


@dataclass(frozen=True, eq=False)
class _Refined:
    """Figures by name, float64 ``(rows,)``; and what could not be done, in a sentence."""

    figures: Mapping[str, Tensor]
    note: str


def _refine(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    withheld: tuple[str, ...],
    how: Mapping[str, Any],
    samples: int,
    progress: Progress,
) -> _Refined:
    summed = _summed(model, guide, columns, withheld)
    given = shared_values(model, guide, columns)
    few = {name: column[:2] for name, column in columns.items()}
    assignments = Assignments(model, guide, few, summed)
    own = Freed(model, guide, columns, given=given, assignments=assignments)
    if not own.free:
        raise NotApplicable(
            f"{type(guide).__name__} has no net that returns a tensor with a dim of rows: there is "
            "nothing to refine for a row"
        )
    figure: dict[str, Tensor] = {}
    keep = _Kept(samples, columns)
    figure["elbo"] = keep.next(own)
    steps = climb(own, columns, Climber(**how, show=lambda done: progress(0.05 + 0.4 * done)))
    figure["elbo_refined"] = keep.next(own)
    figure["late_gain"] = _late(steps)
    note = ""
    try:
        density = Density(model, guide, columns, start="prior", given=given, withheld=summed)
        start = _start(density, own, columns)
        rank = FullRankRows(density, start)
        steps = climb(rank, columns, Climber(**how, show=lambda done: progress(0.5 + 0.4 * done)))
        figure["elbo_full_rank"] = keep.next(rank)
        figure["late_gain_full_rank"] = _late(steps)
    except (NotAnnealable, _TooMany) as reason:
        note = f"No normal with all covariances was fitted: {reason}."
    smoothed = pareto_smoothed(keep.log_weight)
    figure |= {"log_evidence": smoothed.log_evidence, "pareto_k": smoothed.pareto_k}
    best = figure.get("elbo_full_rank", figure["elbo_refined"])
    figure |= {
        "inference": smoothed.log_evidence - figure["elbo"],
        "amortization": figure["elbo_refined"] - figure["elbo"],
        "approximation": smoothed.log_evidence - figure["elbo_refined"],
        "by_full_rank": best - figure["elbo_refined"],
        "rest": smoothed.log_evidence - best,
    }
    return _Refined(figure, note)


class _TooMany(ValueError):
    """More coordinates than covariances are fitted for."""


def _summed(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    withheld: tuple[str, ...],
) -> tuple[str, ...]:
    """The discrete latents, whose values are all tried, whatever estimator trained them."""
    few = {name: column[:2] for name, column in columns.items()}
    sites = read_sites(model, **few)
    latent = [s for s in sites.values() if not s.observed and s.local]
    if not latent:
        raise NotApplicable(f"{type(model).__name__} has no latent of its rows to infer")
    discrete = [s.name for s in latent if s.support.is_discrete and not s.enumerated]
    summed = tuple(dict.fromkeys((*withheld, *discrete)))
    try:
        check_measurable(sites.values())
        tried = Assignments(model, guide, few, summed)
    except (ValueError, NotImplementedError) as error:
        raise NotApplicable(str(error)) from None
    if missed := [n for n in discrete if n not in {*tried.drawn, *tried.marginal}]:
        raise NotApplicable(f"site {missed[0]!r} is discrete, and its values cannot be listed")
    return summed


class _Kept:
    """The best q of each row so far, by draws that serve for nothing else.

    Attributes:
        log_weight: of fresh draws from it, ``(samples, rows)``.
    """

    log_weight: Tensor

    def __init__(self, samples: int, columns: Mapping[str, Tensor]) -> None:
        self._samples, self._columns = samples, columns
        self._chosen: Tensor | None = None  # ELBO by the draws for choosing
        self._scores: Scores | None = None

    def next(self, q: RowWise) -> Tensor:
        """The ELBO of each row with the better of q and the one kept before, ``(rows,)``."""
        chosen = scored(q, self._columns, max(2, self._samples // 4)).elbo.mean(0)
        scores = scored(q, self._columns, self._samples)
        if self._chosen is not None and self._scores is not None:
            better = chosen > self._chosen  # never where it is nan
            chosen = torch.where(better, chosen, self._chosen)
            scores = Scores(
                *(torch.where(better, a, b) for a, b in zip(scores, self._scores, strict=True))
            )
        self._chosen, self._scores = chosen, scores
        self.log_weight = scores.log_weight
        return scores.elbo.mean(0)


def _start(density: Density, own: Freed, columns: Mapping[str, Tensor]) -> Tensor:
    """Coordinates of draws from the refined q, ``(draws, rows, U)``."""
    few = {name: column[:2] for name, column in columns.items()}
    width = density.draw(few, 1).shape[-1]
    if width > MOST_COORDINATES:
        raise _TooMany(f"rows have {width} latent coordinates, more than {MOST_COORDINATES}")
    draws, at_once = max(100, 5 * width), 20
    found = [
        density.coordinates(columns, own.draw(columns, part.stop - part.start))
        for part in parts(draws, at_once)
    ]
    return torch.cat(found)


def _late(steps: Tensor) -> Tensor:
    """What the second half of the steps brought each row: a tenth at the end less one amidst."""
    tenth = max(1, len(steps) // 10)
    middle = len(steps) // 2
    return (steps[-tenth:].mean(0) - steps[middle : middle + tenth].mean(0)).double()
