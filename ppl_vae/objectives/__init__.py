"""Objectives: what SVI maximizes; schedules of the KL weight.

Any ``pyro.infer.ELBO`` is one. Those of :class:`RowObjective` are computed from each row's
log-probabilities, and differ in what they make of them:

- KL weighted or bounded: :class:`Beta`, :class:`Capacity`, :class:`FreeBits`;
- tighter bounds and gradients of less variance: :class:`IWAE`, :class:`DReG`,
  :class:`StickingTheLanding`;
- the aggregate posterior regularized: :class:`BetaTC`, :class:`FactorVAE`, :class:`DIPVAE`,
  :class:`InfoVAE`.
"""

from ppl_vae.objectives.aggregate import DIPVAE, BetaTC, FactorVAE, InfoVAE
from ppl_vae.objectives.importance_weighted import IWAE, DReG, StickingTheLanding
from ppl_vae.objectives.objective import Objective, Terms, backward, plain_elbo
from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.objectives.schedules import CyclicalWarmup, LinearWarmup, Schedule
from ppl_vae.objectives.weighted import Beta, Capacity, FreeBits

__all__ = [
    "DIPVAE",
    "IWAE",
    "Beta",
    "BetaTC",
    "Capacity",
    "CyclicalWarmup",
    "DReG",
    "FactorVAE",
    "FreeBits",
    "InfoVAE",
    "LinearWarmup",
    "Objective",
    "RowObjective",
    "RowTerms",
    "Schedule",
    "StickingTheLanding",
    "Terms",
    "backward",
    "plain_elbo",
]
