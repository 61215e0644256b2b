"""Denoising against the conditional of a Gaussian, and of bits by trying all of them."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.conjugate import exact
from ppl_vae.guide import Prior
from ppl_vae.models.auxiliary import ADGM
from ppl_vae.models.ppca import PPCA
from ppl_vae.uses import denoise, denoising

SD = torch.tensor([0.5, 1.5, 0.5, 0.8, 0.3])
NOISES = {
    "closed form": lambda x: dist.Normal(x, SD),
    "entry by entry": lambda x: dist.Normal(x, SD).to_event(1),
    "jointly": lambda x: dist.MultivariateNormal(x, SD.square().diag_embed().to(x)),
}


@pytest.fixture
def model(float64):
    torch.manual_seed(3)
    return PPCA(2, 5, scale=0.4)


@pytest.fixture
def y(model):
    torch.manual_seed(4)
    x = model.simulate(4)["x"]
    return x + SD * torch.randn_like(x)


@pytest.mark.parametrize("way", NOISES)
def test_clean_rows_of_a_gaussian_follow_the_closed_form(model, y, way, monkeypatch):
    samples = 20_000 if way == "closed form" else 5000
    if way == "entry by entry":
        monkeypatch.setattr(denoising, "_conjugate", lambda *_: None)
    noise = NOISES[way]
    found = denoise(model, exact(model, scale=1.5), y, noise, draws=2000, samples=samples)
    weight, loc, scale = (t.detach() for t in model._linear_map())
    clean = weight @ weight.T + scale**2 * torch.eye(5)
    gain = clean @ (clean + SD.square().diag()).inverse()
    mean, covariance = loc + (y - loc) @ gain.T, clean - gain @ clean
    sd = covariance.diagonal().sqrt()
    # An importance draw is worth less than a draw: their number is the effective one.
    count = found.ess.clamp(max=2000).unsqueeze(1)
    assert ((found.mean - mean) / sd * found.ess.sqrt().unsqueeze(1)).abs().max() < 4
    assert ((found.draws.mean(0) - mean) / sd * count.sqrt() / math.sqrt(2)).abs().max() < 4
    spread = (found.draws.var(0) / sd**2 - 1) * (count / 4).sqrt()
    assert spread.abs().max() < 4
    assert (found.pareto_k < 0.7).all()


def test_torchs_normal_is_normal_noise_too(model, y):
    own, pyros = (
        denoise(model, exact(model), y, lambda x, law=law: law(x, SD), samples=20, draws=5)
        for law in (torch.distributions.Normal, dist.Normal)
    )
    assert torch.equal(own.draws, pyros.draws)


def test_bits_are_found_as_by_trying_all_of_them(program, float64):
    slope = torch.tensor([1.0, -2.0, 0.5])

    def story(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Bernoulli(logits=slope * z + 0.3).to_event(1), obs=x)

    model = program(story)
    y = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    flips = lambda x: dist.Bernoulli(0.2 + 0.6 * x).to_event(1)  # noqa: E731
    found = denoise(model, Prior(model), y, flips, samples=20_000, draws=1000)
    grid = torch.linspace(-8, 8, 2001).unsqueeze(1)
    prior = dist.Normal(0.0, 1.0).log_prob(grid[:, 0])
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    law = dist.Bernoulli(logits=slope * grid + 0.3).to_event(1)
    of_x = torch.stack([(prior + law.log_prob(x)).logsumexp(0) for x in every])
    posterior = (of_x + flips(every).log_prob(y.unsqueeze(1))).softmax(1)
    torch.testing.assert_close(found.mean, posterior @ every, atol=0.01, rtol=0)
    torch.testing.assert_close(found.draws.mean(0), posterior @ every, atol=0.06, rtol=0)
    assert set(found.draws.unique().tolist()) == {0.0, 1.0}


def test_repeatable_and_leaves_the_random_state(model, y):
    state = torch.get_rng_state()
    one, two = (denoise(model, exact(model), y, NOISES["closed form"], seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.draws, two.draws)
    assert one.draws.shape == (100, 4, 5)


def test_what_is_refused(model, y):
    guide, noise = exact(model), NOISES["closed form"]
    with pytest.raises(ValueError, match=r"samples=0"):
        denoise(model, guide, y, noise, samples=0)
    with pytest.raises(ValueError, match="nan or inf"):
        denoise(model, guide, torch.full_like(y, torch.nan), noise)
    with pytest.raises(ValueError, match=r"a law of shape \(5,\) for clean rows of shape"):
        denoise(model, guide, y, lambda x: dist.StudentT(3.0, SD, 1.0))
    late = ADGM.toy()
    x = late.simulate(2)["x"]
    with pytest.raises(ValueError, match="sites after 'x', a"):
        denoise(late, Prior(late), x, noise)
