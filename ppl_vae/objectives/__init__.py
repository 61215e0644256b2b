"""Objectives: what SVI maximizes; schedules of the KL weight.

Any ``pyro.infer.ELBO`` is one. Those of :class:`RowObjective` are computed from each row's
log-probabilities, and differ in what they make of them:

- KL weighted or bounded: :class:`Beta`, :class:`Capacity`, :class:`FreeBits`;
- tighter bounds and gradients of less variance: :class:`IWAE`, :class:`DReG`,
  :class:`StickingTheLanding`;
- of discrete draws: :class:`VIMCO`, :class:`LeaveOneOut`, :class:`ReweightedWakeSleep`;
- labels given in part: :class:`SemiSupervised`, with a classification term and penalties on the
  classifier;
- the aggregate posterior regularized: :class:`BetaTC`, :class:`FactorVAE`, :class:`DIPVAE`,
  :class:`InfoVAE`.
"""

from ppl_vae.objectives.aggregate import DIPVAE, BetaTC, FactorVAE, InfoVAE
from ppl_vae.objectives.elbo import EnumeratedELBO, plain_elbo
from ppl_vae.objectives.evolving import Evolving
from ppl_vae.objectives.importance_weighted import IWAE, DReG, StickingTheLanding
from ppl_vae.objectives.objective import Objective, Terms, backward
from ppl_vae.objectives.penalties import MutualInformation, Penalty, VirtualAdversarial
from ppl_vae.objectives.reweighted import ReweightedWakeSleep
from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.objectives.schedules import CyclicalWarmup, LinearWarmup, Schedule
from ppl_vae.objectives.score_function import VIMCO, LeaveOneOut
from ppl_vae.objectives.semi_supervised import SemiSupervised
from ppl_vae.objectives.weighted import Beta, Capacity, FreeBits

__all__ = [
    "DIPVAE",
    "IWAE",
    "VIMCO",
    "Beta",
    "BetaTC",
    "Capacity",
    "CyclicalWarmup",
    "DReG",
    "EnumeratedELBO",
    "Evolving",
    "FactorVAE",
    "FreeBits",
    "InfoVAE",
    "LeaveOneOut",
    "LinearWarmup",
    "MutualInformation",
    "Objective",
    "Penalty",
    "ReweightedWakeSleep",
    "RowObjective",
    "RowTerms",
    "Schedule",
    "SemiSupervised",
    "StickingTheLanding",
    "Terms",
    "VirtualAdversarial",
    "backward",
    "plain_elbo",
]
