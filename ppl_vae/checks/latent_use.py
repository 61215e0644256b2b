"""Are the latents used, or do some carry nothing of the data?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xarray import Dataset

from ppl_vae.checks import latent_figures as figures
from ppl_vae.checks.aggregate import MutualInformation, log_q_of_all, mutual_information
from ppl_vae.checks.chosen import given, numbers_of_rows, score_chosen
from ppl_vae.checks.fixed_latents import FixedLatents
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level, holm, mean_below
from ppl_vae.data import as_dataset
from ppl_vae.draws import posterior_nodes, rows_at_once
from ppl_vae.evaluation import ACTIVE
from ppl_vae.guide import Prior
from ppl_vae.importance import Figures, parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import Site, evaluating

_COMPARED = 500  # rows whose draws are compared with every other row
_FEWEST = 10  # rows


def latent_use(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 1000,
    samples: int = 20,
    tolerance: float = 0.05,
) -> CheckResult:
    """Looks for collapsed latents, whose posterior is the prior whatever the data.

    A site is collapsed where its KL is below ``tolerance`` nats per datum. The null hypothesis is
    that no local site's is: a site fails where its mean over held-out rows is significantly
    smaller, by a one-sided t-test that allows for skewness
    (:func:`ppl_vae.checks.statistics.mean_below`), corrected by Holm. A single coordinate that is
    not used is listed, and is no fault: a model with more latents than it needs leaves some alone.

    Besides, of each local site: the active units, coordinates whose posterior mean has a variance
    over rows of more than 0.01 (Burda et al. 2016, arXiv:1509.00519, section 5.2); and the
    sensitivity, by how many nats log p of all that depends on the site falls when rows exchange
    their draws of it. Of all local sites together: bounds of the mutual information of row and
    draws (:func:`ppl_vae.checks.aggregate.mutual_information`), which is the mean KL less the KL of
    the aggregate posterior from the prior (Hoffman & Johnson 2016, "ELBO surgery"). The lower bound
    is at most log N for the N rows, 500 at most, that are compared; where it is near, trust the
    upper one no further.

    Each record has the site (all of them in the last one, where there are several), its KL with
    standard error, number of coordinates, active ones, names of the others, sensitivity with
    standard error, mutual information, p, adjusted p, and the verdict; nan and -1 where a figure
    does not apply.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: family-wise error rate of the verdict.
        rows: held-out rows, chosen at random; all of them where the split has fewer.
        samples: draws a row, of which the KL is the average.
        tolerance: nats per datum below which a site counts as collapsed.

    Raises:
        NotApplicable: no latent of the rows; the guide is :class:`ppl_vae.Prior`, which uses none
            on purpose; fewer than 10 rows; a site in a plate besides that of the rows.
        ValueError: a tolerance or a level out of range; and as :func:`ppl_vae.evaluate`.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a positive number of nats per datum")
    if isinstance(guide, Prior):
        raise NotApplicable("the guide draws from the prior, on purpose")
    dataset = as_dataset(data)
    chosen = numbers_of_rows(len(dataset.split(split)), rows, seed)
    if len(chosen) < _FEWEST:
        raise NotApplicable(f"{len(chosen)} rows of {split!r}; use needs at least {_FEWEST}")
    scored = score_chosen(model, guide, dataset, chosen, split=split, samples=samples, seed=seed)
    sites = [site for kind, site in scored.columns if kind == "kl"]
    if not sites:
        raise NotApplicable(f"{type(model).__name__} has no latent for each row")
    progress(0.4)
    with evaluating(seed, model, guide):
        pair = _with_posterior(model, guide, given(model, dataset, chosen, split=split), seed)
        lost = {site: _sensitivity(pair, site) for site in sites}
        progress(0.6)
        few = given(model, dataset, chosen[:_COMPARED], split=split)
        information = _information(FixedLatents(model, guide, few, _length(few), seed), sites)
    records = [_record(scored.sites[site], scored.columns, lost[site], tolerance) for site in sites]
    for record, p in zip(records, holm([record["p"] for record in records]), strict=True):
        record |= {"p_adjusted": p, "verdict": "fail" if p <= level else "pass"}
    failed = [record for record in records if record["verdict"] == "fail"]
    smallest = min(record["p_adjusted"] for record in records)
    if len(records) > 1:
        records.append(_of_all(records, scored.columns, sites))
    records[-1] |= {
        "mutual_information": information.lower,
        "mutual_information_upper": information.upper,
        "mutual_information_se": information.se,
    }
    return CheckResult(
        name="latent_use",
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=smallest,
        statistics=tuple(records),
        meaning=_meaning(failed, records, information, tolerance, _length(few)),
        settings={
            "split": split,
            "seed": seed,
            "rows": len(chosen),
            "samples": samples,
            "tolerance": tolerance,
            "compared": _length(few),
            "correction": "Holm",
        },
        groups={"latent_use": _group(scored.columns, [scored.sites[site] for site in sites])},
        pictures={
            "latent_use": Picture(
                figures.latents,
                "KL and variance of the posterior mean of each latent, the largest first: those "
                "below the line carry nothing; where a whole site does, try a warm-up of the KL, "
                "free bits, or a weaker decoder.",
            ),
            "sensitivity": Picture(
                figures.sensitivity,
                "KL of each site, and nats lost when rows exchange their draws of it: a site with "
                "a KL that nothing depends on is paid for and not used.",
            ),
        },
    )


def _length(columns: Mapping[str, Tensor]) -> int:
    return len(next(iter(columns.values())))


def _with_posterior(
    model: GenerativeModel, guide: torch.nn.Module, columns: dict[str, Tensor], seed: int
) -> FixedLatents:
    """Rows with latents from their posterior, those included that the model sums out."""
    pair = FixedLatents(model, guide, columns, _length(columns), seed)
    nodes, _ = posterior_nodes(model, guide, columns, draws=1)
    for name, node in nodes.items():
        pair.latents[name] = node["value"].reshape(pair.latents[name].shape)
    return pair


def _sensitivity(pair: FixedLatents, site: str) -> Tensor:
    """Nats by which log p of all else falls, a row, when rows exchange their draws of a site."""
    width = sum(z.numel() for z in pair.latents.values()) // pair.rows
    # All rows of one cycle, so that none keeps its own.
    order = torch.randperm(pair.rows).to(pair.every_row.device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    lost: list[Tensor] = []
    for part in parts(pair.rows, rows_at_once(width)):
        columns, latents = pair.permuted(pair.every_row[part])
        exchanged = latents | {site: pair.chosen(partner[part])[site]}
        with_own, with_other = (
            sum(
                log_p.double()
                for name, log_p in pair.terms("model", columns, values).items()
                if name != site and log_p.dim()
            )
            for values in (latents, exchanged)
        )
        lost.append(torch.as_tensor(with_own - with_other).cpu())
    return torch.cat(lost)


def _information(pair: FixedLatents, sites: list[str]) -> MutualInformation:
    try:
        return mutual_information(log_q_of_all(pair, sites))
    except NotImplementedError:  # a guide that scores its own draws only
        return MutualInformation(math.nan, math.nan, math.nan)


def _record(site: Site, columns: Figures, lost: Tensor, tolerance: float) -> dict[str, Any]:
    kl = columns["kl", site.name]
    kl = kl.reshape(len(kl))
    mean, error = float(kl.mean()), _error(kl)
    p = mean_below(kl.double().numpy(force=True), tolerance)
    active = _variances(columns, site.name) > ACTIVE
    coordinates = site.coordinates
    return {
        "site": site.name,
        "kl": mean,
        "kl_se": error,
        "coordinates": len(active) or -1,
        "active": int(active.sum()) if len(active) else -1,
        "inactive": [coordinates[k] for k in np.flatnonzero(~active)],
        "nats_lost": float(lost.mean()),
        "nats_lost_se": _error(lost),
        "mutual_information": math.nan,
        "mutual_information_upper": math.nan,
        "mutual_information_se": math.nan,
        "p": p,
        "p_adjusted": math.nan,
        "verdict": "measured",
    }


def _of_all(records: list[dict[str, Any]], columns: Figures, sites: list[str]) -> dict[str, Any]:
    """The last record: of all sites together."""
    kl = torch.stack([columns["kl", site].flatten() for site in sites]).sum(0)
    known = [record for record in records if record["active"] >= 0]
    return records[0] | {
        "site": "all",
        "kl": float(kl.mean()),
        "kl_se": _error(kl),
        "coordinates": sum(record["coordinates"] for record in known) if known else -1,
        "active": sum(record["active"] for record in known) if known else -1,
        "inactive": [name for record in records for name in record["inactive"]],
        "nats_lost": math.nan,
        "nats_lost_se": math.nan,
        "p": math.nan,
        "p_adjusted": math.nan,
        "verdict": "measured",
    }


def _variances(columns: Figures, site: str) -> np.ndarray:
    """Of the posterior mean of each coordinate over rows; empty where there is no such mean."""
    means = columns.get(("posterior mean", site))
    if means is None:
        return np.empty(0)
    return means.reshape(len(means), -1).var(0, correction=0).numpy()


def _group(columns: Figures, sites: list[Site]) -> Dataset:
    """KL and variance of the posterior mean of each latent; nan where not in closed form."""
    names, kl, variance = list[str](), list[float](), list[float]()
    for site in sites:
        closed = columns.get(("kl per latent", site.name))
        variances = _variances(columns, site.name)
        kls = np.empty(0) if closed is None else closed.mean(0).flatten().numpy()
        coordinates = site.coordinates
        for k in range(max(len(kls), len(variances))):
            names.append(coordinates[k])
            kl.append(float(kls[k]) if k < len(kls) else math.nan)
            variance.append(float(variances[k]) if k < len(variances) else math.nan)
    return Dataset(
        {"kl": ("latent", np.array(kl)), "variance": ("latent", np.array(variance))},
        coords={"latent": np.array(names, dtype=str)},
    )


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _meaning(
    failed: list[dict[str, Any]],
    records: list[dict[str, Any]],
    information: MutualInformation,
    tolerance: float,
    compared: int,
) -> str:
    last = records[-1]
    inactive = last["inactive"]
    lower, upper = (max(0.0, nats) for nats in (information.lower, information.upper))
    told = f" Draws tell {lower:.3g} to {max(lower, upper):.3g} nats of their row"
    near = information.lower > math.log(compared) - 1
    capped = f" (at most {math.log(compared):.2f} can be seen)" if near else ""
    told = f"{told}{capped}." if math.isfinite(information.lower) else ""
    if last["active"] >= 0:
        told += f" {last['active']} of {last['coordinates']} coordinates are active"
        told += f"; not {', '.join(inactive[:8])}" if inactive else ""
        told += f" and {len(inactive) - 8} more." if len(inactive) > 8 else "."
    if not failed:
        return f"No local site is collapsed: each has at least {tolerance:g} nats or so.{told}"
    said = ", ".join(f"{r['site']} ({r['kl']:.2g} ± {r['kl_se']:.1g} nats)" for r in failed)
    return (
        f"Collapsed, with a KL below {tolerance:g} nats per datum: {said}. Its posterior is "
        "nearly the prior whatever the data: try a warm-up of the KL, free bits, a weaker decoder, "
        f"or leave the site out.{told}"
    )
