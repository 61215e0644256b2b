"""Evaluation: ELBO, importance-sampled NLL, KL a latent and active units, on every row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.centers import center
from ppl_vae.data import Rows, as_dataset
from ppl_vae.draws import observed, particles
from ppl_vae.model import ROWS, GenerativeModel, own_parameters
from ppl_vae.objectives import Terms
from ppl_vae.sites import (
    Site,
    check_data,
    check_pair,
    evaluating,
    paired_traces,
    read_sites,
    sample_nodes,
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
        check_pair(model, guide, **probe)
        sites = read_sites(model, **probe)
        check_measurable(sites.values())
        check_data(model, (observed(model, rows, part) for part in _parts(len(rows), 1000)))
        capacity = max(1, memory * 2**20 // _bytes_per_draw(model, guide, probe))
        columns = _columns(model, guide, rows, samples, capacity)
    kl = _kl_per_site(columns)
    elbo, evidence = columns["elbo", ""], columns["log evidence", ""]
    reconstruction = columns["reconstruction", ""].mean().item()
    nll = -evidence.mean().item()
    dims = sum(x[0].numel() for x in probe.values())
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
        columns = _columns(model, guide, rows, samples=1, capacity=1000)
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


def _parts(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


_Key = tuple[str, str]
"""A figure and the site it belongs to ("" for all together)."""


def _columns(
    model: GenerativeModel, guide: torch.nn.Module, rows: Rows, samples: int, capacity: int
) -> dict[_Key, Tensor]:
    """Figures of every row, ``(rows, ...)``, means over ``samples`` draws; a global site's stand
    at each row of a part alike. At most ``capacity`` draws of rows are made at once."""
    draws = min(samples, capacity)
    step = max(1, capacity // draws)
    columns: dict[_Key, Tensor] = {}
    for part in _parts(len(rows), step):
        batch = observed(model, rows, part)
        for key, value in _means_over_draws(model, guide, batch, samples, draws).items():
            if key not in columns:
                # All at once: small results allocated between large intermediate ones would
                # keep the allocator from using the same memory again for the next part.
                columns[key] = torch.empty(len(rows), *value.shape[1:], dtype=value.dtype)
            columns[key][part] = value
    return columns


def _kl_per_site(columns: dict[_Key, Tensor]) -> dict[str, float]:
    """Nats per datum; the KL of a global site is shared by the rows."""
    kl: dict[str, float] = {}
    for (kind, site), column in columns.items():
        if kind in ("kl", "global kl"):
            kl[site] = column.mean().item() / (len(column) if kind == "global kl" else 1)
    return kl


def _figures(
    model: GenerativeModel, guide: torch.nn.Module, batch: dict[str, Tensor], draws: int
) -> dict[_Key, Tensor]:
    """Figures of each draw: ``(draws, rows, ...)``, or ``(draws, 1, ...)`` for global sites."""
    plate = particles(draws, 1)
    with own_parameters(model, guide):
        model_trace, guide_trace = paired_traces(plate(model), plate(guide), **batch)
    drawn = dict(sample_nodes(guide_trace))
    # An autoguide draws a site through an auxiliary one, whose density is part of the site's q.
    auxiliary = {
        name.removesuffix("_unconstrained"): node["fn"].log_prob(node["value"]).double()
        for name, node in drawn.items()
        if node["infer"].get("is_auxiliary")
    }
    reconstruction: Tensor | float = 0.0
    elbo: Tensor | float = 0.0
    figures: dict[_Key, Tensor] = {}
    for name, node in sample_nodes(model_trace):
        log_p = node["fn"].log_prob(node["value"]).double()
        if node["is_observed"]:
            reconstruction = reconstruction + log_p
            continue
        q = drawn[name]["fn"]
        log_q = q.log_prob(node["value"]).double() + auxiliary.get(name, 0.0)
        kl = log_q - log_p
        if (closed := _kl_per_latent(q, node["fn"])) is not None:
            figures["kl per latent", name] = closed.double().reshape(*kl.shape, -1)
        if not any(frame.name == ROWS for frame in node["cond_indep_stack"]):
            figures["global kl", name] = kl
            continue
        figures["kl", name] = kl
        elbo = elbo - kl
        if not q.support.is_discrete:
            with suppress(NotImplementedError):
                figures["posterior mean", name] = center(q).double()
    figures["reconstruction", ""] = torch.as_tensor(reconstruction)
    figures["elbo", ""] = elbo + figures["reconstruction", ""]
    return figures


def _means_over_draws(
    model: GenerativeModel,
    guide: torch.nn.Module,
    batch: dict[str, Tensor],
    samples: int,
    draws: int,
) -> dict[_Key, Tensor]:
    """Figures of each row, averaged over ``samples`` draws, of which ``draws`` at a time."""
    sums: dict[_Key, Tensor] = {}
    log_sums: list[Tensor] = []
    for done in range(0, samples, draws):
        figures = _figures(model, guide, batch, min(draws, samples - done))
        # log p(x, z) - log q(z | x): what is averaged to the ELBO is the log importance weight.
        log_sums.append(figures["elbo", ""].logsumexp(0))
        for key, value in figures.items():
            sums[key] = sums[key] + value.sum(0) if key in sums else value.sum(0)
    means = {key: (total / samples).cpu() for key, total in sums.items()}
    log_sum = torch.stack(log_sums).logsumexp(0)
    means["log evidence", ""] = (log_sum - math.log(samples)).cpu()
    return means


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _kl_per_latent(q: Any, p: Any) -> Tensor | None:
    while isinstance(q, Independent) and isinstance(p, Independent):
        q, p = q.base_dist, p.base_dist
    if isinstance(q, TorchNormal) and isinstance(p, TorchNormal):
        return kl_divergence(q, p)
    return None


class _OutputBytes(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.bytes += t.numel() * t.element_size()
        return out


def _bytes_per_draw(
    model: GenerativeModel, guide: torch.nn.Module, batch: dict[str, Tensor]
) -> int:
    """Bytes that one draw of one row makes: an upper bound on what is alive at once."""
    draws = 4
    with _OutputBytes() as made:
        _figures(model, guide, batch, draws)
    rows = len(next(iter(batch.values())))
    return max(1, made.bytes // (draws * rows))
