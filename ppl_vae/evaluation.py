"""Evaluation: ELBO, importance-sampled NLL, KL a latent and active units, on every row."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae.calibration import LabelPosterior, LabelScores
from ppl_vae.data import Dataset, Rows, as_dataset
from ppl_vae.draws import observed
from ppl_vae.importance import Budget, Compile, Figures, budget, mean_figures, parts
from ppl_vae.model import ROWS, GenerativeModel
from ppl_vae.names import nearest
from ppl_vae.objectives import Terms
from ppl_vae.sites import (
    Site,
    check_data,
    check_labels,
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
        labels: where labels were withheld from the pair, how well it finds them: by the
            "classifier" q(y | x), which is the guide's, and by "importance" sampling of p(y | x),
            which is the model's; None where nothing was to be found.
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
    labels: Mapping[str, LabelScores] | None
    samples: int
    split: str
    rows: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The figures in JSON types; None for one that is not finite, as the standard error of a
        single row."""
        figures = {name: finite_or_none(value) for name, value in asdict(self).items()}
        # A figure that does not apply is left out; others read the file by its names.
        if self.labels is None:
            del figures["labels"]
        return figures


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
    withheld: Sequence[str] | None = None,
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
        withheld: observables that are inferred, although the data have them; None: the labels
            ``y`` where they are withheld from some training rows. Figures are then those of the
            other observables, p(x), and ``labels`` says how well the labels are found.

    Of enumerated sites, and of withheld ones that have finitely many values, every value is tried:
    the ELBO is exact in them, and a draw's importance weight is the sum over them.

    Raises:
        ValueError: ``samples`` or ``memory`` below 1; a site in a plate besides that of the rows;
            more values of enumerated sites than can be tried; ``withheld`` that names no
            observable, or all of them, or leaves labels to be observed that rows lack.
        PairError: model, guide and data do not fit each other.
        FloatingPointError: discrete data with a probability above 1: a diverged guide.
    """
    scored = score_rows(
        model,
        guide,
        as_dataset(data),
        samples=samples,
        split=split,
        seed=seed,
        memory=memory,
        compile=compile,
        withheld=withheld,
    )
    dataset, rows, columns, sites = scored.dataset, scored.rows, scored.columns, scored.sites
    kl = _kl_per_site(columns)
    elbo, evidence = columns["elbo", ""], columns["log evidence", ""]
    reconstruction = columns["reconstruction", ""].mean().item()
    nll = -evidence.mean().item()
    dims = sum(sites[name].event_shape.numel() for name in scored.observed)
    # A density has a unit, a probability has none.
    discrete = all(s.support.is_discrete for s in sites.values() if s.observed)
    unit = 1.0 if discrete else dataset.unit
    if discrete and nll < 0:
        raise FloatingPointError(
            f"an NLL of {nll:g} nats for discrete data: a probability above 1. The guide has "
            "diverged to where its density is lost in rounding; fit it with a lower learning rate"
        )
    posterior = scored.label_posterior()
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
        labels=None if posterior is None or posterior.labels is None else posterior.scores(),
        samples=samples,
        split=split,
        rows=len(rows),
        seed=seed,
    )


class Scored(NamedTuple):
    """The figures of each row of a split.

    Attributes:
        columns: see :func:`ppl_vae.importance.mean_figures`.
        sites: the model's.
        observed: names of the observables that were given.
        withheld: of those that were inferred, although the data may have them.
    """

    dataset: Dataset
    rows: Rows
    columns: Figures
    sites: Mapping[str, Site]
    observed: tuple[str, ...]
    withheld: tuple[str, ...]

    def label_posterior(self) -> LabelPosterior | None:
        """Of the withheld site whose values were all tried; None where there is none. Its labels
        are None where the data do not have all of them."""
        name = next((n for n in self.withheld if ("probability", n) in self.columns), None)
        if name is None:
            return None
        labels = self.rows.stored.get(name)
        if labels is None or labels.dtype != torch.int64 or (labels < 0).any():
            labels = None
        return LabelPosterior(
            classifier=self.columns["probability", name],
            importance=self.columns["log evidence", name].softmax(1),
            log_evidence=self.columns["log evidence", ""],
            labels=None if labels is None else labels.cpu(),
        )


def score_rows(
    model: GenerativeModel,
    guide: torch.nn.Module,
    dataset: Dataset,
    *,
    samples: int,
    split: str,
    seed: int,
    memory: int,
    compile: Compile,
    withheld: Sequence[str] | None,
) -> Scored:
    """Figures of every row of a split. Arguments and errors are those of :func:`evaluate`."""
    if samples < 1 or memory < 1:
        raise ValueError(f"evaluate(samples={samples}, memory={memory}): expected at least 1")
    rows = dataset.split(split)
    hidden = inferred(model, dataset, withheld)
    if "y" in model.observables and "y" not in hidden and rows.labeled is not None:
        raise ValueError(
            f"withheld={withheld}: labels are withheld from rows of {split!r}, where they cannot "
            "be observed: leave withheld out, or take another split"
        )
    with evaluating(seed, model, guide):
        probe = observed(model, rows, slice(0, 4), hidden)
        model.covariates_in(probe)  # all are there
        check_pair(model, guide, **probe)
        sites = read_sites(model, **probe)
        check_measurable(sites.values())
        check_labels(model, dataset, split)
        batches = (observed(model, rows, part, hidden) for part in parts(len(rows), 1000))
        check_data(model, batches)
        columns = mean_figures(
            model,
            guide,
            rows,
            samples=samples,
            budget=budget(model, guide, probe, samples=samples, memory=memory, withheld=hidden),
            compile=compile,
            withheld=hidden,
        )
    seen = tuple(name for name in probe if name in model.observables)
    return Scored(dataset, rows, columns, sites, seen, hidden)


def mean_elbo(
    model: GenerativeModel,
    guide: torch.nn.Module,
    rows: Rows,
    *,
    seed: int,
    withheld: Collection[str] = (),
) -> Terms:
    """The ELBO of a whole split, in nats per datum, from one draw a row."""
    with evaluating(seed, model, guide):
        columns = mean_figures(
            model,
            guide,
            rows,
            samples=1,
            budget=Budget(1000, 1000),
            compile=False,
            withheld=withheld,
        )
    kl = sum(_kl_per_site(columns).values())
    return Terms(columns["reconstruction", ""].mean(), torch.tensor(kl))


def inferred(
    model: GenerativeModel, dataset: Dataset, withheld: Sequence[str] | None
) -> tuple[str, ...]:
    """The observables that are inferred, although the data may have them: see :func:`evaluate`."""
    if withheld is None:
        partly = dataset.split("train").labeled is not None and "y" in model.observables
        return ("y",) if partly else ()
    known = [name for name in model.observables if name in dataset.columns]
    if unknown := [name for name in withheld if name not in model.observables]:
        raise ValueError(
            f"withheld={withheld}: {type(model).__name__} has no observable {unknown[0]!r}; "
            + nearest(unknown[0], model.observables)
        )
    if known and not set(known) - set(withheld):
        raise ValueError(f"withheld={withheld}: nothing is left to infer it from")
    return tuple(withheld)


class NotMeasurable(ValueError):
    """What rows' figures cannot be computed of yet."""


def check_measurable(sites: Iterable[Site]) -> None:
    """Refuse what rows' figures cannot be computed of yet.

    Raises:
        NotMeasurable: a site in a plate besides the rows'.
    """
    for site in sites:
        if set(site.plates) - {ROWS}:
            raise NotMeasurable(
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


def finite_or_none(value: Any) -> Any:
    """Figures, in lists or by name, with None for what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: finite_or_none(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
