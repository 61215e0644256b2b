"""The aggregate posterior of a guide: its draws for many rows, and what they tell of the rows."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.checks.fixed_latents import FixedLatents
from ppl_vae.draws import particles, rows_at_once
from ppl_vae.importance import parts
from ppl_vae.model import own_parameters, sample_nodes


class MutualInformation(NamedTuple):
    """Bounds of I(n; z), z ~ q(z | x_n), n any of many rows; nats.

    Attributes:
        lower: at most log N for N rows.
        upper: above it.
        se: standard error of either, over rows, about.
    """

    lower: float
    upper: float
    se: float


def log_q_of_all(pair: FixedLatents, sites: Collection[str]) -> Tensor:
    """log q(z_n | x_m), summed over local ``sites``, of each row's draw for each row: ``(n, m)``;
    given the global latents with which all were drawn.

    Raises:
        NotImplementedError: the guide scores its own draws only.
    """
    rows = pair.rows
    local = {name: z for name, z in pair.latents.items() if name in pair.row_dims}
    width = sum(z.numel() for z in local.values()) // rows
    # As a plate of particles leaves a global value: one for all draws and rows.
    shared = {name: z[None, None] for name, z in pair.latents.items() if name not in local}
    log_q = torch.zeros(rows, rows, dtype=torch.float64)
    for part in parts(rows, max(1, rows_at_once(width) // rows)):
        draws = part.stop - part.start
        given = {n: z[part].unsqueeze(1).expand(draws, *z.shape) for n, z in local.items()}
        conditioned = poutine.condition(pair.guide, data=shared | given)
        with own_parameters(pair.model, pair.guide):
            trace = poutine.trace(particles(draws, 1)(conditioned)).get_trace(**pair.columns)
        for name, node in sample_nodes(trace):
            if name in sites:
                log_q[part] += node["fn"].log_prob(node["value"]).double().cpu()
    return log_q


def mutual_information(log_q: Tensor) -> MutualInformation:
    """Bounds of how many nats a draw tells of its row, from ``(n, m)`` log-densities.

    The average of log q(z_n | x_n) less the log of the mean density for all rows, or for the others
    alone: Hoffman & Johnson 2016 ("ELBO surgery"), with the bounds of Poole et al. 2019
    (arXiv:1905.06922), eqs. 12 and 13.
    """
    rows = len(log_q)
    own = log_q.diagonal()
    lower = own - (log_q.logsumexp(1) - math.log(rows))
    others = log_q.masked_fill(torch.eye(rows, dtype=torch.bool), -torch.inf)
    upper = own - (others.logsumexp(1) - math.log(rows - 1))
    error = float(lower.std() / math.sqrt(rows))
    return MutualInformation(float(lower.mean()), float(upper.mean()), error)
