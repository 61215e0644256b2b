"""Importance weights against closed forms: the evidence, and tails of a known shape."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae.evaluation import evaluate
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.sites import evaluating
from ppl_vae.weights import bound, effective_samples, log_weights, pareto_smoothed


class By(nn.Module):
    """A conditional written as a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *context: Any) -> Any:
        return self.function(*context)


@pytest.fixture
def linear(float64):
    model = PPCA(2, 5, scale=0.7)
    return model, model.simulate(12)["x"]


def test_with_the_exact_posterior_every_weight_is_the_evidence(linear):
    model, x = linear
    guide = Factorized(z=(By(model.posterior), ["x"]))
    with evaluating(0, model, guide):
        weights = log_weights(model, guide, {"x": x}, samples=50)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, model.evidence(x).detach().expand(50, 12))
    smoothed = pareto_smoothed(weights)
    torch.testing.assert_close(smoothed.log_evidence, model.evidence(x).detach())
    assert (smoothed.pareto_k == -math.inf).all()
    torch.testing.assert_close(effective_samples(weights), torch.full((12,), 50.0))


def test_bounds_are_those_of_an_evaluation(linear):
    """The same draws, however many parts they are made in."""
    model, x = linear
    guide = MeanField(model, MLP(5, 8, 8), x)
    with evaluating(3, model, guide):
        weights = log_weights(model, guide, {"x": x}, samples=40)
    result = evaluate(model, guide, {"train": x, "test": x}, samples=40, seed=3)
    assert bound(weights, 40).mean().item() == pytest.approx(-result.nll, rel=1e-12)
    assert bound(weights, 1).mean().item() == pytest.approx(result.elbo, rel=1e-12)


def test_enumerated_sites_are_summed_out(program, float64):
    loc = torch.tensor([-2.0, 0.0, 3.0])

    def story(self, x):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(loc[y], 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    model = program(story)
    x = model.simulate(30)["x"]
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Normal(loc, math.sqrt(1.25))
    ).log_prob(x)
    guide = Factorized(z=(By(lambda x: dist.Normal(x, 0.8)), ["x"]))
    with evaluating(0, model, guide):
        weights = log_weights(model, guide, {"x": x}, samples=4000)
    error = (weights - truth).exp().std(0) / math.sqrt(4000)
    assert ((weights - truth).exp().mean(0) - 1).abs().div(error).max() < 4


def test_a_global_latent_is_held_where_it_is_given(program, float64):
    model = program(
        lambda self, x: pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(self.w, 1.0)), 1.0), obs=x
        ),
        whole=lambda self: setattr(self, "w", pyro.sample("w", dist.Normal(0.0, 1.0))),
    )

    class Exact(nn.Module):
        def forward(self, x, total=None):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((w + x) / 2, math.sqrt(0.5)))

    x = torch.linspace(-2, 2, 7)
    with evaluating(0, model, Exact()):
        weights = log_weights(model, Exact(), {"x": x}, samples=9, given={"w": torch.tensor(1.5)})
    torch.testing.assert_close(weights, dist.Normal(1.5, math.sqrt(2.0)).log_prob(x).expand(9, 7))


@pytest.mark.parametrize("k", [-0.3, 0.3, 0.6, 1.0])
def test_pareto_k_is_the_shape_of_the_tail(k, float64):
    u = torch.rand(20_000, 8)
    weights = 1 + ((1 - u) ** -k - 1) / k  # the generalized Pareto law, from its quantiles
    found = pareto_smoothed(weights.log())
    # Its standard error in one row is about (1 + k) / sqrt(424), as many draws are in the tail.
    assert found.pareto_k.mean().item() == pytest.approx(k, abs=0.08)


def test_smoothing_estimates_the_mean_weight(float64):
    log_weights = 1.5 * torch.randn(4000, 50) - 100
    smoothed = pareto_smoothed(log_weights).log_evidence
    ratio = (smoothed + 100 - 1.5**2 / 2).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(50)
    assert not torch.equal(smoothed, bound(log_weights, 4000))
    torch.testing.assert_close(smoothed, bound(log_weights, 4000), atol=0.3, rtol=0)


def test_too_few_draws_have_no_pareto_k(float64):
    log_weights = torch.randn(20, 3)
    smoothed = pareto_smoothed(log_weights)
    assert smoothed.pareto_k.isnan().all()
    torch.testing.assert_close(smoothed.log_evidence, bound(log_weights, 20))


def test_bounds_by_hand(float64):
    weights = torch.tensor([[1.0], [3.0], [5.0], [7.0], [1000.0]])
    found = bound(weights.log(), 2)  # the fifth makes no group
    assert found.item() == pytest.approx((math.log(2) + math.log(6)) / 2)
    with pytest.raises(ValueError, match="draws=6: expected 1 to 5"):
        bound(weights, 6)


def test_effective_samples_by_hand(float64):
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(effective_samples(weights.log()), torch.tensor([16 / 6, 1.0]))
