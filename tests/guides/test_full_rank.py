"""Full rank over several sites: the chain of conditionals is the joint normal."""

from __future__ import annotations

from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.conditionals import unconstrain
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.model import GenerativeModel, own_parameters, sample_nodes
from ppl_vae.nn import MLP


class Mixed(GenerativeModel):
    """Three latents on three supports, in a chain."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        zero = torch.zeros(2, dtype=torch.float64)
        with self.rows(x, n=n, total=total):
            a = pyro.sample("a", dist.Normal(zero, 1.0).to_event(1))
            b = pyro.sample("b", dist.Gamma(zero.exp() + a.abs(), 1.0).to_event(1))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
            return pyro.sample("x", dist.Normal(torch.cat([a + b, p], -1), 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls()


def correlated() -> tuple[FullRank, Tensor]:
    """A guide whose factor is not diagonal, and rows of data."""
    torch.manual_seed(0)
    model = Mixed.toy()
    x = model.simulate(4)["x"]
    guide = FullRank(model, MLP(5, 8, 6).double(), x).double()
    with torch.no_grad():
        guide.head.weight.normal_(std=0.3)
    return guide, x


def test_chain_of_sites_has_the_density_of_the_joint_normal() -> None:
    guide, x = correlated()
    with own_parameters(guide):
        trace = poutine.trace(guide).get_trace(x)
    loc, factor = guide.parameters_of(guide.encode({"x": x}))

    log_q = torch.zeros(4, dtype=torch.float64)
    u, jacobian = [], torch.zeros(4, dtype=torch.float64)
    for name, node in sample_nodes(trace):
        site = guide.local_sites[name]
        log_q = log_q + node["fn"].log_prob(node["value"])
        u.append(unconstrain(node["value"], site.support, site.event_shape))
        transform = torch.distributions.biject_to(site.support)
        moved = transform.inv(node["value"])
        jacobian = jacobian + transform.log_abs_det_jacobian(moved, node["value"])
    joint = dist.MultivariateNormal(loc, scale_tril=factor)
    torch.testing.assert_close(log_q, joint.log_prob(torch.cat(u, -1)) - jacobian)


def test_a_given_site_conditions_the_others() -> None:
    """q(b, p | a, x): locations move with a, as in the joint normal."""
    guide, x = correlated()
    loc, factor = guide.parameters_of(guide.encode({"x": x}))
    covariance = factor @ factor.mT
    a = torch.randn(4, 2, dtype=torch.float64)
    with own_parameters(guide):
        trace = poutine.trace(poutine.condition(guide, {"a": a})).get_trace(x)
    gain = covariance[:, 2:4, :2] @ torch.linalg.inv(covariance[:, :2, :2])
    expected = loc[:, 2:4] + (gain @ (a - loc[:, :2]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(trace.nodes["b"]["fn"].base_dist.loc, expected)
