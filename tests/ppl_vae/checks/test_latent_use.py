"""KL, information and sensitivity of linear-Gaussian models, in closed form; collapsed sites."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from benchmarks.conjugate import exact
from ppl_vae.checks.aggregate import log_q_of_all, mutual_information
from ppl_vae.checks.fixed_latents import FixedLatents
from ppl_vae.checks.latent_use import latent_use
from ppl_vae.checks.result import NotApplicable
from ppl_vae.conditionals import Normal
from ppl_vae.flows import Planar
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.guides.normalizing_flow import NormalizingFlow
from ppl_vae.models._template import Template
from ppl_vae.models.categorical_vae import CategoricalVAE
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP


def ppca(latents=2, observed=5):
    torch.manual_seed(0)
    model = PPCA(latents=latents, observed=observed, scale=0.5).double()
    with torch.no_grad():
        model.likelihood.net.weight.copy_(0.6 * torch.randn(observed, latents))
    return model


def as_test(x):
    return {"train": x, "test": x}


def simulated(model, rows, seed):
    torch.manual_seed(seed)
    return model.simulate(rows)["x"]


def by_site(result):
    return {record["site"]: record for record in result.statistics}


def information_of(model):
    """I(x; z) = 1/2 log det(I + W' W / sigma^2)."""
    weight, scale = model.likelihood.net.weight, model.likelihood.log_scale.exp()
    return 0.5 * torch.logdet(torch.eye(weight.shape[1]) + weight.T @ weight / scale**2).item()


class Apart(nn.Module):
    """Draws from the standard normal whatever it is given."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return dist.Normal(torch.full_like(x[..., :2], self.shift), 1.0).to_event(1)


class Spare(PPCA):
    """With a second latent, on which nothing depends."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            pyro.sample("u", dist.Normal(torch.zeros(2).to(z), 1.0).to_event(1))
            return pyro.sample("x", self.x_dist(z), obs=x)


def test_information_kl_and_sensitivity_in_closed_form(float64):
    model = ppca()
    x = simulated(model, 2000, 1)
    result = latent_use(model, exact(model), as_test(x), rows=2000, samples=50)
    assert result.passed
    record = by_site(result)["z"]
    posterior = model.posterior(x)
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    kl = torch.distributions.kl_divergence(posterior, prior).mean().item()
    assert record["kl"] == pytest.approx(kl, abs=4 * 1.0 / np.sqrt(2000 * 50))
    error = 4 * record["mutual_information_se"]
    truth = information_of(model)
    assert 1 < truth < 3
    assert record["mutual_information"] < truth + error
    assert record["mutual_information_upper"] > truth - error
    assert record["mutual_information_upper"] - record["mutual_information"] < 0.2
    # An exact guide: the average KL is the information.
    assert abs(record["kl"] - truth) < 4 * record["kl_se"]
    # tr(W W') / sigma^2
    weight, scale = model.likelihood.net.weight, model.likelihood.log_scale.exp()
    lost = (weight.square().sum() / scale**2).item()
    assert abs(record["nats_lost"] - lost) < 4 * record["nats_lost_se"]
    assert (record["active"], record["coordinates"]) == (2, 2)


def test_draws_are_scored_given_the_global_latent_that_they_had(program, float64):
    def story(self, x):
        z = pyro.sample("z", dist.Normal(self.w, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = program(
        story, whole=lambda self: setattr(self, "w", pyro.sample("w", dist.Normal(0.0, 3.0)))
    )

    class Guide(nn.Module):
        def forward(self, x, total=None):
            w = pyro.sample("w", dist.Normal(0.0, 3.0))
            with pyro.plate("data", x.shape[-1]):
                pyro.sample("z", dist.Normal(x + w, 1.0))

    torch.manual_seed(0)
    x = torch.randn(7)
    pair = FixedLatents(model, Guide(), {"x": x}, 7, seed=0)
    z, w = pair.latents["z"], pair.latents["w"]
    expected = dist.Normal(x + w, 1.0).log_prob(z.unsqueeze(1))
    torch.testing.assert_close(log_q_of_all(pair, ["z"]), expected)


def test_information_is_bounded_by_the_rows(float64):
    # Rows that are told apart with certainty.
    found = mutual_information(torch.where(torch.eye(50, dtype=torch.bool), 0.0, -1e9))
    assert found.lower == pytest.approx(np.log(50))
    assert found.upper > 1e8
    nothing = mutual_information(torch.zeros(50, 50))
    assert nothing.lower == pytest.approx(0, abs=1e-12)
    assert nothing.upper == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_p_is_uniform_where_the_kl_is_what_is_tolerated(float64):
    model = ppca()
    guide, truth, p = exact(model), information_of(model), []
    for seed in range(120):
        data = as_test(simulated(model, 200, 1000 + seed))
        p.append(latent_use(model, guide, data, seed=seed, samples=2, tolerance=truth).p)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 3.2 * np.sqrt(0.09 / 120)


@pytest.mark.parametrize(("shift", "fails"), [(0.0, True), (0.1, True), (0.5, False)])
def test_a_collapsed_site(float64, shift, fails):
    """Its KL is shift^2 / 2 of each of two coordinates: 0, 0.01, 0.25 nats."""
    torch.manual_seed(0)
    model = Spare(2, 5, 0.5).double()
    with torch.no_grad():
        model.likelihood.net.weight.copy_(torch.randn(5, 2))
    inner = exact(model).conditionals["z"]
    guide = Factorized(z=(inner, ["x"]), u=(Apart(shift), ["x"]))
    x = simulated(model, 500, 1)
    result = latent_use(model, guide, as_test(x), level=0.004)
    records = by_site(result)
    assert records["z"]["verdict"] == "pass"
    assert records["u"]["verdict"] == ("fail" if fails else "pass")
    assert records["u"]["kl"] == pytest.approx(shift**2, abs=0.05)
    assert records["u"]["inactive"] == ["u[0]", "u[1]"]
    assert records["u"]["nats_lost"] == pytest.approx(0, abs=1e-12)
    assert records["all"]["active"] == 2
    assert records["all"]["kl"] == pytest.approx(records["z"]["kl"] + records["u"]["kl"])
    assert ("Collapsed" in result.meaning) == fails


def test_an_unused_coordinate_is_listed_only(float64):
    model = ppca(latents=3)
    with torch.no_grad():
        model.likelihood.net.weight[:, 1] = 0
    guide = Factorized(z=(exact(model).conditionals["z"], ["x"]))
    result = latent_use(model, guide, as_test(simulated(model, 300, 1)))
    assert result.passed
    assert by_site(result)["z"]["inactive"] == ["z[1]"]
    assert "2 of 3 coordinates are active; not z[1]." in result.meaning


def test_information_comes_with_the_seed_of_enumerated_and_discrete_sites():
    torch.manual_seed(0)
    codes = CategoricalVAE.toy()
    guide = MeanField(codes, MLP(6, 8, 7), x=torch.zeros(2, 6))
    record = by_site(latent_use(codes, guide, as_test(codes.simulate(60)["x"])))["z"]
    assert record["active"] == -1  # a code has no mean
    assert record["mutual_information"] + 0.1 >= 0
    mixture = MixtureVAE.toy()
    guide = Factorized(z=(Normal(MLP(6, 8, 4)), ["x"]))
    records = by_site(latent_use(mixture, guide, as_test(mixture.simulate(60)["x"])))
    assert set(records) == {"y", "z", "all"}


def test_a_sum_over_clusters_is_sensitive_to_them(float64):
    """x = z + noise and z is near the cluster's mean: exchanging clusters costs what that says."""
    torch.manual_seed(0)
    mixture = MixtureVAE(Normal(nn.Linear(3, 2)), Normal(nn.Linear(1, 4)), classes=3).double()
    with torch.no_grad():
        net = mixture.component.net
        net.weight.copy_(torch.tensor([[-9.0, 0.0, 9.0], [0.0, 0.0, 0.0]]))
        net.bias.zero_()
    guide = Factorized(z=(Normal(nn.Linear(2, 2)), ["x"])).double()
    with torch.no_grad():
        net = guide.conditionals["z"].net
        net.weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 0.0]]))
        net.bias.zero_()
    x = torch.tensor([[-0.9, 0.0], [0.0, 0.0], [0.9, 0.0]]).repeat(100, 1)
    record = by_site(latent_use(mixture, guide, as_test(x), rows=300))["y"]
    # Of two rows, 4/9 are one cluster apart and 2/9 two: (4/9 81 + 2/9 324) / 2 / s^2, s = softplus
    scale = mixture.z_dist(torch.eye(3)).base_dist.scale[0, 0].item()
    assert record["nats_lost"] == pytest.approx(54 / scale**2, rel=0.15)


def test_what_flows_do_not_tell(float64):
    model = ppca()
    flow = partial(Planar, layers=2)
    guide = NormalizingFlow(model, MLP(5, 8, 6), x=torch.zeros(2, 5), flow=flow)
    result = latent_use(model, guide, as_test(simulated(model, 40, 1)))
    assert np.isnan(by_site(result)["z"]["mutual_information"])
    assert "Draws tell" not in result.meaning


def test_global_sites_are_not_judged():
    torch.manual_seed(0)
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    result = latent_use(model, guide, as_test(model.simulate(50)["x"]))
    assert set(by_site(result)) == {"z"}


def test_what_cannot_be_judged(float64):
    model = ppca()
    x = simulated(model, 30, 1)
    with pytest.raises(NotApplicable, match="on purpose"):
        latent_use(model, Prior(model), as_test(x))
    with pytest.raises(NotApplicable, match="9 rows"):
        latent_use(model, exact(model), as_test(x[:9]))
    with pytest.raises(ValueError, match="tolerance=0"):
        latent_use(model, exact(model), as_test(x), tolerance=0)
    with pytest.raises(ValueError, match="level=2"):
        latent_use(model, exact(model), as_test(x), level=2)


def test_repeatable_and_drawn(float64):
    import matplotlib.pyplot as plt

    model = ppca()
    data = as_test(simulated(model, 80, 1))
    state = torch.get_rng_state()
    a, b, c = (latent_use(model, exact(model), data, seed=s, rows=40) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json() != c.to_json()
    guide = MeanField(model, MLP(5, 8, 6), x=torch.zeros(2, 5))
    for result in (a, latent_use(model, guide, data)):
        for name in result.pictures:
            assert result.plot(name).axes
    assert not plt.get_fignums()
