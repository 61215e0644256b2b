"""Imputation against the conditional of a Gaussian, which is known."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from benchmarks.conjugate import exact
from ppl_vae import zoo
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.auxiliary import ADGM
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.uses import impute

GAPS = torch.tensor([True, False, True, False, False])


@pytest.fixture
def model(float64):
    torch.manual_seed(3)
    return PPCA(2, 5, scale=0.7)


@pytest.fixture
def x(model):
    torch.manual_seed(4)
    return model.simulate(3)["x"]


def conditional(model, x, gaps=GAPS):
    """Mean ``(rows, missing)`` and covariance of x_missing given x_observed."""
    weight, loc, scale = (t.detach() for t in model._linear_map())
    full = weight @ weight.T + scale**2 * torch.eye(len(weight))
    inverse = full[~gaps][:, ~gaps].inverse()
    gain = full[gaps][:, ~gaps] @ inverse
    mean = loc[gaps] + (x[:, ~gaps] - loc[~gaps]) @ gain.T
    return mean, full[gaps][:, gaps] - gain @ full[~gaps][:, gaps]


def z_scores(model, x, found):
    """How far means and covariances are off, in standard errors of independent draws."""
    mean, covariance = conditional(model, x)
    drawn = found.draws[:, :, GAPS]
    sd = covariance.diagonal().sqrt()
    count = len(drawn)
    of_mean = (drawn.mean(0) - mean) / (sd / math.sqrt(count))
    centered = (drawn - mean) / sd
    products = centered.unsqueeze(-1) * centered.unsqueeze(-2)  # (draws, rows, missing, missing)
    wanted = covariance / sd[:, None] / sd
    of_covariance = (products.mean(0) - wanted) / (products.std(0) / math.sqrt(count))
    return torch.cat([of_mean.flatten(), of_covariance.flatten()]).abs()


MANY: dict[str, Any] = {"draws": 2000, "chains": 2000, "warmup": 40}


@pytest.mark.parametrize("method", ["gibbs", "metropolis"])
def test_with_the_exact_guide_draws_are_from_the_exact_conditional(model, x, method):
    found = impute(model, exact(model), x, GAPS, method=method, **MANY)
    assert z_scores(model, x, found).max() < 4
    assert torch.equal(found.draws[:, :, ~GAPS], x[:, ~GAPS].expand(2000, 3, 3))
    if method == "metropolis":
        assert found.acceptance is not None
        torch.testing.assert_close(found.acceptance, torch.ones(3))


def test_a_wrong_guide_misleads_gibbs_but_neither_metropolis_nor_resampling(model, x):
    guide = exact(model, shift=0.7, scale=1.3)
    assert z_scores(model, x, impute(model, guide, x, GAPS, method="gibbs", **MANY)).max() > 8
    corrected = impute(model, guide, x, GAPS, method="metropolis", **MANY)
    assert z_scores(model, x, corrected).max() < 4
    assert corrected.acceptance is not None
    assert (corrected.acceptance < 0.8).all()
    tried = impute(model, guide, x, GAPS, method="metropolis", tries=4, **MANY)
    assert z_scores(model, x, tried).max() < 4
    assert tried.acceptance is not None
    assert (tried.acceptance > corrected.acceptance).all()
    weighed = impute(model, guide, x, GAPS, method="resample", draws=500, samples=20_000, warmup=1)
    assert z_scores(model, x, weighed).max() < 4
    assert (weighed.ess < 10_000).all()
    assert weighed.pareto_k is not None
    assert (weighed.pareto_k < 1).all()


def test_all_of_x_missing_is_the_prior(model, x):
    found = impute(model, exact(model), x, torch.ones(5, dtype=torch.bool), **MANY)
    weight, loc, scale = (t.detach() for t in model._linear_map())
    sd = (weight.square().sum(1) + scale**2).sqrt()
    assert ((found.draws.mean(0) - loc) / sd * math.sqrt(2000)).abs().max() < 4


def test_long_chains_agree_with_many_and_tell_how_many_draws_they_are_worth(model, x):
    found = impute(model, exact(model), x, GAPS, draws=1000, chains=4, warmup=20)
    mean, covariance = conditional(model, x)
    error = (found.draws[:, :, GAPS].mean(2).mean(0) - mean.mean(1)) / (
        covariance.mean().sqrt() / found.ess.sqrt()
    )
    assert error.abs().max() < 4
    assert found.r_hat is not None
    assert (found.r_hat < 1.05).all()
    assert (found.ess < 1000).all()


def test_sites_after_x_have_their_say(program, float64):
    """z -> x -> t with t observed: only Metropolis knows what t says of the missing x."""

    def story(self, x, t):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)
        return pyro.sample("t", dist.Normal(x.sum(-1, keepdim=True), 0.5).to_event(1), obs=t)

    class Chain(program):
        def forward(self, x=None, t=None, *, n=None, total=None):
            with self.rows(x, t, n=n, total=total):
                return story(self, x, t)

    model = Chain(None)
    guide = Factorized(z=(Wide(), ["x"]))
    x, t = torch.tensor([[0.3, 0.0]]), torch.tensor([[2.0]])
    gaps = torch.tensor([False, True])
    found = impute(model, guide, {"x": x, "t": t}, gaps, **MANY | {"warmup": 80})
    # (x1, x2, t) given z integrated out: a Gaussian.
    full = torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [3.0, 3.0, 6.25]])
    seen = torch.tensor([0, 2])
    inverse = full[seen][:, seen].inverse()
    mean = full[1, seen] @ inverse @ torch.tensor([0.3, 2.0])
    variance = full[1, 1] - full[1, seen] @ inverse @ full[seen, 1]
    drawn = found.draws[:, 0, 1]
    assert abs(drawn.mean() - mean) < 4 * (variance / 2000).sqrt()
    assert abs(drawn.var() - variance) < 4 * variance * math.sqrt(2 / 2000)


class Wide(nn.Module):
    def forward(self, x):
        return dist.Normal(x.mean(-1, keepdim=True) / 2, 1.0).to_event(1)


def test_an_enumerated_class_is_drawn_from_its_posterior(program, float64):
    """A mixture whose class the model sums out: bits given other bits by Bayes' rule."""
    p = torch.tensor([[0.9, 0.8, 0.9], [0.2, 0.1, 0.1]])

    def story(self, x):
        c = pyro.sample(
            "c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"}
        )
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        logits = p.logit()[c] + z
        return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    model = program(story)
    guide = Factorized(z=(Wide(), ["x"]))
    x, gaps = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([False, False, True])
    grid = torch.linspace(-8, 8, 4001)
    # (class, z, entries)
    on = (p.logit().unsqueeze(1) + grid[:, None]).sigmoid()
    weight = dist.Normal(0.0, 1.0).log_prob(grid).exp() * torch.tensor([[0.3], [0.7]])
    weight = weight * on[..., 0] * (1 - on[..., 1])
    wanted = float((weight * on[..., 2]).sum() / weight.sum())
    for method in ("metropolis", "resample"):
        found = impute(model, guide, x, gaps, method=method, samples=4000, **MANY)
        error = math.sqrt(wanted * (1 - wanted) / 2000)
        assert abs(float(found.draws[:, 0, 2].mean()) - wanted) < 4 * error
        assert set(found.draws.unique().tolist()) <= {0.0, 1.0}


def test_a_whole_event_can_be_missing_where_its_entries_depend_on_each_other(program, float64):
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def story(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.MultivariateNormal(z, covariance), obs=x)

    model = program(story)
    x = torch.zeros(2, 2)
    gaps = torch.tensor([[True, True], [False, False]])
    found = impute(model, Prior(model), x, gaps, **MANY)
    torch.testing.assert_close(
        found.draws[:, 0].T.cov(), covariance + torch.eye(2), atol=0.2, rtol=0
    )
    assert not found.draws[:, 1].any()
    with pytest.raises(ValueError, match="not independent given the latents"):
        impute(model, Prior(model), x, torch.tensor([True, False]))


@pytest.mark.parametrize("name", zoo.models())
def test_every_model_of_the_zoo_can_be_imputed(name, float64):
    torch.manual_seed(0)
    model = zoo.models()[name].toy()
    columns = model.observed(model.simulate(4, **model.example_covariates(4)))
    gaps = torch.zeros(columns["x"].shape, dtype=torch.bool)
    gaps[1:, :2] = True
    for method in ("metropolis", "gibbs", "resample"):
        found = impute(
            model, Prior(model), columns, gaps, method=method, draws=8, samples=20, warmup=2
        )
        assert found.draws.shape == (8, *gaps.shape)
        assert torch.equal(found.draws[:, 0], columns["x"][0].expand(8, *gaps.shape[1:]))
        assert model.training


def test_a_model_with_a_latent_after_x_runs(float64):
    model = ADGM.toy()
    torch.manual_seed(0)
    x = model.simulate(4)["x"]
    guide = MeanField(model, MLP(6, 8, 7), x=x)
    found = impute(model, guide, x, torch.arange(6) < 2, draws=8, warmup=3)
    assert found.draws.shape == (8, 4, 6)
    assert model.training


def test_repeatable_leaves_the_random_state_and_hides_what_is_missing(model, x):
    holes = torch.where(GAPS, torch.nan, x)
    state = torch.get_rng_state()
    one = impute(model, exact(model), holes, GAPS, draws=8, start=x.mean(0))
    assert torch.equal(state, torch.get_rng_state())
    two = impute(model, exact(model), x, GAPS, draws=8, start=x.mean(0))
    assert torch.equal(one.draws, two.draws)
    assert one.mean.shape == x.shape
    assert torch.equal(one.mean[:, ~GAPS], x[:, ~GAPS])


def test_a_latent_drawn_through_an_auxiliary_site_is_refused(model, x, program):
    def story(self, x):
        u = pyro.sample(
            "z_unconstrained",
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            infer={"is_auxiliary": True},
        )
        pyro.sample("z", dist.Delta(u, event_dim=1))

    with pytest.raises(ValueError, match="draws 'z' through 'z_unconstrained'"):
        impute(model, program(story), x, GAPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guess"}, "expected one of"),
        ({"draws": 0}, "draws is too small"),
        ({"tries": 0}, "tries is too small"),
        ({"missing": GAPS.double()}, "expected bool"),
        ({"missing": GAPS[:2]}, "missing has shape"),
        ({"missing": ~GAPS & GAPS}, "nothing to impute"),
        ({"start": torch.zeros(2)}, "start has shape"),
        ({"site": "y"}, "has no observable 'y'"),
        ({"missing": ~GAPS}, "nan or inf"),
    ],
)
def test_what_is_refused(model, x, change, message):
    holes = torch.where(GAPS, torch.nan, x)
    with pytest.raises(ValueError, match=message):
        impute(model, exact(model), holes, **{"missing": GAPS} | change)
