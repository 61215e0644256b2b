"""Exact posteriors, whose draws are the prior's; and guides and data for which they are not."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from benchmarks.conjugate import BetaBinomial, Clusters, GammaPoisson, exact
from ppl_vae.checks.aggregate_posterior import aggregate_posterior, marginal_kl
from ppl_vae.checks.result import NotApplicable
from ppl_vae.conditionals import Normal
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.conditional import BaselineNet, ConditionalVAE
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP


def ppca():
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=4, scale=0.7)
    with torch.no_grad():
        model.likelihood.net.weight.copy_(torch.randn(4, 2))
    return model


def as_test(x):
    return {"train": x, "test": x}


def simulated(model, rows, seed):
    torch.manual_seed(seed)
    return model.simulate(rows)["x"]


def test_p_is_right_under_the_truth(float64):
    """Never too many small ones; and uniform, but for the steps of a count of 30 pairs."""
    model, p = ppca(), []
    guide, stream = exact(model), np.random.default_rng(0)
    for seed in range(60):
        data = as_test(simulated(model, 60, 1000 + seed))
        result = aggregate_posterior(model, guide, data, seed=seed, tolerance=0.0)
        test = result.statistics[0]
        right, pairs = round(test["accuracy"] * test["pairs"]), test["pairs"]
        assert result.p == pytest.approx(scipy.stats.binom.sf(right - 1, pairs, 0.5))
        # A part of the step at random makes it uniform.
        p.append(result.p - stream.uniform() * scipy.stats.binom.pmf(right, pairs, 0.5))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize("kind", [GammaPoisson, BetaBinomial, Clusters])
def test_exact_posteriors_of_other_families_pass(kind):
    torch.manual_seed(0)
    model = kind.toy()
    result = aggregate_posterior(model, exact(model), as_test(simulated(model, 600, 1)))
    assert result.passed, result.meaning
    assert result.statistics[0]["accuracy"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("faults", "said"),
    [({"shift": 1.5}, "mean shifted by"), ({"scale": 6.0}, "standard deviation times")],
)
def test_a_guide_that_is_off(float64, faults, said):
    model = ppca()
    x = simulated(model, 800, 1)
    result = aggregate_posterior(model, exact(model, **faults), as_test(x), level=0.004)
    assert result.verdict == "fail"
    assert said in result.meaning
    assert result.statistics[0]["accuracy"] > 0.6


def test_latents_that_depend_on_each_other_in_the_data_only(float64):
    """Rows of two correlated latents: each coordinate is the prior's, both together are not."""
    model = ppca()
    torch.manual_seed(1)
    z = torch.randn(1000, 2) @ torch.linalg.cholesky(torch.tensor([[1.0, 0.95], [0.95, 1.0]])).T
    with torch.no_grad():
        model.likelihood.log_scale.fill_(-3.0)
        x = model.x_dist(z).sample()
    result = aggregate_posterior(model, exact(model), as_test(x), level=0.004)
    assert result.verdict == "fail"
    assert "dependence differs" in result.meaning
    # Told apart by z1 z2 with probability 1/2 + 1/pi atan(...): well above one half
    assert result.statistics[0]["accuracy"] > 0.7


def test_accuracy_is_that_of_the_best_classifier(float64):
    """Of shifts alone, in d standard deviations: Phi(d / sqrt 2) of pairs."""
    model = ppca()
    with torch.no_grad():
        model.likelihood.log_scale.fill_(-4.0)  # z is known, so that all of it is seen
        torch.manual_seed(1)
        x = model.x_dist(torch.randn(2000, 2) + torch.tensor([1.0, 0.0])).sample()
    accuracy = aggregate_posterior(model, exact(model), as_test(x)).statistics[0]["accuracy"]
    assert accuracy == pytest.approx(scipy.stats.norm.cdf(1 / np.sqrt(2)), abs=0.05)


def test_a_difference_that_is_tolerated(float64):
    model = ppca()
    x = simulated(model, 1000, 1)
    guide = exact(model, shift=0.25)
    found = [aggregate_posterior(model, guide, as_test(x), tolerance=t).p for t in (0.0, 0.1, 0.4)]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.99


def test_marginal_kl_is_that_of_normals():
    stream = np.random.default_rng(0)
    a, b = stream.normal(size=(2, 200_000))
    assert marginal_kl(a, b) < 1e-4
    # Of N(1, 1) from N(0, 1), in tenths of the latter
    edges = scipy.stats.norm.ppf(np.linspace(0, 1, 11))
    q = np.diff(scipy.stats.norm.cdf(edges - 1))
    assert marginal_kl(a + 1, b) == pytest.approx((q * np.log(10 * q)).sum(), abs=0.01)
    coin = stream.random((2, 200_000)) < np.array([[0.9], [0.5]])
    expected = 0.9 * np.log(1.8) + 0.1 * np.log(0.2)
    assert marginal_kl(*coin.astype(float)) == pytest.approx(expected, abs=0.01)
    # Its mean for equal laws is taken off.
    small = [marginal_kl(*stream.normal(size=(2, 200))) for _ in range(200)]
    assert np.mean(small) < 0.02


def test_covariates_are_given_to_both():
    """z ~ N(c, 0.1): the prior given c is right, and one without c would not be."""

    class Given(ConditionalVAE):
        def z_dist(self, c):
            return dist.Normal(c[..., :1] * 4.0, 0.1).to_event(1)

    class Around(Normal):
        def forward(self, x, c):
            return dist.Normal(self.turn * c[..., :1] * 4.0 + self.shift, 0.1).to_event(1)

    torch.manual_seed(0)
    model = Given(Normal(MLP(2, 8, 2)), Normal(MLP(1 + 2, 8, 8)))
    data = as_test(
        {
            k: v
            for k, v in model.simulate(400, c=torch.eye(2)[torch.arange(400) % 2]).items()
            if k != "z"
        }
    )
    for turn, shift, passes in ((1.0, 0.0, True), (-1.0, 4.0, False)):
        around = Around(MLP(6, 2))
        around.turn, around.shift = turn, shift
        guide = Factorized(z=(around, ["x", "c"]))
        # Turned, z has the law of the prior over both c together, and of neither alone.
        assert aggregate_posterior(model, guide, data).passed == passes


def test_sites_that_are_summed_out_and_global_ones():
    torch.manual_seed(0)
    mixture = MixtureVAE.toy()
    guide = Factorized(z=(Normal(MLP(6, 8, 4)), ["x"]))
    result = aggregate_posterior(mixture, guide, as_test(mixture.simulate(60)["x"]))
    names = {record["name"] for record in result.statistics}
    assert names == {"all", "y[0]", "y[1]", "y[2]", "z[0]", "z[1]"}
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    result = aggregate_posterior(model, guide, as_test(model.simulate(60)["x"]))
    assert {record["name"].split("[")[0] for record in result.statistics} == {"all", "z"}


def test_what_cannot_be_compared(float64):
    model = ppca()
    x = simulated(model, 50, 1)
    with pytest.raises(NotApplicable, match="on purpose"):
        aggregate_posterior(model, Prior(model), as_test(x))
    with pytest.raises(NotApplicable, match="39 rows"):
        aggregate_posterior(model, exact(model), as_test(x[:39]))
    with pytest.raises(ValueError, match=r"tolerance=0\.5"):
        aggregate_posterior(model, exact(model), as_test(x), tolerance=0.5)
    with pytest.raises(ValueError, match="level=2"):
        aggregate_posterior(model, exact(model), as_test(x), level=2)

    class Nothing(torch.nn.Module):
        def forward(self, **columns):
            pass

    model = BaselineNet.toy()
    data = as_test(model.simulate(50, **model.example_covariates(50)))
    with pytest.raises(NotApplicable, match="no latent for each row"):
        aggregate_posterior(model, Nothing(), data)


def test_repeatable_and_drawn(float64):
    import matplotlib.pyplot as plt

    model = ppca()
    data = as_test(simulated(model, 100, 1))
    state = torch.get_rng_state()
    a, b, c = (aggregate_posterior(model, exact(model), data, seed=s, rows=60) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json() != c.to_json()
    assert a.groups["aggregate_posterior"].sizes == {"row": 60, "coordinate": 2}
    assert len(a.plot().axes) == 2
    assert not plt.get_fignums()
