"""Hierarchy with linear-Gaussian levels, whose joint is one normal, as oracle."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"z3": 2, "z2": 3, "z1": 1, "x": 4}  # in the order of drawing
SCALES = {"z3": 1.0, "z2": 0.8, "z1": 0.5, "x": 0.7}
N = 5

linked = pytest.mark.parametrize("skip", [False, True])


def linear(skip: bool) -> Hierarchy:
    sizes = list(SIZES.values())
    conditionals = [
        Gaussian(nn.Linear(sum(sizes[:k]) if skip else sizes[k - 1], sizes[k]), SCALES[name])
        for k, name in enumerate(SIZES)
        if k > 0
    ]
    return Hierarchy(StandardNormal(sizes[0]), conditionals[:-1], conditionals[-1], skip=skip)


def joint(model: Hierarchy) -> dist.MultivariateNormal:
    """Of all sites, one after the other: v = M v + c + noise, hence v = (I - M)^-1 (c + noise)."""
    total = sum(SIZES.values())
    weights, offset = torch.zeros(total, total), torch.zeros(total)
    start = SIZES["z3"]
    for name, conditional in zip(list(SIZES)[1:], [*model.levels, model.likelihood], strict=True):
        stop = start + SIZES[name]
        net = conditional.net
        weights[start:stop, start - net.in_features : start] = net.weight.detach()
        offset[start:stop] = net.bias.detach()
        start = stop
    solved = torch.linalg.inv(torch.eye(total) - weights)
    noise = torch.cat([torch.full((size,), SCALES[name]) for name, size in SIZES.items()])
    return dist.MultivariateNormal(solved @ offset, solved @ torch.diag(noise**2) @ solved.T)


class Exact(nn.Module):
    """p(site | others), from the joint: others as in ``given``, x first."""

    def __init__(self, normal: dist.MultivariateNormal, name: str, given: list[str]) -> None:
        super().__init__()
        sizes = list(SIZES.values())
        parts = dict(zip(SIZES, torch.arange(sum(sizes)).split(sizes), strict=True))
        own, others = parts[name], torch.cat([parts[other] for other in given])
        loc, cov = normal.loc, normal.covariance_matrix
        self.gain = torch.linalg.solve(cov[others][:, others], cov[others][:, own]).T
        self.covariance = cov[own][:, own] - self.gain @ cov[others][:, own]
        self.loc, self.others_loc = loc[own], loc[others]

    def forward(self, *given: Tensor) -> dist.MultivariateNormal:
        residual = torch.cat(given, -1) - self.others_loc
        return dist.MultivariateNormal(self.loc + residual @ self.gain.T, self.covariance)


@linked
def test_joint_density_is_that_of_the_linear_gaussian_graph(skip: bool) -> None:
    model = linear(skip)
    values = model.simulate(N)
    assert list(values) == list(SIZES)
    with own_parameters(model):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(n=N)
    expected = joint(model).log_prob(torch.cat(list(values.values()), -1))
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum())


@linked
def test_elbo_of_the_exact_posterior_is_the_evidence_for_each_draw(skip: bool) -> None:
    model = linear(skip)
    normal = joint(model)
    x = model.simulate(N)["x"]
    given = {"z3": ["x"], "z2": ["x", "z3"], "z1": ["x", "z3", "z2"]}
    guide = Factorized(**{name: (Exact(normal, name, g), g) for name, g in given.items()})
    own = slice(-SIZES["x"], None)
    evidence = dist.MultivariateNormal(normal.loc[own], normal.covariance_matrix[own, own])
    expected = -evidence.log_prob(x).sum().item()
    for seed in range(3):
        torch.manual_seed(seed)
        with own_parameters(model, guide):
            assert Trace_ELBO().loss(model, guide, x) == pytest.approx(expected, rel=1e-10)


def test_a_level_below_the_top_is_needed() -> None:
    with pytest.raises(ValueError, match="with a single level of latents it is a VAE"):
        Hierarchy(StandardNormal(2), [], Bernoulli(MLP(2, 3)))
