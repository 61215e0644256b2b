"""Exact guides are exact, and faulty ones wrong as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.conjugate import (
    BetaBinomial,
    Clusters,
    GammaPoisson,
    GaussianPosterior,
    SignedHalfNormal,
    TwoModes,
    exact,
)
from ppl_vae.models.ppca import PPCA
from ppl_vae.sites import check_pair, paired_traces

MODELS = {
    "ppca": lambda: PPCA(3, 5, 0.7),
    "gamma-poisson": GammaPoisson,
    "beta-binomial": BetaBinomial,
    "two modes": TwoModes,
    "clusters": Clusters,
}


def log_weights(model, guide, x, draws=4):
    """log p(x, z) - log q(z | x), ``(draws, rows)``."""
    found = []
    for _ in range(draws):
        with torch.no_grad():
            p, q = paired_traces(model, guide, x)
        totals = []
        for trace in (p, q):
            trace.compute_log_prob()
            nodes = (n for name, n in trace.nodes.items() if "log_prob" in n and name != "data")
            totals.append(sum(node["log_prob"] for node in nodes))
        found.append(totals[0] - totals[1])
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_an_exact_guide_are_the_evidence_for_every_draw(name, float64) -> None:
    model = MODELS[name]()
    x = model.simulate(20)["x"]
    guide = exact(model)
    check_pair(model, guide, x)
    weights = log_weights(model, guide, x)
    torch.testing.assert_close(weights, weights[:1].expand_as(weights))


def test_evidence_of_counts_is_negative_binomial(float64) -> None:
    model = GammaPoisson(latents=2, counts=1, concentration=2.0, rate=0.5)
    x = model.simulate(10)["x"]
    expected = scipy.stats.nbinom(2.0, 0.5 / 1.5).logpmf(x.numpy()).sum(1)
    assert log_weights(model, exact(model), x, 1)[0].numpy() == pytest.approx(expected)


def test_evidence_of_successes_is_beta_binomial(float64) -> None:
    model = BetaBinomial(latents=2, trials=5, concentrations=(2.0, 1.0))
    x = model.simulate(10)["x"]
    expected = scipy.stats.betabinom(5, 2.0, 1.0).logpmf(x.numpy()).sum(1)
    assert log_weights(model, exact(model), x, 1)[0].numpy() == pytest.approx(expected)


@pytest.mark.parametrize("loc", [-3.0, 0.0, 2.0])
def test_draws_of_a_signed_half_normal_have_its_density(loc, float64) -> None:
    scale = 0.7
    q = SignedHalfNormal(torch.tensor(loc), torch.tensor(scale))
    draws = q.sample((4000,)).numpy()
    half = scipy.stats.truncnorm(-loc / scale, math.inf, loc=loc, scale=scale)
    assert scipy.stats.kstest(np.abs(draws), half.cdf).pvalue > 0.001
    assert scipy.stats.binomtest(int((draws > 0).sum()), 4000).pvalue > 0.001
    grid = torch.linspace(-6, 6, 20001)
    assert torch.trapezoid(q.log_prob(grid).exp(), grid).item() == pytest.approx(1, abs=1e-3)
    one = SignedHalfNormal(torch.tensor(loc), torch.tensor(scale), modes=1)
    assert one.sample((100,)).min() >= 0
    assert one.log_prob(torch.tensor(-1.0)) == -math.inf


def test_a_guide_that_sees_part_of_x_is_exact_given_that(float64) -> None:
    model = PPCA(2, 4, 0.7)
    x = model.simulate(3)["x"]
    weight, mean = model.likelihood.net.weight[:2], model.likelihood.net.bias[:2]
    covariance = weight @ weight.T + 0.49 * torch.eye(2)
    gain = weight.T @ covariance.inverse()
    q = GaussianPosterior(model, seen=2)(x)
    torch.testing.assert_close(q.mean, (x[:, :2] - mean) @ gain.T)
    expected = torch.eye(2) - gain @ weight
    torch.testing.assert_close(q.covariance_matrix, expected.expand(3, 2, 2))


def test_faults_of_a_normal_posterior(float64) -> None:
    model = PPCA(2, 4, 0.7)
    x = model.simulate(3)["x"]
    right = model.posterior(x)
    sd = right.variance.sqrt()
    torch.testing.assert_close(GaussianPosterior(model, shift=0.3)(x).mean, right.mean + 0.3 * sd)
    scaled = GaussianPosterior(model, scale=0.5)(x)
    torch.testing.assert_close(scaled.covariance_matrix, right.covariance_matrix / 4)
    by_row = GaussianPosterior(model, scale=lambda x: x[:, 0].exp())(x)
    torch.testing.assert_close(by_row.variance.sqrt(), sd * x[:, :1].exp())
    apart = GaussianPosterior(model, independent=True)(x)
    torch.testing.assert_close(apart.covariance_matrix, right.variance.diag_embed())
    turned = GaussianPosterior(model, rotation=math.pi / 2)(x)
    torch.testing.assert_close(turned.mean, right.mean.flip(1) * torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(turned.variance, right.variance.flip(1))


def test_faults_keep_the_mean_of_bounded_posteriors(float64) -> None:
    for model in (GammaPoisson(), BetaBinomial()):
        x = model.simulate(4)["x"]
        right = model.posterior(x)
        wrong = exact(model, scale=0.5).posterior(x).base_dist
        torch.testing.assert_close(wrong.mean, right.mean)
        assert (wrong.variance < 0.5 * right.variance).all()
    sure = exact(Clusters(), sharpness=3.0).posterior(torch.zeros(1, 2)).probs
    assert sure.max() > exact(Clusters()).posterior(torch.zeros(1, 2)).probs.max()
