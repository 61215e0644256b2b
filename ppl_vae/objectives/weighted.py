"""ELBOs whose KL is weighted, steered or bounded from below."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms


class Beta(RowObjective):
    """The ELBO with its KL times ``beta`` (Higgins et al. 2017, eq. 4).

        E_q log p(x | z) - beta KL(q(z | x) || p(z))

    A warm-up of ``fit`` multiplies beta. The KL of a latent outside the plate of rows is not
    weighted by beta.

    Raises:
        ValueError: beta below 0, or draws below 1.
    """

    def __init__(self, beta: float, draws: int = 1) -> None:
        super().__init__(draws)
        if not beta >= 0:
            raise ValueError(f"Beta({beta}): expected a weight of at least 0")
        self.beta = beta

    def loss_of(self, terms: RowTerms) -> Tensor:
        bound = terms.reconstruction - self.beta * terms.weighted_kl()
        return -terms.sum(bound) - terms.shared

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta, "draws": self.draws}


class Capacity(RowObjective):
    """The KL, held at a capacity that grows over training (Burgess et al. 2018, arXiv:1804.03599).

        E_q log p(x | z) - gamma |KL(q(z | x) || p(z)) - C|

    Equation 8 of the paper. C rises in a straight line from 0 to ``nats`` over ``epochs``, then
    stays; the KL is that of a row, the mean of its draws where it has no closed form. It replaces a
    warm-up.

    Args:
        nats: the last C.
        epochs: over which it is reached; 0 begins with it.
        gamma: weight of the distance.

    Raises:
        ValueError: a negative number, or draws below 1.
        PairError: when run, of masked latents.
    """

    def __init__(self, nats: float, epochs: float, gamma: float = 100.0, draws: int = 1) -> None:
        super().__init__(draws)
        if not (nats >= 0 and epochs >= 0 and gamma >= 0):
            raise ValueError(f"{self._called(nats, epochs, gamma)}: expected numbers of at least 0")
        self.nats, self.ends, self.gamma = nats, epochs, gamma
        # In a tensor, which a recorded step follows.
        self.state = nn.Module()
        self.state.register_buffer("capacity", torch.zeros(()))
        self.at(0.0)

    @property
    def capacity(self) -> Tensor:
        """C, in nats a row."""
        assert self.state is not None
        return self.state.get_buffer("capacity")

    def at(self, epoch: float) -> None:
        share = min(1.0, epoch / self.ends) if self.ends > 0 else 1.0
        self.capacity.fill_(self.nats * share)

    def loss_of(self, terms: RowTerms) -> Tensor:
        terms.refuse_masks("Capacity")
        distance = (terms.weighted_kl().mean(0) - self.capacity).abs()
        penalty = self.gamma * terms.sum(distance)
        return penalty - terms.sum(terms.reconstruction) - terms.shared

    def settings(self) -> dict[str, Any]:
        return {
            "nats": self.nats,
            "epochs": self.ends,
            "gamma": self.gamma,
            "draws": self.draws,
        }

    @staticmethod
    def _called(nats: float, epochs: float, gamma: float) -> str:
        return f"Capacity(nats={nats}, epochs={epochs}, gamma={gamma})"


class FreeBits(RowObjective):
    """The ELBO, whose KL counts as at least some nats in each group of latents.

        E_q log p(x | z) - sum_groups max(nats, mean over the batch of KL_group)

    A group is a coordinate ("latent": diagonal normals only), a site ("site"), or all latents of a
    row together ("all": a minimum of the whole KL). Source: Kingma et al. 2016 (arXiv:1606.04934),
    eq. 15. A warm-up multiplies what a group counts as.

    Raises:
        ValueError: another ``per``, negative nats, or draws below 1.
        PairError: when run, of masked latents; with "latent", of another family.
    """

    def __init__(
        self, nats: float, per: Literal["latent", "site", "all"] = "latent", draws: int = 1
    ) -> None:
        super().__init__(draws)
        if not nats >= 0 or per not in ("latent", "site", "all"):
            raise ValueError(
                f"FreeBits(nats={nats}, per={per!r}): expected nats of at least 0, and per of "
                "'latent', 'site' or 'all'"
            )
        self.nats, self.per = nats, per

    def loss_of(self, terms: RowTerms) -> Tensor:
        terms.refuse_masks("FreeBits")
        kl = self._of_all(terms) if self.per == "all" else self._of_each(terms)
        return terms.size * kl - terms.sum(terms.reconstruction) - terms.shared

    def _of_each(self, terms: RowTerms) -> Tensor:
        of_group = terms.kl_per_latent if self.per == "latent" else terms.kl
        floored = (
            terms.mean_weight(name) * terms.mean(of_group(name)).clamp(min=self.nats).sum()
            for name in terms.weights
        )
        return sum(floored, terms.reconstruction.new_zeros(()))

    def _of_all(self, terms: RowTerms) -> Tensor:
        kl = sum(map(terms.kl, terms.weights), torch.zeros_like(terms.reconstruction))
        weight = sum(map(terms.mean_weight, terms.weights), 0.0) / max(len(terms.weights), 1)
        free = terms.mean(kl) < self.nats
        return torch.where(free, weight * self.nats, terms.mean(terms.weighted_kl()))

    def settings(self) -> dict[str, Any]:
        return {"nats": self.nats, "per": self.per, "draws": self.draws}
