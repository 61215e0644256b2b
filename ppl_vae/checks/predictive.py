"""Population predictive check: does the fitted model emit data like those that were held out?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from xarray import Dataset, DataTree

from ppl_vae.checks.result import CheckResult, Picture, Progress, silent
from ppl_vae.checks.statistics import STATISTICS, Statistic, compute, holm, p_value
from ppl_vae.draws import (
    held_out,
    model_nodes,
    posterior_nodes,
    rows_at_once,
    unobserved_sites,
)
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_data, check_pair, evaluating


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
    statistics: Mapping[str, Statistic] = STATISTICS,
    site: str = "x",
) -> CheckResult:
    """Compares held-out data with data sets of as many rows that the fitted model emits.

    Replicates are drawn from the story's start: local latents, labels included, from their
    priors, global ones from the guide; covariates are those of the held-out rows. For a statistic
    T, ``p = 2 min(P(T_rep <= T), P(T_rep >= T))``, at most 1, each probability estimated by ``(1 +
    count) / (1 + replicates)``, so that the p-value is valid whatever the number of replicates
    (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39). Ties count on both sides, which is
    conservative. The verdict is Holm's (1979, Scand. J. Stat. 6, 65) over all statistics given, so
    that a model that is the truth fails with probability ``level`` at most. The check is the
    population predictive check of Moran, Blei & Ranganath 2019 (arXiv:1908.00882), with the fitted
    parameters as they are.

    Each record has the statistic's name, its observed value, mean and standard deviation over
    replicates, p with its Monte Carlo standard error, p adjusted by Holm, and the verdict:
    "pass", "fail", or "not applicable" (with the reason in ``note``) for a statistic that is nan,
    or the same in the data and every replicate. The latter still counts in Holm's correction.
    Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: family-wise error rate of the verdict.
        rows: held-out rows, chosen at random; all of them where the split has fewer.
        replicates: number of replicated data sets.
        statistics: name -> function of a data set ``(rows, D)`` in float64, D all the event's
            dims, to a number.
        site: the observable that is compared.

    Raises:
        ValueError: too few rows, or too few replicates for any p-value to be below ``level`` after
            correction; a level outside (0, 1); a statistic that does not return one number; none
            that is applicable; a model that emits values that are not finite.
        PairError: guide or data do not fit the model.
    """
    _check_settings(level, rows, replicates, statistics)
    if site not in model.observables:
        raise ValueError(
            f"{type(model).__name__} has no observable {site!r}, only "
            f"{', '.join(model.observables)}: choose with site="
        )
    with evaluating(seed, model, guide):
        _, columns = held_out(model, data, split=split, rows=rows, seed=seed)
        if site not in columns:
            raise ValueError(f"the data have no column {site!r}")
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        held = len(columns[site])
        observed = np.array(compute(statistics, columns[site], "the held-out data"))
        replicated = np.empty((replicates, len(statistics)))
        for i, x in enumerate(_replicates(model, guide, columns, site, replicates)):
            if not x.isfinite().all():
                raise ValueError(
                    f"replicate {i}: {type(model).__name__} emits "
                    f"{float(x[~x.isfinite()][0])} at site {site!r}: its parameters or its "
                    "likelihood have diverged"
                )
            replicated[i] = compute(statistics, x, f"replicate {i}")
    records = _records(list(statistics), observed, replicated, level)
    if all(record["verdict"] == "not applicable" for record in records):
        raise ValueError("no statistic is applicable: " + records[0]["note"])
    failed = [record for record in records if record["verdict"] == "fail"]
    return CheckResult(
        name="population_predictive",
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=min(record["p_adjusted"] for record in records),
        statistics=tuple(records),
        meaning=_meaning(failed, records, held, split),
        settings={
            "split": split,
            "seed": seed,
            "rows": held,
            "replicates": replicates,
            "site": site,
            "correction": "Holm",
            "ties": "conservative",
        },
        groups=_groups(list(statistics), observed, replicated),
        pictures={"population_predictive": Picture(_figure, _CAPTION)},
    )


_CAPTION = (
    "Each statistic over data sets from the model, and its value in held-out data: a line in the "
    "tail is a way in which the model differs; try the prior where totals differ, the likelihood "
    "where spread or zeros do."
)


def _check_settings(
    level: float, rows: int, replicates: int, statistics: Mapping[str, Statistic]
) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected an error rate between 0 and 1, such as 0.05")
    if rows < 2:
        raise ValueError(f"rows={rows}: expected at least 2")
    if not statistics:
        raise ValueError("statistics is empty: expected at least one")
    for name in statistics:
        if not name or "/" in name:
            raise ValueError(f"statistic {name!r}: expected a name without '/'")
    # The smallest p is 2 / (replicates + 1); with fewer the check could never fail a model.
    needed = math.ceil(2 * len(statistics) / level) - 1
    if replicates < needed:
        raise ValueError(
            f"replicates={replicates}: with {len(statistics)} statistics at level {level:g} even "
            f"the worst model would pass; expected at least {needed}"
        )


def _replicates(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    site: str,
    replicates: int,
) -> Iterator[Tensor]:
    """Data sets from the fitted model, ``(rows, event)`` each, one at a time."""
    rows = len(columns[site])
    sites, given = unobserved_sites(model, columns), model.covariates_in(columns)
    at_once = rows_at_once(sites[site].event_shape.numel())
    shared = [s.name for s in sites.values() if not (s.local or s.observed)]
    # Rows are independent given the global sites: several small replicates in one run.
    together = 1 if shared else max(1, at_once // rows)
    for start in range(0, replicates, together):
        fixed: dict[str, Tensor] = {}
        if shared:
            latents, _ = posterior_nodes(model, guide, columns, draws=1)
            for name in shared:
                # Without the one particle, the shape is that of a plain run.
                shape = sites[name].batch_shape + sites[name].event_shape
                fixed[name] = latents[name]["value"].reshape(shape)
        total = min(together, replicates - start) * rows
        parts: list[Tensor] = []
        for done in range(0, total, at_once):
            size = min(at_once, total - done)
            again = torch.arange(done, done + size) % rows
            repeated = {name: value[again.to(value.device)] for name, value in given.items()}
            nodes = model_nodes(model, fixed, rows=size, columns=repeated)
            parts.append(nodes[site]["value"])
        yield from torch.cat(parts).split(rows)


def _records(
    names: Sequence[str], observed: np.ndarray, replicated: np.ndarray, level: float
) -> list[dict[str, Any]]:
    notes = [_note(observed[k], replicated[:, k]) for k in range(len(names))]
    pairs = [
        (1.0, 0.0) if note else p_value(observed[k], replicated[:, k])
        for k, note in enumerate(notes)
    ]
    # Not applicable ones count: the family is fixed before the data are seen.
    adjusted = holm([p for p, _ in pairs])
    records: list[dict[str, Any]] = []
    for k, (name, note, (p, error)) in enumerate(zip(names, notes, pairs, strict=True)):
        verdict = "not applicable" if note else "fail" if adjusted[k] <= level else "pass"
        records.append(
            {
                "statistic": name,
                "observed": float(observed[k]),
                "replicated_mean": float(replicated[:, k].mean()),
                "replicated_sd": float(replicated[:, k].std(ddof=1)),
                "p": math.nan if note else p,
                "p_standard_error": math.nan if note else error,
                "p_adjusted": math.nan if note else adjusted[k],
                "verdict": verdict,
                "note": note,
            }
        )
    return records


def _note(observed: float, replicated: np.ndarray) -> str:
    """Why a statistic is not applicable; empty if it is."""
    if math.isnan(observed):
        return "nan in the held-out data"
    if missing := int(np.isnan(replicated).sum()):
        return f"nan in {missing} of {len(replicated)} replicates"
    if (replicated == observed).all():
        return f"{observed:g} in the held-out data and in every replicate"
    return ""


def _meaning(
    failed: list[dict[str, Any]], records: list[dict[str, Any]], rows: int, split: str
) -> str:
    skipped = [r["statistic"] for r in records if r["verdict"] == "not applicable"]
    aside = f" Not applicable: {', '.join(skipped)}." if skipped else ""
    if not failed:
        return (
            f"Data sets that the model emits look like {rows} held-out rows ({split}) in every "
            f"statistic compared; other differences may remain.{aside}"
        )
    found = ", ".join(
        f"{r['statistic']} too {'low' if r['replicated_mean'] < r['observed'] else 'high'} "
        f"({r['replicated_mean']:.4g} against {r['observed']:.4g})"
        for r in failed
    )
    return (
        f"Data sets that the model emits differ from {rows} held-out rows ({split}): {found}. "
        "Where latents drawn from the prior are at fault, try a learned prior (mixture, VampPrior, "
        "flow); where dispersion or zeros are, another likelihood; where both training and "
        f"held-out ELBO are still rising, a longer fit.{aside}"
    )


def _groups(
    names: Sequence[str], observed: np.ndarray, replicated: np.ndarray
) -> dict[str, Dataset]:
    return {
        "population_predictive": Dataset(
            {name: (("chain", "draw"), replicated[None, :, k]) for k, name in enumerate(names)},
            coords={"chain": [0], "draw": np.arange(len(replicated))},
        ),
        "population_observed": Dataset({name: observed[k] for k, name in enumerate(names)}),
    }


def _figure(result: CheckResult) -> Figure:
    """Each statistic's distribution over replicates, and a line at the held-out data's."""
    # These take seconds to import, which only those who plot pay.
    import arviz_plots
    import matplotlib.pyplot as plt
    from arviz_plots.plot_collection import PlotCollection

    shown = {
        record["statistic"]: record
        for record in result.statistics
        if record["verdict"] != "not applicable"
    }
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    replicated = result.groups["population_predictive"][list(shown)]
    collection = PlotCollection.wrap(
        replicated,
        cols=["__variable__"],
        col_wrap=columns,
        backend="matplotlib",
        figure_kwargs={
            "figsize": (3.1 * columns, 2.5 * lines + 0.9),
            "figsize_units": "inches",
        },
    )
    # A histogram needs a spread; without one, the replicates are a line as well.
    spread = [name for name in shown if np.ptp(replicated[name].values) > 0]
    with warnings.catch_warnings():
        # Statistics are numbers, even where all of them happen to be 0 or 1.
        warnings.filterwarnings("ignore", message="The .* data looks binary")
        if spread:
            arviz_plots.plot_ppc_tstat(
                DataTree.from_dict(
                    {
                        "prior_predictive": replicated[spread],
                        "observed_data": result.groups["population_observed"][spread],
                    }
                ),
                group="prior_predictive",
                t_stat="mean",  # of one number a replicate: the statistic itself
                kind="hist",
                plot_collection=collection,
                visuals={"title": False},
            )
    axes = {name: collection.get_target(name, {}) for name in shown}
    figure = next(iter(axes.values())).figure
    plt.close(figure)  # the figure is the caller's: pyplot need not keep it
    figure.set_layout_engine("constrained")
    held = None
    for name, record in shown.items():
        ax, color = axes[name], "C3" if record["verdict"] == "fail" else "black"
        if name not in spread:
            ax.axvline(record["replicated_mean"], color="C0", linewidth=2)
        ax.set_ylim(bottom=0)
        ax.set_yticks([])
        held = ax.axvline(record["observed"], color=color, linewidth=2)
        ax.set_title(
            f"{name}\np = {record['p']:.2g}, adjusted {record['p_adjusted']:.2g}",
            fontsize=10,
            color=color,
        )
    settings = result.settings
    figure.suptitle(
        f"Population predictive check: {result.verdict} (family-wise error rate "
        f"{result.error_rate:g})\n{settings['replicates']} data sets of {settings['rows']} rows "
        f"from the model, against held-out rows ({settings['split']})",
        fontsize=11,
    )
    figure.legend(
        [next(iter(axes.values())).lines[0], held],
        ["replicates: frequency", "held-out data (red: fails)"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure
