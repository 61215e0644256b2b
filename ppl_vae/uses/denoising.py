"""Rows behind noise of a known kind, drawn given what came through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor

from ppl_vae.draws import rows_at_once
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating
from ppl_vae.uses.pairs import Pair, as_columns, entrywise_law, repeated, resample
from ppl_vae.weights import effective_samples, pareto_smoothed

Noise = Callable[[Tensor], Any]
"""The law of what came through, given clean rows ``(..., rows, event)``: ``lambda x:
Normal(x, 0.1)``; with or without ``.to_event``."""


@dataclass(frozen=True, eq=False)
class Denoised:
    """Draws of clean rows.

    Attributes:
        draws: ``(draws, rows, event)``.
        mean: of all that was weighed, not of the draws alone: ``(rows, event)``.
        ess: effective number of importance draws, ``(rows,)``.
        pareto_k: the tail of their weights, ``(rows,)``: above 0.7, they are not to be believed
            (Vehtari et al. 2024, arXiv:1507.02646).
    """

    draws: Tensor
    mean: Tensor
    ess: Tensor
    pareto_k: Tensor


def denoise(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Tensor | Mapping[str, Tensor],
    noise: Noise,
    *,
    draws: int = 100,
    samples: int = 1000,
    candidates: int = 32,
    site: str = "x",
    seed: int = 0,
) -> Denoised:
    """Draws clean x from p(x | y), where y is x behind noise, and x is the model's.

    Latents come from the guide, which is shown y in place of x. Each has the weight ``p(z) p(y | z)
    / q(z | y)``, self-normalized, with ``p(y | z)`` the integral of ``p(x | z) noise(y | x)`` over
    x, and x is drawn given z and y. The integral is exact for a normal likelihood with normal
    noise around x, and where an entry has finitely many values; else it is a mean over
    ``candidates`` drawn from p(x | z), for each entry by itself where both laws have independent
    entries. That mean has no bias, so that the weights stay right (Andrieu & Roberts 2009,
    "The pseudo-marginal approach", Ann. Stat. 37, 697), though noise that is much narrower than the
    likelihood wants more candidates. Global latents are held at one draw from the guide.
    Leaves torch's random state as it was.

    Args:
        columns: noisy rows by name, ``(rows, event)`` each, covariates and other observables among
            them, which have no noise; a tensor alone is y in place of x.
        noise: the law of y given x.
        draws: drawn in proportion to the weights.
        samples: importance draws of the latents of each row.
        candidates: see above.
        site: the observable that is noisy.

    Raises:
        ValueError: a number below 1, nan or inf in y, a law of the noise that does not fit rows of
            y, or a model with sites after x; and as :class:`~ppl_vae.uses.pairs.Pair`.
        PairError: the guide does not fit the model.
    """
    for name, count in {"draws": draws, "samples": samples, "candidates": candidates}.items():
        if count < 1:
            raise ValueError(f"denoise({name}={count}): expected at least 1")
    with evaluating(seed, model, guide):
        given = as_columns(model, columns, site)
        if not (y := given[site]).isfinite().all():
            raise ValueError(f"{site!r} has nan or inf")
        pair = Pair(model, guide, site, given)
        if pair.after:
            raise ValueError(
                f"{type(model).__name__} has sites after {site!r}, {', '.join(pair.after)}, which "
                "may depend on the clean values: take a model whose story ends with it"
            )
        tried = _values(pair.draw({name: c[:1] for name, c in given.items()}).emitted, candidates)
        room = rows_at_once(pair.width * tried)
        size = max(1, room // samples)
        drawn: list[Tensor] = []
        means: list[Tensor] = []
        log_weights: list[Tensor] = []
        for part in parts(len(y), size):
            some = {name: column[part] for name, column in given.items()}
            blocks = [
                _block(pair, some, noise, block.stop - block.start, candidates)
                for block in parts(samples, max(1, room // size))
            ]
            clean = _Clean(*(torch.cat(one) for one in zip(*blocks, strict=True)))
            # Only the weights are kept of all samples: entries of all rows would be too many.
            share = clean.log_weight.softmax(0).to(clean.mean)
            drawn.append(resample(clean.x, clean.log_weight, draws))
            means.append(torch.einsum("sr,sr...->r...", share, clean.mean))
            log_weights.append(clean.log_weight)
        weights = torch.cat(log_weights, 1)
        return Denoised(
            draws=torch.cat(drawn, 1),
            mean=torch.cat(means),
            ess=effective_samples(weights),
            pareto_k=pareto_smoothed(weights).pareto_k,
        )


class _Clean(NamedTuple):
    """Clean rows given latents and noisy rows.

    Attributes:
        log_weight: of the latents, or, until they have one, log p(y | z), ``(samples, rows)``.
        x: a draw given each, ``(samples, rows, event)``.
        mean: of such draws, of the same shape.
    """

    log_weight: Tensor
    x: Tensor
    mean: Tensor


def _block(
    pair: Pair, columns: Mapping[str, Tensor], noise: Noise, copies: int, candidates: int
) -> _Clean:
    many = repeated(columns, copies)
    state = pair.draw(many)
    y = many[pair.site]
    clean = _conjugate(state.emitted, noise, y) or _weighed(state.emitted, noise, y, candidates)
    weight = state.log_rest - state.log_q + clean.log_weight
    return _Clean(*(one.unflatten(0, (copies, -1)) for one in clean._replace(log_weight=weight)))


def _conjugate(emitted: Any, noise: Noise, y: Tensor) -> _Clean | None:
    """Of normal entries behind normal noise; None for other laws."""
    law = entrywise_law(emitted)
    if not isinstance(law, torch.distributions.Normal):
        return None
    probes = [entrywise_law(noise(law.loc + step)) for step in (0, 1)]
    if not all(isinstance(one, torch.distributions.Normal) for one in probes):
        return None
    here, there = probes
    around = torch.equal(here.loc, law.loc) and torch.equal(there.loc, law.loc + 1)
    if not (around and torch.equal(here.scale, there.scale)):
        return None
    behind = dist.Normal(law.loc, (law.scale**2 + here.scale**2).sqrt())
    gain = law.scale**2 / behind.scale**2
    mean = law.loc + gain * (y - law.loc)
    sd = law.scale * here.scale / behind.scale
    log_p = behind.log_prob(y).double().flatten(1).sum(1)
    return _Clean(log_p, mean + sd * torch.randn_like(mean), mean)


def _weighed(emitted: Any, noise: Noise, y: Tensor, candidates: int) -> _Clean:
    """By trying all values of an entry, or values drawn from its law."""
    law = entrywise_law(emitted)
    if _listed(law):
        values = law.enumerate_support(expand=False).expand(-1, *y.shape).to(y)
        log_prior = law.log_prob(values).double()
    else:
        values = emitted.sample((candidates,))
        log_prior = torch.full((), -math.log(candidates), dtype=torch.float64, device=y.device)
    behind = noise(values)
    if (shape := behind.batch_shape + behind.event_shape) != values.shape:
        raise ValueError(
            f"noise is a law of shape {tuple(shape)} for clean rows of shape "
            f"{tuple(values.shape)}; expected one of the same shape"
        )
    of_entry = entrywise_law(behind)
    scores = (behind if of_entry is None else of_entry).log_prob(y).double()
    if law is None and of_entry is not None:  # entries are chosen together
        scores = scores.flatten(2).sum(2)
    if _listed(law) and scores.dim() == 2:
        raise ValueError(
            "noise on entries with finitely many values: expected independent entries, such as "
            "Bernoulli(...).to_event(1)"
        )
    logits = log_prior + scores
    chosen = torch.distributions.Categorical(logits=logits.movedim(0, -1)).sample()
    total, share = logits.logsumexp(0), logits.softmax(0)
    if scores.dim() == 2:
        x = values[chosen, torch.arange(len(y), device=y.device)]
        mean = torch.einsum("vr,vr...->r...", share.to(values), values)
        return _Clean(total, x, mean)
    x = values.gather(0, chosen.unsqueeze(0)).squeeze(0)
    return _Clean(total.flatten(1).sum(1), x, (share * values).sum(0).to(y))


def _listed(law: Any) -> bool:
    return law is not None and law.has_enumerate_support


def _values(emitted: Any, candidates: int) -> int:
    """How many values of an entry are tried."""
    law = entrywise_law(emitted)
    return len(law.enumerate_support(expand=False)) if _listed(law) else candidates
