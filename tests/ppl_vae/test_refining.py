"""Refining q a row at a time, against linear-Gaussian models whose best q is known."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from benchmarks.conjugate import GammaPoisson
from ppl_vae import refining
from ppl_vae.assignments import Assignments
from ppl_vae.conditionals import Normal
from ppl_vae.density import Density
from ppl_vae.guide import Factorized
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.guides.semi_amortized import SemiAmortized
from ppl_vae.guides.top_down import TopDown
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.refining import Climber, climb, scored
from ppl_vae.row_wise import Freed, FullRankRows, moments
from ppl_vae.sites import evaluating


class Asis(nn.Module):
    """An encoder whose features are the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def freed(model: Any, guide: Any, x: Tensor) -> Freed:
    assignments = Assignments(model, guide, {"x": x[:2]})
    return Freed(model, guide, {"x": x}, given={}, assignments=assignments)


def refined(q: Any, x: Tensor, how: Climber, samples: int = 2000) -> Tensor:
    climb(q, {"x": x}, how)
    return scored(q, {"x": x}, samples).elbo.mean(0)


def best_mean_field(model: PPCA, x: Tensor) -> Tensor:
    """The largest ELBO of a diagonal normal: log p(x) less KL(q || p(z | x)), which at the optimum
    is half of (sum of log diag(P) - log det P), P the posterior's precision."""
    precision = model.posterior(x).precision_matrix
    diagonal = precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return model.evidence(x) - 0.5 * (diagonal - precision.logdet())


FAST = Climber(steps=250, draws=16, learning_rate=0.1, compile=False)


@pytest.fixture
def linear(float64):
    model = PPCA(2, 5, scale=0.6)
    model.requires_grad_(False)
    with torch.no_grad():
        model.likelihood.net.weight[:, 1] += model.likelihood.net.weight[:, 0]  # correlated
    return model, model.simulate(7)["x"]


@pytest.mark.parametrize("family", [MeanField, pytest.param(SemiAmortized, marks=pytest.mark.slow)])
def test_a_mean_field_guide_reaches_the_best_one(linear, family) -> None:
    model, x = linear
    guide = family(model, MLP(5, 8, 3), x)  # random: far from the best
    with evaluating(0, model, guide):
        before = scored(freed(model, guide, x), {"x": x}, 500).elbo.mean(0)
        how = Climber(steps=120, draws=8, learning_rate=0.1, compile=False)
        found = refined(freed(model, guide, x), x, how)
    best = best_mean_field(model, x)
    assert (before < best - 0.05).all()
    torch.testing.assert_close(found, best, rtol=0, atol=0.06)


def test_a_conditional_written_out_reaches_the_best_mean_field(linear) -> None:
    model, x = linear
    guide = Factorized(z=(Normal(nn.Linear(5, 4)), ["x"]))
    with evaluating(0, model, guide):
        found = refined(freed(model, guide, x), x, FAST)
    torch.testing.assert_close(found, best_mean_field(model, x), rtol=0, atol=0.06)


@pytest.mark.parametrize("family", [FullRank, TopDown])
def test_families_that_hold_the_posterior_reach_the_evidence(linear, family) -> None:
    model, x = linear
    if family is TopDown:  # of which the mean field is the best
        model.likelihood.net.weight[:, 1] = model.likelihood.net.weight[:, 0].flip(0)
        best = best_mean_field(model, x)
    else:
        best = model.evidence(x)
    guide = family(model, MLP(5, 8, 2), x)
    with evaluating(0, model, guide):
        found = refined(freed(model, guide, x), x, FAST)
    torch.testing.assert_close(found, best, rtol=0, atol=0.06)


def test_all_covariances_reach_the_evidence_without_noise(linear) -> None:
    model, x = linear
    guide = MeanField(model, MLP(5, 8, 3), x)
    columns = {"x": x}
    with evaluating(0, model, guide):
        density = Density(model, guide, columns, start="prior", given={})
        q = freed(model, guide, x)
        start = density.coordinates(columns, q.draw(columns, 100))
        rank = FullRankRows(density, start)
        climb(rank, columns, Climber(steps=600, draws=8, learning_rate=0.1, compile=False))
        scores = scored(rank, columns, 50)
    # Each single draw has the evidence as its ELBO: q is the posterior.
    expected = model.evidence(x).expand(50, -1)
    torch.testing.assert_close(scores.elbo, expected, rtol=0, atol=2e-2)


def test_a_bounded_latent_reaches_the_best_lognormals(float64) -> None:
    """Of Gamma(a, b), the nearest lognormal has s^2 = 1 / a and m = log(a / b) - 1 / (2 a), where
    the gradient of KL(q || p) = a log(1 / b) + log Gamma(a) - a m + a - log(2 pi e s^2) / 2 is 0.
    Entries are independent, so that covariances bring nothing."""
    model = GammaPoisson(latents=2)
    x = model.simulate(6)["x"]
    guide = MeanField(model, MLP(x.shape[-1], 8, 4), x)
    columns = {"x": x}
    with evaluating(0, model, guide):
        q = freed(model, guide, x)
        family = refined(q, x, FAST)
        density = Density(model, guide, columns, start="prior", given={})
        start = density.coordinates(columns, q.draw(columns, 200))
        rank = refined(FullRankRows(density, start), x, FAST)
    posterior = model.posterior(x)
    z = posterior.mean
    a, b = posterior.concentration, posterior.rate
    evidence = (
        model.z_dist().log_prob(z) + model.x_dist(z).log_prob(x) - posterior.log_prob(z).sum(-1)
    )
    m = (a / b).log() - 0.5 / a
    kl = -a * b.log() + a.lgamma() - a * m + a - 0.5 * (2 * math.pi * math.e / a).log()
    for found in (family, rank):
        torch.testing.assert_close(found, evidence - kl.sum(-1), rtol=0, atol=0.05)


def test_offsets_of_zero_are_the_guide(linear) -> None:
    model, x = linear
    guide = MeanField(model, MLP(5, 8, 3), x)
    with evaluating(0, model, guide):
        q = freed(model, guide, x)
        assert [tuple(own.shape) for own in q.free] == [(7, 3), (7, 4)]  # features, head
        torch.manual_seed(1)
        found = q.scores({"x": x}, q.free, 3).elbo
        torch.manual_seed(1)
        z = guide.posterior(x).rsample((3,))
        by_hand = (
            dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            + model.x_dist(z).log_prob(x)
            - guide.posterior(x).log_prob(z)
        )
    torch.testing.assert_close(found, by_hand)


def test_hooks_are_gone_and_a_row_knows_only_itself(linear) -> None:
    model, x = linear
    guide = MeanField(model, MLP(5, 8, 3), x)
    how = Climber(steps=1, draws=2, learning_rate=0.1, compile=False)
    with evaluating(0, model, guide):
        q = freed(model, guide, x)
        climb(q, {"x": x}, how)
        assert all((own.abs() > 0).all() for own in q.free)
        weight = torch.zeros(7)
        weight[2] = 1.0
        with torch.enable_grad():
            free = [torch.zeros_like(own).requires_grad_() for own in q.free]
            elbo = q.scores({"x": x}, free, 2).elbo.mean(0)
            gradients = torch.autograd.grad((elbo * weight).sum(), free)
    for gradient in gradients:
        assert (gradient[torch.arange(7) != 2] == 0).all()
        assert (gradient[2] != 0).any()
    assert not any(module._forward_hooks for module in guide.modules())


def test_blocks_of_rows_give_what_all_rows_together_do(linear, monkeypatch) -> None:
    model, x = linear
    guide = MeanField(model, MLP(5, 8, 3), x)
    how = Climber(steps=100, draws=8, learning_rate=0.1, compile=False)
    with evaluating(0, model, guide):
        q = freed(model, guide, x)
        monkeypatch.setattr(refining, "_bytes_of_row", lambda *_: refining.CACHED // (3 * 24))
        steps = climb(q, {"x": x}, how)  # blocks of three rows, of which the last one overlaps
        monkeypatch.setattr(refining, "_bytes_of_row", lambda *_: refining.CACHED // 1000)
        found = scored(q, {"x": x}, 2000).elbo.mean(0)  # two parts of the draws
        monkeypatch.undo()
        torch.testing.assert_close(found, scored(q, {"x": x}, 2000).elbo.mean(0), rtol=0, atol=0.2)
    assert steps.shape == (100, 7)
    torch.testing.assert_close(found, best_mean_field(model, x), rtol=0, atol=0.2)


def test_moments_of_draws(float64) -> None:
    covariance = torch.tensor([[4.0, 3.0], [3.0, 9.0]])
    u = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), covariance).sample((20000, 1))
    loc, scale = moments(u)
    torch.testing.assert_close(loc, torch.tensor([[1.0, -2.0]]), rtol=0, atol=0.08)
    torch.testing.assert_close((scale @ scale.mT)[0], covariance, rtol=0, atol=0.25)
    _, scale = moments(torch.randn(200, 3, 4))
    assert (scale.tril(-1).abs() > 0).double().mean() < 0.05  # noise is no correlation


@pytest.mark.parametrize(
    "fault", [{"steps": 0}, {"draws": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}]
)
def test_refuses_settings(fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 step"):
        Climber(**fault)
