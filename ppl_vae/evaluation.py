"""Evaluation: ELBO, importance-sampled NLL, KL a latent and active units, on every row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.data import Rows, as_dataset
from ppl_vae.model import ROWS, GenerativeModel, own_parameters
from ppl_vae.objectives import Terms
from ppl_vae.sites import aside, check_pair, paired_traces, read_sites, sample_nodes


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
        active_units: latents whose posterior mean varies over the rows by more than 0.01
            (Burda et al. 2016, arXiv:1509.00519, section 5.2: variance).
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
        return asdict(self)


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
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        samples: K, importance draws a row.
        seed: of the draws.
        memory: MiB that the intermediate tensors may take; draws and rows are split to fit.

    Raises:
        ValueError: ``samples`` or ``memory`` below 1.
        PairError: model and guide do not fit each other.
    """
    if samples < 1 or memory < 1:
        raise ValueError(f"evaluate(samples={samples}, memory={memory}): expected at least 1")
    dataset = as_dataset(data)
    rows = dataset.split(split)
    parts: list[dict[_Key, Tensor]] = []
    with evaluating(model, guide, seed):
        probe = _batch(model, rows, slice(0, 4))
        check_pair(model, guide, **probe)
        sites = read_sites(model, **probe)
        capacity = max(1, memory * 2**20 // _bytes_per_draw(model, guide, probe))
        draws = min(samples, capacity)
        step = max(1, capacity // draws)
        for start in range(0, len(rows), step):
            batch = _batch(model, rows, slice(start, start + step))
            parts.append(_means_over_draws(model, guide, batch, samples, draws))
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    # A global site's column has one entry a part, not one a row: its share falls to all rows.
    kl = {site: columns["kl", site].mean() for kind, site in columns if kind == "kl"}
    for site in kl:
        if ("local", site) not in columns:
            kl[site] = kl[site] / len(rows)
    elbo, evidence = columns["elbo", ""], columns["log evidence", ""]
    global_kl = sum(float(v) for site, v in kl.items() if ("local", site) not in columns)
    nll = -float(evidence.mean())
    dims = sum(x[0].numel() for x in probe.values())
    # A density has a unit, a probability has none.
    discrete = all(s.support.is_discrete for s in sites.values() if s.observed)
    unit = 1.0 if discrete else dataset.unit
    return Evaluation(
        elbo=float(elbo.mean()) - global_kl,
        elbo_se=_standard_error(elbo),
        reconstruction=float(columns["reconstruction", ""].mean()),
        kl=float(sum(kl.values())),
        nll=nll,
        nll_se=_standard_error(evidence),
        bits_per_dim=nll / dims / math.log(2) + math.log2(unit),
        kl_per_site={site: float(v) for site, v in kl.items()},
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
    with evaluating(model, guide, seed):
        parts: list[dict[_Key, Tensor]] = []
        for start in range(0, len(rows), 1000):
            batch = _batch(model, rows, slice(start, start + 1000))
            parts.append(_figures(model, guide, batch, draws=1))
    reconstruction = torch.cat([part["reconstruction", ""] for part in parts], 1).mean()
    kl = torch.zeros((), dtype=torch.float64)
    for kind, site in parts[0]:
        if kind == "kl":
            column = torch.cat([part[kind, site] for part in parts], 1).mean()
            kl = kl + (column if ("local", site) in parts[0] else column / len(rows))
    return Terms(reconstruction, kl)


@contextmanager
def evaluating(model: torch.nn.Module, guide: torch.nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, no validation, a random state of its own; all undone."""
    modes = {module: module.training for root in (model, guide) for module in root.modules()}
    model.eval()
    guide.eval()
    try:
        with torch.no_grad(), aside(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


_Key = tuple[str, str]
"""A figure and the site it belongs to ("" for all together)."""


def _figures(
    model: GenerativeModel, guide: torch.nn.Module, batch: dict[str, Tensor], draws: int
) -> dict[_Key, Tensor]:
    """Figures of each draw: ``(draws, rows, ...)``, or ``(draws, 1, ...)`` for global sites."""
    particles = pyro.plate("particles", draws, dim=-2)
    with own_parameters(model, guide):
        model_trace, guide_trace = paired_traces(particles(model), particles(guide), **batch)
    drawn = dict(sample_nodes(guide_trace))
    reconstruction: Tensor | float = 0.0
    elbo: Tensor | float = 0.0
    figures: dict[_Key, Tensor] = {}
    for name, node in sample_nodes(model_trace):
        log_p = node["fn"].log_prob(node["value"]).double()
        if node["is_observed"]:
            reconstruction = reconstruction + log_p
            continue
        q = drawn[name]["fn"]
        kl = figures["kl", name] = q.log_prob(node["value"]).double() - log_p
        if (closed := _kl_per_latent(q, node["fn"])) is not None:
            figures["kl per latent", name] = closed.double()
        if any(frame.name == ROWS for frame in node["cond_indep_stack"]):
            figures["local", name] = torch.ones_like(kl)
            elbo = elbo - kl
            if not q.support.is_discrete:
                figures["posterior mean", name] = _posterior_mean(q, node["value"]).double()
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


def _posterior_mean(q: Any, value: Tensor) -> Tensor:
    try:
        return q.mean
    except NotImplementedError:  # a transformed distribution: the draws' mean stands in
        return value


def _batch(model: GenerativeModel, rows: Rows, part: slice) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    return model.observed(rows.batch(part, device=parameter.device, dtype=parameter.dtype))


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
