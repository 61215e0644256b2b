"""Markov chains over the missing entries of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae.uses.pairs import Pair, entrywise_law, repeated


class Sweeps:
    """Chains of some rows, all moving together: see :func:`ppl_vae.uses.impute`.

    Args:
        columns: where an entry is missing, its first value.
        copies: how many chains of each row.
        tries: proposals of a corrected sweep.

    Attributes:
        correct: whether the guide's proposals are weighed; at first they are taken as they come.
        columns: of all chains, ``(copies * rows, event)``.
    """

    def __init__(
        self, pair: Pair, columns: Mapping[str, Tensor], gaps: Tensor, copies: int, tries: int = 1
    ) -> None:
        self._pair, self.copies, self._tries, self.correct = pair, copies, tries, False
        self.columns = repeated(columns, copies)
        self.gaps = gaps.repeat(copies, *(1,) * (gaps.dim() - 1))
        # A start may lie off the support; from here on, what is missing is what the model emits.
        state = pair.draw(self.columns)
        self._latents = state.values
        self.columns = self.filled(state.emitted.sample())

    def move(self) -> Tensor:
        """One sweep. Whether its proposals were accepted, ``(copies * rows,)``."""
        if not self.correct:
            proposed = self._pair.draw(self.columns)
            self._latents = proposed.values
            self.columns = self.filled(proposed.emitted.sample())
            return torch.ones_like(proposed.log_q, dtype=torch.bool)
        moved = self._choose()
        emitted = self._pair.emitted(self.columns, self._latents)
        before, self.columns = self.columns, self.filled(emitted.sample())
        if self._pair.after:
            self._accept_entries(before, emitted)
        return moved

    def _choose(self) -> Tensor:
        """Latents anew, given whole rows. Whether they are others, ``(copies * rows,)``."""
        current = self._pair.at(self.columns, self._latents)
        moved = torch.zeros_like(current.log_q, dtype=torch.bool)
        total = current.log_weight
        for _ in range(self._tries):
            proposed = self._pair.draw(self.columns)
            if self._tries > 1:  # of all so far, one in proportion to its weight
                total = torch.logaddexp(total, proposed.log_weight)
            accepted = _accept(proposed.log_weight - total)
            self._latents = {
                name: _where(accepted, proposed.values[name], value)
                for name, value in self._latents.items()
            }
            moved = moved | accepted
        return moved

    def _accept_entries(self, before: Mapping[str, Tensor], emitted: Any) -> None:
        """Entries were drawn from p(x | z); what comes after x has a say too."""
        site = self._pair.site

        def rest(columns: Mapping[str, Tensor]) -> Tensor:
            joint = self._pair.log_joint(columns, self._latents)
            return joint - log_missing(emitted, columns[site], self.gaps)

        kept = _accept(rest(self.columns) - rest(before))
        self.columns[site] = _where(kept, self.columns[site], before[site])

    def filled(self, drawn: Tensor) -> dict[str, Tensor]:
        """The rows with these values where they are missing."""
        site = self._pair.site
        return self.columns | {site: torch.where(self.gaps, drawn, self.columns[site])}

    def rows(self) -> Tensor:
        """The present state, ``(copies, rows, event)``."""
        return self.columns[self._pair.site].unflatten(0, (self.copies, -1))


def log_missing(fn: Any, x: Tensor, gaps: Tensor) -> Tensor:
    """Log-density of the missing entries of x given the latents, float64 ``(rows,)``."""
    law = entrywise_law(fn)
    if law is None:  # then rows miss all or none
        return torch.where(gaps.flatten(1).all(1), fn.log_prob(x).double(), 0.0)
    return torch.where(gaps, law.log_prob(x).double(), 0.0).flatten(1).sum(1)


def _accept(log_ratio: Tensor) -> Tensor:
    # Of nan, where neither side has a density, nothing is accepted.
    return torch.rand_like(log_ratio).log() < log_ratio


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *(1,) * (one.dim() - 1)), one, other)
