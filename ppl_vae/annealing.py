"""Annealed importance sampling: log p(x) of each row, bounded by chains of HMC from afar.

A chain goes from a start that can be drawn from, the prior or the guide, to the posterior, through
the temperatures between them (Neal 2001, Statistics and Computing 11, 125), moved at each one by
Hamiltonian Monte Carlo (Wu, Burda, Salakhutdinov & Grosse 2017, arXiv:1611.04273). Backwards from
an exact draw of the posterior, which only simulated data come with, it bounds log p(x) from above
(Grosse, Ghahramani & Adams 2015, arXiv:1511.02543).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.density import Density, Start
from ppl_vae.draws import shared_values
from ppl_vae.hmc import Count, Gradients, Hmc, State
from ppl_vae.importance import CACHED, Compile, OutputBytes, evenly, parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating

TARGET = 0.7
"""Acceptance that step sizes are adapted toward: 0.65 is best for many coordinates, and a little
more is safer (Neal 2011, arXiv:1206.1901, section 4.4)."""

PILOT = 8
"""The preliminary run, which adapts step sizes, has so many times fewer temperatures."""

WARM_UP = 10
"""Moves of the preliminary run at its first temperature, before it sets out."""

GAIN = 0.7
"""What a move of the preliminary run adds to a log step size, times acceptance above TARGET."""


@dataclass(frozen=True, eq=False)
class Annealed:
    """What annealed chains say of log p(x).

    Attributes:
        estimates: of each chain, float64 ``(chains, rows)``, in nats. exp of a forward chain's has
            mean p(x); exp of minus a reverse chain's has mean 1 / p(x).
        upper: whether the chains ran backwards, so that they bound from above.
        acceptance: share of HMC moves that were accepted, ``(rows,)``.
        step_sizes: of HMC, ``(temperatures - 1, rows)``, the coldest last.
        given: the values at which global latents were held.
    """

    estimates: Tensor
    upper: bool
    acceptance: Tensor
    step_sizes: Tensor
    given: Mapping[str, Tensor]

    @property
    def log_evidence(self) -> Tensor:
        """All chains together, ``(rows,)``: in expectation at most log p(x); or, from reverse
        chains, at least."""
        sign = -1 if self.upper else 1
        return sign * ((sign * self.estimates).logsumexp(0) - math.log(len(self.estimates)))


def annealed_log_evidence(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    *,
    temperatures: int = 500,
    chains: int = 8,
    leapfrog: int = 5,
    start: Start = "prior",
    latents: Mapping[str, Tensor] | None = None,
    step_sizes: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
    withheld: Collection[str] = (),
    seed: int = 0,
    compile: Compile = "auto",
    progress: Callable[[float], None] = lambda done: None,
) -> Annealed:
    """log p(x) of each row by annealed importance sampling.

    Any model will do whose local latents are continuous, once those that are enumerated are summed
    out. The path is ``p_b(z) ~ start(z)^(1-b) p(x, z)^b`` over unconstrained coordinates of z, with
    b on a sigmoid from 0 to 1, dense at both ends (Wu et al. 2017, section 5.1). HMC has unit mass
    there. Step sizes, one a row and temperature, come from a preliminary run with an eighth of the
    temperatures, and are then fixed, so that the estimate of p(x) is unbiased; adapting them to the
    chain's own past, as Wu et al. do, leaves a bias. Global latents are held at one draw from the
    guide: figures are of log p(x | w). Leaves torch's random state as it was.

    Args:
        columns: what the model observes, and its covariates, ``(rows, event)`` each, as
            :func:`ppl_vae.draws.held_out` gives them.
        temperatures: T, steps from 0 to 1. The more, the tighter.
        chains: C, of each row.
        leapfrog: steps of a trajectory; with the numbers above, the gradients that a row costs:
            ``T * C * leapfrog``.
        start: where chains begin. "prior" knows nothing of the guide, so that a guide that misses
            a mode does not mislead it; "guide" is nearer, so that the bound is tighter.
        latents: exact draws from the posterior of each row, by site, ``(rows, event)`` each, such
            as those that simulated rows were emitted from. The chains run from these backwards.
        step_sizes: of an earlier call with these rows and temperatures; None: adapt them anew.
        given: values of global latents, ``(event)`` each, instead of a draw.
        withheld: see :func:`ppl_vae.weights.log_weights`.
        compile: as in :func:`ppl_vae.evaluate`.
        progress: told the fraction that is done, from time to time.

    Raises:
        NotAnnealable: a local latent that is discrete and not enumerated; no local latent at all; a
            guide with auxiliary sites, as the start.
        ValueError: a number below 1, fewer than 2 temperatures, or step sizes of another shape.
    """
    rows = len(next(iter(columns.values())))
    _check(rows, temperatures, chains, leapfrog, step_sizes)
    with evaluating(seed, model, guide):
        held = dict(shared_values(model, guide, columns) if given is None else given)
        density = Density(model, guide, columns, start=start, given=held, withheld=withheld)
        size = _rows_at_once(density, columns, chains, rows)
        moves = temperatures - 1 + (_pilot(temperatures) + WARM_UP if step_sizes is None else 0)
        blocks = math.ceil(rows / size)
        count = Count(moves * leapfrog * blocks, progress)
        gradients = Gradients(density, compile, count)
        betas = schedule(temperatures)
        done: list[_Chains] = []
        for part in parts(rows, size):
            # A last block of the same size as the others: programs are for fixed shapes.
            block = slice(part.stop - min(size, part.stop), part.stop)
            own = {name: column[block] for name, column in columns.items()}
            hmc = Hmc(partial(gradients, own), leapfrog)
            if step_sizes is None:
                steps = _adapted(hmc, density.draw(own, chains), betas)
            else:
                steps = step_sizes[:, block].to(next(iter(own.values())).device)
            if latents is None:
                found = _forward(hmc, density.draw(own, chains), betas, steps)
            else:
                z = {k: v[block].expand(chains, *v[block].shape) for k, v in latents.items()}
                found = _reverse(hmc, density.coordinates(own, z), betas, steps)
            new = part.start - block.start
            done.append(_Chains(*(one[..., new:].cpu() for one in found)))
    return Annealed(
        estimates=torch.cat([one.estimates for one in done], 1),
        upper=latents is not None,
        acceptance=torch.cat([one.acceptance for one in done]),
        step_sizes=torch.cat([one.step_sizes for one in done], 1),
        given=held,
    )


class Bracket(NamedTuple):
    """log p(x) of simulated rows from both sides."""

    lower: Annealed
    upper: Annealed

    @property
    def gap(self) -> Tensor:
        """Upper less lower estimate, ``(rows,)``: in expectation, at least the error of either."""
        return self.upper.log_evidence - self.lower.log_evidence


def bidirectional(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Mapping[str, Tensor],
    latents: Mapping[str, Tensor],
    *,
    progress: Callable[[float], None] = lambda done: None,
    given: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **options: object,
) -> Bracket:
    """Bidirectional Monte Carlo: forward and reverse chains of the same rows, which the model
    emitted (Grosse, Ghahramani & Adams 2015, arXiv:1511.02543; Grosse, Ancha & Roy 2016,
    arXiv:1606.02275).

    Args:
        columns: the rows, with covariates.
        latents: what they were emitted from, so that it is an exact draw from their posterior.
        given: values of global latents that they were emitted with; needed where there are such.
        options: of :func:`annealed_log_evidence`.

    Raises:
        NotAnnealable, ValueError: as :func:`annealed_log_evidence` does.
    """
    common = {"given": given, **options}
    lower = annealed_log_evidence(
        model,
        guide,
        columns,
        seed=seed,
        progress=lambda done: progress(done / 2),
        **common,  # pyright: ignore[reportArgumentType]
    )
    upper = annealed_log_evidence(
        model,
        guide,
        columns,
        latents=latents,
        step_sizes=lower.step_sizes,
        seed=seed + 1,
        progress=lambda done: progress((1 + done) / 2),
        **(common | {"given": lower.given}),  # pyright: ignore[reportArgumentType]
    )
    return Bracket(lower, upper)


def schedule(temperatures: int) -> list[float]:
    """``T + 1`` inverse temperatures from 0 to 1, on a sigmoid from -4 to 4 (Wu et al. 2017)."""
    ends = torch.linspace(-4, 4, temperatures + 1, dtype=torch.float64).sigmoid()
    return ((ends - ends[0]) / (ends[-1] - ends[0])).tolist()


class _Chains(NamedTuple):
    estimates: Tensor
    acceptance: Tensor
    step_sizes: Tensor


def _forward(hmc: Hmc, u: Tensor, betas: list[float], steps: Tensor) -> _Chains:
    state = hmc.state(u)
    total = torch.zeros_like(state.energies.joint)
    accepted = torch.zeros_like(total)
    for number, (before, beta) in enumerate(pairwise(betas)):
        total = total + _increment(state, beta - before)
        if number < len(steps):  # after the last temperature nothing is weighed any more
            state, probability = hmc.move(state, beta, steps[number])
            accepted += probability
    return _Chains(total, accepted.mean(0) / len(steps), steps)


def _reverse(hmc: Hmc, u: Tensor, betas: list[float], steps: Tensor) -> _Chains:
    """The forward chain's moves, each one reversible, in the opposite order."""
    state = hmc.state(u)
    total = torch.zeros_like(state.energies.joint)
    accepted = torch.zeros_like(total)
    for number in range(len(betas) - 1, 0, -1):
        total = total + _increment(state, betas[number] - betas[number - 1])
        if number > 1:
            state, probability = hmc.move(state, betas[number - 1], steps[number - 2])
            accepted += probability
    return _Chains(total, accepted.mean(0) / len(steps), steps)


def _increment(state: State, difference: float) -> Tensor:
    """What one temperature adds to a log weight; -inf where the model gives no probability."""
    ratio = state.energies.joint - state.energies.start
    return (difference * ratio).nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf)


def _adapted(hmc: Hmc, u: Tensor, betas: list[float]) -> Tensor:
    """Step sizes ``(temperatures - 1, rows)`` from a run along some of the temperatures."""
    state = hmc.state(u)
    moved = len(betas) - 2
    log_step = torch.full((u.shape[1],), math.log(0.5), dtype=u.dtype, device=u.device)
    visited = torch.linspace(0, moved - 1, _pilot(len(betas) - 1)).round().long()
    found: list[Tensor] = []
    for number in [int(visited[0])] * WARM_UP + visited.tolist():
        state, probability = hmc.move(state, betas[number + 1], log_step.exp())
        log_step = log_step + GAIN * (probability.mean(0) - TARGET).to(log_step)
        found.append(log_step)
    kept = torch.stack(found[WARM_UP:])
    # Between those visited, in a straight line.
    at = torch.arange(moved)
    right = torch.searchsorted(visited, at).clamp(1, max(1, len(visited) - 1))
    right = right.clamp(max=len(visited) - 1)
    left = (right - 1).clamp(min=0)
    span = (visited[right] - visited[left]).clamp(min=1)
    share = ((at - visited[left]) / span).to(kept).unsqueeze(1)
    return (kept[left] * (1 - share) + kept[right] * share).exp()


def _pilot(temperatures: int) -> int:
    """How many of the temperatures the preliminary run visits."""
    return min(temperatures - 1, max(20, temperatures // PILOT))


def _rows_at_once(density: Density, columns: Mapping[str, Tensor], chains: int, rows: int) -> int:
    """Rows whose chains fit into the cache together, or on a GPU, into a few hundred MiB."""
    few = {name: column[:2] for name, column in columns.items()}
    u = density.draw(few, 2)
    with OutputBytes() as made:
        density(u, few)
    # A backward pass makes about as much again.
    each = max(1, 2 * made.bytes // (u.shape[0] * u.shape[1]))
    memory = 8 * CACHED if u.is_cuda else CACHED
    return evenly(rows, max(1, memory // (each * chains)))


def _check(
    rows: int, temperatures: int, chains: int, leapfrog: int, step_sizes: Tensor | None
) -> None:
    if temperatures < 2 or min(chains, leapfrog) < 1:
        raise ValueError(
            f"temperatures={temperatures}, chains={chains}, leapfrog={leapfrog}: expected at least "
            "2 temperatures, and 1 of the others"
        )
    if step_sizes is not None and tuple(step_sizes.shape) != (temperatures - 1, rows):
        raise ValueError(
            f"step_sizes of shape {tuple(step_sizes.shape)}; expected (temperatures - 1, rows), "
            f"{(temperatures - 1, rows)}"
        )
