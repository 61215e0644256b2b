"""How well is log p(x) known? Importance sampling, judged by its weights and by annealing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae.annealing import Bracket, annealed_log_evidence, bidirectional
from ppl_vae.assignments import Assignments
from ppl_vae.checks import evidence_figures as figures
from ppl_vae.checks.evidence_report import (
    Compared,
    Sampled,
    groups,
    meaning,
    records,
)
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level, mean_below
from ppl_vae.data import as_dataset
from ppl_vae.density import NotAnnealable, Start
from ppl_vae.draws import held_out, model_nodes, shared_values, some_covariates
from ppl_vae.evaluation import check_measurable, inferred
from ppl_vae.importance import Compile
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, check_pair, evaluating, read_sites
from ppl_vae.weights import (
    effective_samples,
    log_weights,
    pareto_smoothed,
)

Columns = Mapping[str, Tensor]


def evidence(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 200,
    samples: int = 5000,
    annealed_rows: int = 20,
    simulated_rows: int = 20,
    temperatures: int = 400,
    chains: int = 8,
    leapfrog: int = 5,
    start: Start = "prior",
    tolerance: float = 0.5,
    memory: int = 512,
    compile: Compile = "auto",
) -> CheckResult:
    """Looks for a log p(x) that importance sampling and annealing do not agree on.

    From one set of importance weights: the ELBO, IWAE bounds (:func:`ppl_vae.weights.bound`), the
    importance-sampled and Pareto-smoothed log p(x), and what the weights say of themselves,
    Pareto-k and effective sample sizes. On some of the rows, annealed importance sampling
    (:func:`ppl_vae.annealing.annealed_log_evidence`), which by default knows nothing of the guide;
    on rows that the model emits, a bracket around log p(x), whose width says how near annealing
    comes (:func:`ppl_vae.annealing.bidirectional`).

    Both are lower bounds in expectation, so that the higher one is nearer. The check fails where
    importance sampling is too low, by more than ``tolerance``: the guide then misses much of the
    posterior. That is a paired test over rows, one-sided
    (:func:`ppl_vae.checks.statistics.mean_below`), of the mean of annealing less importance
    sampling; with an exact guide the mean is not above 0, so that the error rate is ``level`` at
    most, as far as the test's use of the central limit theorem goes. Where annealing is what is too
    low, it was too short, which is no fault of the pair: the verdict is "measured", as it is where
    annealing does not apply. Leaves torch's random state as it was.

    Each record has the figure's name, the rows it is of, value, standard error over rows, unit, p
    and verdict, both None where nothing is tested.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes. Labels that are withheld
            from training rows are summed out.
        seed: of rows and draws.
        level: error rate of the verdict.
        rows: held-out rows, chosen at random; all of them where the split has fewer.
        samples: K, importance draws a row.
        annealed_rows: how many of the rows are annealed too; 0 for none.
        simulated_rows: rows of the bracket; 0 for none.
        temperatures, chains, leapfrog, start: of annealing.
        tolerance: nats by which importance sampling may be lower.
        memory: MiB that importance sampling may take.
        compile: see :func:`ppl_vae.evaluate`.

    Raises:
        NotApplicable: no latent; a site in a plate besides that of the rows; more values of
            enumerated sites than can be tried.
        ValueError: numbers too small, or a level outside (0, 1).
        PairError: guide or data do not fit the model.
    """
    _check_settings(level, rows, samples, annealed_rows, simulated_rows, tolerance)
    dataset = as_dataset(data)
    withheld = inferred(model, dataset, None)
    with evaluating(seed, model, guide):
        chosen, columns = held_out(model, dataset, split=split, rows=rows, seed=seed)
        columns = {name: column for name, column in columns.items() if name not in withheld}
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        _check_applies(model, guide, columns, withheld)
        weights = log_weights(
            model,
            guide,
            columns,
            samples=samples,
            memory=memory,
            compile=compile,
            withheld=withheld,
        )
        sampled = Sampled(chosen, weights, pareto_smoothed(weights), effective_samples(weights))
        progress(0.25)
        options: dict[str, Any] = {
            "temperatures": temperatures,
            "chains": chains,
            "leapfrog": leapfrog,
            "start": start,
            "compile": compile,
            "withheld": withheld,
            "seed": seed,
        }
        note, compared, bracket = "", None, None
        try:
            if annealed_rows:
                compared = _compare(
                    model, guide, columns, sampled, annealed_rows, options, _within(progress, 1, 2)
                )
            if simulated_rows:
                rest = some_covariates(model, dataset, simulated_rows, seed=seed)
                held = (
                    shared_values(model, guide, columns)
                    if compared is None
                    else compared.annealed.given
                )
                bracket = simulated_bracket(
                    model,
                    guide,
                    [name for name in columns if name in model.observables],
                    rest,
                    simulated_rows,
                    given=held,
                    progress=_within(progress, 2, 4),
                    **options,
                )
        except NotAnnealable as reason:
            note = str(reason)
    p, verdict = (None, "measured") if compared is None else _judged(compared, tolerance, level)
    return CheckResult(
        name="evidence",
        verdict=verdict,
        error_rate=0.0 if p is None else level,
        p=p,
        statistics=tuple(records(sampled, compared, bracket, p, verdict)),
        meaning=meaning(sampled, compared, bracket, verdict, tolerance, note),
        settings={
            "split": split,
            "rows": len(chosen),
            "samples": samples,
            "annealed_rows": 0 if compared is None else len(compared.rows),
            "simulated_rows": 0 if bracket is None else bracket.gap.numel(),
            "tolerance": tolerance,
            **{key: value for key, value in options.items() if key != "withheld"},
        },
        groups=groups(sampled, compared, bracket),
        pictures=_pictures(compared),
    )


def shortfall(differences: Tensor, tolerance: float) -> float:
    """p-value of "the mean difference is at most ``tolerance``": see :func:`evidence`."""
    if not differences.isfinite().all():  # one of both gives no probability at all
        return 0.0 if float(differences.mean()) == math.inf else 1.0
    return mean_below(-differences.double().cpu().numpy(), -tolerance)


def _judged(
    compared: Compared, tolerance: float, level: float
) -> tuple[float, Literal["pass", "fail", "measured"]]:
    p = shortfall(compared.differences, tolerance)
    if p <= level:
        return p, "fail"
    too_short = shortfall(-compared.differences, tolerance) <= level  # of annealing itself
    return p, "measured" if too_short else "pass"


def simulated_bracket(
    model: GenerativeModel,
    guide: torch.nn.Module,
    observables: Collection[str],
    covariates: Columns,
    rows: int,
    *,
    given: Columns | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> Bracket:
    """log p(x) of rows that the model emits, from both sides.

    Args:
        observables: those whose density is meant; others are latent.
        covariates: of these rows.
        given: values of global latents, ``(event)`` each; needed where there are such.
        options: of :func:`ppl_vae.annealing.annealed_log_evidence`.
    """
    given = dict(given or {})
    with evaluating(1_000_003 + seed, model, guide):  # not the stream that chains start from
        nodes = model_nodes(model, given, rows=rows, columns=covariates)
    columns = {name: node["value"] for name, node in nodes.items() if name in observables}
    latents = {n: node["value"] for n, node in nodes.items() if n not in {*columns, *given}}
    return bidirectional(
        model,
        guide,
        columns | dict(covariates),
        latents,
        given=given,
        seed=seed,
        progress=progress,
        **options,
    )


def _compare(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Columns,
    sampled: Sampled,
    rows: int,
    options: Mapping[str, Any],
    progress: Progress,
) -> Compared:
    order = torch.randperm(
        len(sampled.rows), generator=torch.Generator().manual_seed(1 + options["seed"])
    )
    at = order[:rows].sort().values
    some = {name: column[at.to(column.device)] for name, column in columns.items()}
    annealed = annealed_log_evidence(model, guide, some, progress=progress, **options)
    weights = sampled.weights[:, at]
    if annealed.given:  # importance sampling of log p(x | w), with the w that annealing held
        weights = log_weights(
            model,
            guide,
            some,
            samples=len(weights),
            given=annealed.given,
            compile=options["compile"],
            withheld=options["withheld"],
        )
    return Compared(at, sampled.rows[at], weights, annealed)


def _check_settings(
    level: float,
    rows: int,
    samples: int,
    annealed_rows: int,
    simulated_rows: int,
    tolerance: float,
) -> None:
    check_level(level)
    if rows < 2 or samples < 1:
        raise ValueError(f"rows={rows}, samples={samples}: expected at least 2 rows, 1 sample")
    if annealed_rows == 1 or simulated_rows == 1 or min(annealed_rows, simulated_rows) < 0:
        raise ValueError(
            f"annealed_rows={annealed_rows}, simulated_rows={simulated_rows}: expected 0, or at "
            "least 2, since a standard error needs two"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: expected nats, at least 0")


def _check_applies(
    model: GenerativeModel, guide: torch.nn.Module, columns: Columns, withheld: Collection[str]
) -> None:
    few = {name: column[:2] for name, column in columns.items()}
    sites = read_sites(model, **few).values()
    if all(site.observed for site in sites):
        raise NotApplicable(f"{type(model).__name__} has no latent: its log p(x) is exact")
    try:
        check_measurable(sites)
        Assignments(model, guide, few, withheld)
    except ValueError as error:
        raise NotApplicable(str(error)) from None


def _within(progress: Progress, quarter: int, end: int) -> Callable[[float], None]:
    """Shows a part of the work, from one quarter of the whole to another."""
    return lambda done: progress((quarter + done * (end - quarter)) / 4)


def _pictures(compared: Compared | None) -> dict[str, Picture]:
    pareto = Picture(
        figures.pareto_k,
        "Pareto-k of each row's importance weights: above the line the row's log p(x) is not to be "
        "believed; try a guide nearer to the posterior.",
    )
    if compared is None:
        return {"evidence": pareto}
    bounds = Picture(
        figures.bounds,
        "Bounds of log p(x) by the number of draws, and what annealing finds for the same rows: "
        "where the curve still climbs at its end, or ends below annealing, more draws or a richer "
        "guide are needed.",
    )
    return {"evidence": bounds, "pareto_k": pareto}
