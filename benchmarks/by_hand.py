"""The losses written by hand in plain PyTorch: what the Pyro programs are held against.

Each maps nets and bits x ``(rows, D)`` to a pair ``(objective, loss)``: what is differentiated, and
the negative ELBO in nats of all rows. They estimate as Pyro's objectives do, from one draw a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.sizes import CLASSES

Loss = Callable[[nn.ModuleDict, Tensor], tuple[Tensor, Tensor]]


def vae(nets: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    z, log_q_over_p = _draw_against_standard_normal(nets["encoder"](x))
    loss = log_q_over_p.sum() + _bits_cost(nets["decoder"](z), x).sum()
    return loss, loss


def two_levels(nets: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = _loc_scale(nets["q_z1"](x))
    noise = torch.randn_like(loc)
    z1 = loc + scale * noise
    z2, log_q_over_p = _draw_against_standard_normal(nets["q_z2"](z1))
    prior_loc, prior_scale = _loc_scale(nets["p_z1"](z2))
    prior_noise = (z1 - prior_loc) / prior_scale
    kl_z1 = 0.5 * (prior_noise.square() - noise.square()) + prior_scale.log() - scale.log()
    loss = kl_z1.sum() + log_q_over_p.sum() + _bits_cost(nets["decoder"](z1), x).sum()
    return loss, loss


def m2(nets: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(x)
    log_q_y = F.log_softmax(nets["q_y"](x), -1)  # (rows, K)
    y = torch.eye(CLASSES, dtype=x.dtype, device=x.device)[:, None].expand(-1, rows, -1)
    x = x.expand(CLASSES, *x.shape)  # (K, rows, D)
    z, log_q_over_p = _draw_against_standard_normal(nets["q_z"](torch.cat([x, y], -1)))
    logits = nets["decoder"](torch.cat([y, z], -1))
    cost = log_q_over_p.sum(-1) + _bits_cost(logits, x).sum(-1)  # (K, rows)
    cost_y = log_q_y + math.log(CLASSES)
    loss = (log_q_y.exp() * (cost_y + cost.T)).sum()
    return loss, loss


def belief_net(nets: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    """NVIL (Mnih & Gregor 2014, arXiv:1402.0030, eq. 9), with a baseline that is fit by squares."""
    q_logits = nets["encoder"](x)
    z = torch.bernoulli(q_logits.detach().sigmoid())
    log_q = -_bits_cost(q_logits, z).sum(-1)  # (rows,)
    reconstruction = _bits_cost(nets["decoder"](z), x).sum(-1)
    log_p_z = z.shape[-1] * math.log(0.5)
    elbo = (log_p_z - log_q - reconstruction).detach()
    baseline = nets["baseline"](x).squeeze(-1)
    score = log_q * (elbo - baseline.detach())
    objective = (reconstruction - score + (elbo - baseline).square()).sum()
    return objective, -elbo.sum()


LOSSES: dict[str, Loss] = {
    "vae": vae,
    "two-level": two_levels,
    "m2": m2,
    "belief-net": belief_net,
}
"""By ``Size.program``."""


class ByHand(nn.Module):
    """One of the losses as a module: bits ``(rows, D)`` to ``(objective, loss)``."""

    def __init__(self, program: str, nets: nn.ModuleDict) -> None:
        super().__init__()
        self.loss = LOSSES[program]
        self.nets = nets

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.nets, x)


def _loc_scale(parameters: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = parameters.chunk(2, -1)
    return loc, F.softplus(scale)


def _draw_against_standard_normal(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """A reparameterized draw z, and log q(z) - log p(z) of each latent, p standard normal."""
    loc, scale = _loc_scale(parameters)
    noise = torch.randn_like(loc)
    z = loc + scale * noise
    return z, 0.5 * (z.square() - noise.square()) - scale.log()


def _bits_cost(logits: Tensor, bits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, bits, reduction="none")
