"""Entries of a row that are missing, drawn given those that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ppl_vae.draws import model_nodes, rows_at_once
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating
from ppl_vae.uses.pairs import Pair, as_columns, entrywise_law, resample
from ppl_vae.uses.sweeps import Sweeps, log_missing
from ppl_vae.weights import effective_samples, pareto_smoothed

Method = Literal["metropolis", "gibbs", "resample"]


@dataclass(frozen=True, eq=False)
class Imputed:
    """Draws of what is missing.

    Attributes:
        draws: whole rows, ``(draws, rows, event)``: what is observed stands as it is. Of Markov
            chains, those of the first chain first.
        missing: which entries were drawn, ``(rows, event)``.
        method: how.
        acceptance: of "metropolis", the share of sweeps in which a draw of the guide was accepted,
            ``(rows,)``: near 0, chains stand still, and need more ``tries`` or a better guide.
        ess: effective number of draws, ``(rows,)``: of a chain, for the mean over a row's missing
            entries; of "resample", of the importance weights. nan where it cannot be told.
        r_hat: of chains, for the same mean: above 1.01, they have not forgotten where they began
            (Vehtari et al. 2021, arXiv:1903.08008). nan for a single chain.
        pareto_k: of "resample", the tail of the weights: above 0.7, they are not to be believed
            (Vehtari et al. 2024, arXiv:1507.02646).
    """

    draws: Tensor
    missing: Tensor
    method: Method
    acceptance: Tensor | None
    ess: Tensor
    r_hat: Tensor | None
    pareto_k: Tensor | None

    @property
    def mean(self) -> Tensor:
        """Rows with the means of what is missing, ``(rows, event)``."""
        return torch.where(self.missing, self.draws.mean(0), self.draws[0])


def impute(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Tensor | Mapping[str, Tensor],
    missing: Tensor,
    *,
    method: Method = "metropolis",
    draws: int = 100,
    chains: int = 4,
    warmup: int = 100,
    thin: int = 1,
    tries: int = 1,
    samples: int = 1000,
    start: Tensor | Literal["draw"] = "draw",
    site: str = "x",
    seed: int = 0,
) -> Imputed:
    """Draws the missing entries of rows from p(x_missing | x_observed).

    A sweep draws latents given the whole row, then missing entries given the latents.

    - "gibbs" takes the latents from the guide (Rezende et al. 2014, arXiv:1401.4082, appendix F).
      Where the guide is not the exact posterior, draws are not from the model's conditional, and
      nothing says so. Sites after x in the story do not act on it.
    - "metropolis" takes the guide's draw as a proposal, and accepts it with the probability
      that leaves the model's conditional as it is, whatever the guide (Mattei & Frellsen 2018,
      arXiv:1802.04826, algorithm 1). The first half of ``warmup`` is "gibbs", as they advise.
    - "resample" ends ``warmup`` sweeps of "gibbs" with importance sampling: a last draw of the
      latents gets the weight ``p(x_observed, z) / q(z | x_observed, x_missing)``, where x_missing
      is what the sweeps came to, and draws are taken in proportion to it (Rubin 1987,
      sampling-importance-resampling). Any x_missing is right, a likely one is efficient.

    Given the latents, entries must be independent, or a row must miss all or none of them.
    Global latents are held at one draw from the guide. Leaves torch's random state as it was.

    Args:
        columns: the rows by name, covariates and other observables among them, ``(rows, event)``
            each; a tensor alone is x. What stands where an entry is missing does not matter; it
            may be nan.
        missing: bool, ``(rows, event)``, or an event's shape for all rows alike; True is missing.
        draws: in all, ``draws / chains`` of a chain, rounded up.
        chains: Markov chains of each row, each from a start of its own.
        warmup: sweeps before the first draw.
        thin: sweeps from one draw of a chain to the next.
        tries: of "metropolis", the guide's draws among which, and the present latents, a sweep
            chooses in proportion to their weights, as iterated importance resampling does (Andrieu,
            Lee & Vihola 2018, Bernoulli 24, 842); of 1, Metropolis' rule. More help where
            acceptance is low, at so many times the cost.
        samples: of "resample", importance draws a row.
        start: what the guide first sees in place of missing entries: "draw", rows that the model
            emits, or values, ``(event)`` or ``(rows, event)``, such as the training mean.
        site: the observable that has missing entries.

    Raises:
        ValueError: an unknown method, a number below 1 (``warmup`` below 0), a mask or a start of
            another shape, a mask that is not bool, nothing missing, nan where nothing is missing,
            entries that are not independent given the latents; and as :class:`Pair`.
        PairError: the guide does not fit the model.
    """
    _check(
        method,
        draws=draws,
        chains=chains,
        thin=thin,
        tries=tries,
        samples=samples,
        warmup=warmup + 1,
    )
    with evaluating(seed, model, guide):
        given = as_columns(model, columns, site)
        x = given[site]
        gaps = _mask(missing, x)
        given[site] = torch.where(gaps, _start(model, given, start, site), x)
        if not given[site].isfinite().all():
            raise ValueError(f"{site!r} has nan or inf where nothing is missing, or in the start")
        pair = Pair(model, guide, site, given)
        _check_entries(pair, given, gaps)
        size = rows_at_once(pair.width) // (samples if method == "resample" else chains)
        found: list[_Part] = []
        for part in parts(len(x), max(1, size)):
            some = {name: column[part] for name, column in given.items()}
            if method == "resample":
                found.append(_resampled(pair, some, gaps[part], draws, samples, warmup))
            else:
                kept = math.ceil(draws / chains)
                sweeps = Sweeps(pair, some, gaps[part], chains, tries)
                found.append(_chained(sweeps, method == "metropolis", kept, warmup, thin))
    return Imputed(
        draws=torch.cat([one.draws for one in found], 1),
        missing=gaps,
        method=method,
        acceptance=_joined([one.acceptance for one in found]),
        ess=torch.cat([one.ess for one in found]),
        r_hat=_joined([one.r_hat for one in found]),
        pareto_k=_joined([one.pareto_k for one in found]),
    )


@dataclass(frozen=True)
class _Part:
    """What was found for some rows; attributes as in :class:`Imputed`."""

    draws: Tensor
    ess: Tensor
    acceptance: Tensor | None = None
    r_hat: Tensor | None = None
    pareto_k: Tensor | None = None


def _chained(sweeps: Sweeps, correct: bool, kept: int, warmup: int, thin: int) -> _Part:
    for sweep in range(warmup):
        # Far from where rows are likely, proposals would hardly be accepted.
        sweeps.correct = correct and sweep >= warmup // 2
        sweeps.move()
    sweeps.correct = correct
    states: list[Tensor] = []
    accepted: list[Tensor] = []
    for _ in range(kept):
        accepted += [sweeps.move() for _ in range(thin)]
        states.append(sweeps.rows())
    draws = torch.stack(states, 1)  # (chains, kept, rows, event)
    gaps = sweeps.gaps.unflatten(0, (sweeps.copies, -1))[0].flatten(1)
    of_row = (draws.flatten(3).double() * gaps).sum(3) / gaps.sum(1)
    ess, r_hat = _convergence(of_row.cpu().numpy())
    share = torch.stack(accepted).double().mean(0).unflatten(0, (sweeps.copies, -1)).mean(0)
    return _Part(
        draws=draws.flatten(0, 1),
        acceptance=share if sweeps.correct else None,
        ess=torch.from_numpy(ess).to(of_row.device),
        r_hat=torch.from_numpy(r_hat).to(of_row.device),
    )


def _resampled(
    pair: Pair,
    columns: Mapping[str, Tensor],
    gaps: Tensor,
    draws: int,
    samples: int,
    warmup: int,
) -> _Part:
    sweeps = Sweeps(pair, columns, gaps, samples)
    for _ in range(warmup):
        sweeps.move()
    proposed = pair.draw(sweeps.columns)
    sweeps.columns = sweeps.filled(proposed.emitted.sample())
    log_q = proposed.log_q + log_missing(proposed.emitted, sweeps.columns[pair.site], sweeps.gaps)
    log_p = pair.log_joint(sweeps.columns, proposed.values)
    weights = (log_p - log_q).unflatten(0, (samples, -1))
    return _Part(
        draws=resample(sweeps.rows(), weights, draws),
        ess=effective_samples(weights),
        pareto_k=pareto_smoothed(weights).pareto_k,
    )


def _check(method: str, **counts: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: expected one of {', '.join(get_args(Method))}")
    if wrong := [name for name, count in counts.items() if count < 1]:
        least = 0 if wrong[0] == "warmup" else 1
        raise ValueError(f"impute: {wrong[0]} is too small; expected at least {least}")


def _mask(missing: Tensor, x: Tensor) -> Tensor:
    if missing.dtype != torch.bool:
        raise ValueError(f"missing is {missing.dtype}; expected bool, True where x is missing")
    if missing.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"missing has shape {tuple(missing.shape)}; expected {tuple(x.shape)}, or "
            f"{tuple(x.shape[1:])} for all rows alike"
        )
    if not missing.any():
        raise ValueError("missing is False everywhere: there is nothing to impute")
    return missing.to(x.device).expand(x.shape)


def _start(
    model: GenerativeModel,
    columns: Mapping[str, Tensor],
    start: Tensor | Literal["draw"],
    site: str,
) -> Tensor:
    x = columns[site]
    if not isinstance(start, Tensor):
        if start != "draw":
            raise ValueError(f"start={start!r}: expected 'draw', or values in a tensor")
        return model_nodes(model, {}, rows=len(x), columns=columns)[site]["value"]
    if start.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"start has shape {tuple(start.shape)}; expected {tuple(x.shape[1:])} or "
            f"{tuple(x.shape)}"
        )
    return start.to(x)


def _check_entries(pair: Pair, columns: Mapping[str, Tensor], gaps: Tensor) -> None:
    """Refuse to draw a part of an event whose entries depend on each other."""
    few = {name: column[:2] for name, column in columns.items()}
    fn = pair.draw(few).emitted
    whole = gaps.flatten(1)
    if entrywise_law(fn) is None and (whole.any(1) != whole.all(1)).any():
        raise ValueError(
            f"entries of {pair.site!r} are not independent given the latents "
            f"({type(fn).__name__}), so that some cannot be drawn given others: let each row miss "
            "all of them or none, or take a likelihood of independent entries, .to_event"
        )


def _convergence(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effective draws and R-hat of each row, from ``(chains, draws, rows)``; nan where unknown."""
    from arviz_stats.base.array import array_stats  # takes a second to import

    chains, draws, rows = values.shape
    ess, r_hat = np.full(rows, math.nan), np.full(rows, math.nan)
    for row in range(rows):
        own = values[..., row]
        if draws < 4 or not np.isfinite(own).all() or np.ptp(own) == 0:
            continue
        ess[row] = array_stats.ess(own, chain_axis=0, draw_axis=1, method="mean")
        if chains > 1:
            r_hat[row] = array_stats.rhat(own, chain_axis=0, draw_axis=1)
    return ess, r_hat


def _joined(found: list[Tensor | None]) -> Tensor | None:
    held = [one for one in found if one is not None]
    return torch.cat(held) if held else None
