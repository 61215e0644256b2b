"""Evaluation: ELBO, importance-sampled NLL, KL a latent and active units, on every row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.data import Rows, as_dataset
from ppl_vae.draws import observed
from ppl_vae.importance import Budget, Compile, Figures, budget, mean_figures, parts
from ppl_vae.model import ROWS, GenerativeModel
from ppl_vae.objectives import Terms
from ppl_vae.sites import (
    Site,
    check_data,
    check_pair,
    evaluating,
    read_sites,
)


@dataclass(frozen=True)
class Evaluation:
    """Figures of a fitted pair on one split; nats are per datum.

    Attributes:
        elbo, elbo_se: evidence lower bound, and its standard error over rows.
        reconstruction, kl: the two parts of ``elbo = reconstruction - kl``.
        nll, nll_se: negative log-likelihood by importance sampling, and its standard error.
        bits_per_dim: ``nll`` in bits per observed dimension, in the unit in which the data are
            stored (a grey value stored as a byte, not as a fraction).
        kl_per_site: KL of each latent site.
        kl_per_latent: KL of each coordinate of a site, where q and p are diagonal normals.
        active_units: latents whose posterior mean has a variance over the rows of more than 0.01
            (Burda et al. 2016, arXiv:1509.00519, section 5.2). Where a family has no mean in closed
            form, the image of its base's mean stands in.
        samples, split, rows, seed: what the figures were computed from.
    """

    elbo: float
    elbo_se: float
    reconstruction: float
    kl: float
    nll: float
    nll_se: float
    bits_per_dim: float
    kl_per_site: dict[str, float]
    kl_per_latent: dict[str, list[float]]
    active_units: int
    samples: int
    split: str
    rows: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The figures in JSON types; a standard error of a single row is None."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


ACTIVE = 0.01
"""Variance of the posterior mean over the data above which a latent is active."""


def evaluate(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    samples: int = 100,
    split: str = "test",
    seed: int = 0,
    memory: int = 512,
    compile: Compile = "auto",
) -> Evaluation:
    """ELBO and NLL of every row of a split, with ``samples`` draws a row.

    ``log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k | x)``, a log-mean-exp a row (Burda et al. 2016,
    arXiv:1509.00519, eq. 8). A global site is drawn once a sample: its weight belongs to no row,
    so the rows' NLL is the log predictive density under its posterior, and its KL, divided by
    the rows, is part of the ELBO. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes. A bare tensor is split as
            ``fit`` splits it, so that the same tensor gives rows that were held out; to use all
            rows of a test set, give ``{"train": ..., "test": x}``.
        samples: K, importance draws a row.
        seed: of the draws.
        memory: MiB that the intermediate tensors may take; draws and rows are split to fit.
        compile: whether to compile the model's part, which takes seconds; "auto" weighs the
            measured time of the draws still to do against that. Draws are the same either way,
            figures up to rounding. What cannot be compiled runs eagerly, with a warning.

    Raises:
        ValueError: ``samples`` or ``memory`` below 1; an enumerated site, or one in a plate besides
            that of the rows.
        PairError: model, guide and data do not fit each other.
        FloatingPointError: discrete data with a probability above 1: a diverged guide.
    """
    if samples < 1 or memory < 1:
        raise ValueError(f"evaluate(samples={samples}, memory={memory}): expected at least 1")
    dataset = as_dataset(data)
    rows = dataset.split(split)
    with evaluating(seed, model, guide):
        probe = observed(model, rows, slice(0, 4))
        model.covariates_in(probe)  # all are there
        check_pair(model, guide, **probe)
        sites = read_sites(model, **probe)
        check_measurable(sites.values())
        check_data(model, (observed(model, rows, part) for part in parts(len(rows), 1000)))
        columns = mean_figures(
            model,
            guide,
            rows,
            samples=samples,
            budget=budget(model, guide, probe, samples=samples, memory=memory),
            compile=compile,
        )
    kl = _kl_per_site(columns)
    elbo, evidence = columns["elbo", ""], columns["log evidence", ""]
    reconstruction = columns["reconstruction", ""].mean().item()
    nll = -evidence.mean().item()
    dims = sum(x[0].numel() for name, x in probe.items() if name in model.observables)
    # A density has a unit, a probability has none.
    discrete = all(s.support.is_discrete for s in sites.values() if s.observed)
    unit = 1.0 if discrete else dataset.unit
    if discrete and nll < 0:
        raise FloatingPointError(
            f"an NLL of {nll:g} nats for discrete data: a probability above 1. The guide has "
            "diverged to where its density is lost in rounding; fit it with a lower learning rate"
        )
    return Evaluation(
        elbo=reconstruction - sum(kl.values()),
        elbo_se=_standard_error(elbo),
        reconstruction=reconstruction,
        kl=sum(kl.values()),
        nll=nll,
        nll_se=_standard_error(evidence),
        bits_per_dim=nll / dims / math.log(2) + math.log2(unit),
        kl_per_site=kl,
        kl_per_latent={
            site: columns[kind, site].mean(0).tolist()
            for kind, site in columns
            if kind == "kl per latent"
        },
        active_units=sum(
            int((columns[kind, site].var(0, correction=0) > ACTIVE).sum())
            for kind, site in columns
            if kind == "posterior mean"
        ),
        samples=samples,
        split=split,
        rows=len(rows),
        seed=seed,
    )


def mean_elbo(model: GenerativeModel, guide: torch.nn.Module, rows: Rows, *, seed: int) -> Terms:
    """The ELBO of a whole split, in nats per datum, from one draw a row."""
    with evaluating(seed, model, guide):
        columns = mean_figures(
            model, guide, rows, samples=1, budget=Budget(1000, 1000), compile=False
        )
    kl = sum(_kl_per_site(columns).values())
    return Terms(columns["reconstruction", ""].mean(), torch.tensor(kl))


def check_measurable(sites: Iterable[Site]) -> None:
    """Refuse what rows' figures cannot be computed of yet.

    Raises:
        ValueError: a site that the model enumerates, or one in a plate besides the rows'.
    """
    for site in sites:
        if site.enumerated:
            raise ValueError(
                f"site {site.name!r} is enumerated: its ELBO a row needs a sum over its values, "
                "which is not there yet; fit such a pair with ppl_vae.SVI and TraceEnum_ELBO"
            )
        if set(site.plates) - {ROWS}:
            raise ValueError(
                f"site {site.name!r} stands in plates {', '.join(site.plates)}; expected none but "
                f"{ROWS!r}: make the other dims event dims with .to_event"
            )


def _kl_per_site(columns: Figures) -> dict[str, float]:
    """Nats per datum; the KL of a global site is shared by the rows."""
    kl: dict[str, float] = {}
    for (kind, site), column in columns.items():
        if kind in ("kl", "global kl"):
            kl[site] = column.mean().item() / (len(column) if kind == "global kl" else 1)
    return kl


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
