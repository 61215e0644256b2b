from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine

import ppl_vae.draws
from benchmarks.faults import Given, LabeledPPCA, rows_of
from ppl_vae.arviz import to_arviz
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.model import GenerativeModel, Program
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.sites import PairError, evaluating


class ExactPPCA(Program):
    """The exact posterior of a PPCA as its guide."""

    def __init__(self, model):
        super().__init__()
        self.exact = model.posterior  # a method: the model's parameters stay the model's

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            return pyro.sample("z", self.exact(x))


class Shifted(GenerativeModel):
    """A group that the model enumerates shifts x: y ~ Bernoulli(0.3), x ~ Normal(z + 3 y, 1)."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            loc = z + 3 * y.unsqueeze(-1)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def pair(model, seed=0):
    torch.manual_seed(seed)
    x = model.simulate(60)["x"]
    guide = MeanField(model, MLP(x.shape[1], 8, 8), x=x[:4])
    return model, guide, {"train": x, "test": x}


@pytest.fixture(scope="module")
def template():
    torch.manual_seed(0)
    return pair(Template.toy())


def test_groups_dims_and_dtypes(template):
    tree = to_arviz(*template, rows=7, draws=5)
    assert set(tree.children) == {
        "posterior",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
    }
    for name in ("log_p", "log_q", "log_weight"):
        assert dict(tree["sample_stats"][name].sizes) == {"chain": 1, "draw": 5, "row": 7}
    assert dict(tree["sample_stats"]["pareto_k"].sizes) == {"row": 7}
    assert dict(tree["log_likelihood"]["x"].sizes) == {"chain": 1, "draw": 5, "row": 7}
    for group in ("posterior", "prior"):
        assert dict(tree[group]["z"].sizes) == {"chain": 1, "draw": 5, "row": 7, "z_dim": 1}
        assert dict(tree[group]["w"].sizes) == {"chain": 1, "draw": 5, "w_dim": 4}
        assert set(tree[group].data_vars) == {"z", "w"}
    for group in ("posterior_predictive", "prior_predictive"):
        assert dict(tree[group]["x"].sizes) == {"chain": 1, "draw": 5, "row": 7, "x_dim": 4}
        assert tree[group]["x"].dtype == np.int8  # counts
    assert dict(tree["observed_data"]["x"].sizes) == {"row": 7, "x_dim": 4}
    assert tree["observed_data"]["x"].dtype == np.int8
    assert tree["posterior"]["z"].dtype == np.float32
    assert tree.attrs["seed"] == 0
    assert tree.attrs["split"] == "test"
    assert "pyro_version" in tree.attrs


def test_posterior_equals_a_direct_run(template):
    model, guide, data = template
    tree = to_arviz(model, guide, data, rows=60, draws=5, seed=3)
    with evaluating(3, model, guide):
        trace = poutine.trace(pyro.plate("particles", 5, dim=-2)(guide)).get_trace(x=data["test"])
    np.testing.assert_array_equal(tree["posterior"]["z"][0], trace.nodes["z"]["value"])
    np.testing.assert_array_equal(tree["posterior"]["w"][0], trace.nodes["w"]["value"][:, 0])


def test_draws_have_the_exact_moments_of_ppca():
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=3, scale=0.5)
    x = model.simulate(4)["x"]
    tree = to_arviz(model, ExactPPCA(model), {"train": x, "test": x}, draws=4000)
    with torch.no_grad():
        exact = model.posterior(x)
        weight, bias = model.likelihood.net.weight, model.likelihood.net.bias
        expected = {
            ("posterior", "z"): (exact.mean, exact.variance),
            ("posterior_predictive", "x"): (
                exact.mean @ weight.T + bias,
                (weight @ exact.covariance_matrix @ weight.T).diagonal(dim1=-2, dim2=-1) + 0.25,
            ),
            ("prior", "z"): (torch.zeros(4, 2), torch.ones(4, 2)),
            ("prior_predictive", "x"): (
                bias.expand(4, 3),
                ((weight @ weight.T).diagonal() + 0.25).expand(4, 3),
            ),
        }
    for (group, site), (mean, variance) in expected.items():
        values = tree[group][site][0].values
        error = (variance / 4000).sqrt()
        assert (np.abs(values.mean(0) - mean.numpy(force=True)) < 5 * error.numpy(force=True)).all()
        np.testing.assert_allclose(values.var(0), variance.numpy(force=True), rtol=0.15)


def test_enumerated_sites_are_drawn_from_their_posterior():
    model, guide, data = pair(Shifted())
    tree = to_arviz(model, guide, data, rows=10, draws=3000)
    y = tree["posterior"]["y"]
    assert dict(y.sizes) == {"chain": 1, "draw": 3000, "row": 10}
    x = torch.as_tensor(tree["observed_data"]["x"].values)
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    logit = (
        torch.tensor(0.3 / 0.7).log()
        + dist.Normal(z + 3, 1.0).log_prob(x).sum(-1)
        - dist.Normal(z, 1.0).log_prob(x).sum(-1)
    )
    exact = logit.sigmoid().mean(0).numpy()  # p(y = 1 | z, x), averaged over the guide's z
    assert exact.max() - exact.min() > 0.3
    np.testing.assert_allclose(y[0].mean("draw"), exact, atol=5 * 0.5 / np.sqrt(3000))
    # The predictive draws follow from the same y, not from one drawn anew.
    residual = tree["posterior_predictive"]["x"].values[0] - z.numpy() - 3 * y.values[0][..., None]
    assert abs(residual.mean()) < 5 / np.sqrt(residual.size)
    assert residual.std() == pytest.approx(1, abs=0.05)


def test_weights_are_the_evidence_where_the_guide_is_exact(float64):
    model = PPCA(latents=2, observed=3, scale=0.5)
    x = model.simulate(6)["x"]
    tree = to_arviz(model, ExactPPCA(model), {"train": x, "test": x}, rows=6, draws=30)
    stats, z = tree["sample_stats"], torch.as_tensor(tree["posterior"]["z"].values[0])
    with torch.no_grad():
        evidence = model.evidence(x)
        log_q = model.posterior(x).log_prob(z)
        log_x = model.x_dist(z).log_prob(x)
    np.testing.assert_allclose(stats["log_weight"].values[0], evidence.expand(30, 6), rtol=1e-9)
    np.testing.assert_allclose(stats["log_q"].values[0], log_q, rtol=1e-9)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], log_x, rtol=1e-9)
    log_p = log_x + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    np.testing.assert_allclose(stats["log_p"].values[0], log_p, rtol=1e-9)
    assert (stats["pareto_k"].values == -np.inf).all()  # there is nothing to smooth


def test_weights_sum_over_enumerated_sites(float64):
    model, guide, data = pair(Shifted())
    tree = to_arviz(model, guide, data, rows=10, draws=30)
    x = torch.as_tensor(tree["observed_data"]["x"].values)
    z, y = (torch.as_tensor(tree["posterior"][site].values[0]) for site in ("z", "y"))
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    of_x = torch.stack([dist.Normal(z + 3 * k, 1.0).log_prob(x).sum(-1) for k in (0, 1)])
    with torch.no_grad():
        log_q = guide.posterior(x).log_prob(z)
    marginal = prior + (of_x + torch.tensor([[[0.7]], [[0.3]]]).log()).logsumexp(0) - log_q
    stats = tree["sample_stats"]
    np.testing.assert_allclose(stats["log_weight"].values[0], marginal, rtol=1e-9)
    of_y = torch.where(y == 1, of_x[1], of_x[0])
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], of_y, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_arviz_functions_run_on_it_as_it_is(float64):
    """Leave-one-out with a correction for the guide: its elpd is the evidence, in closed form."""
    import arviz_plots
    import arviz_stats
    import matplotlib.pyplot as plt

    model = PPCA(latents=2, observed=3, scale=0.5)
    x = model.simulate(40)["x"]
    guide = MeanField(model, MLP(3, 8, 8), x=x[:4])
    for parameter in guide.parameters():  # wider than the posterior, so that weights are tame
        torch.nn.init.normal_(parameter, std=0.1)
    tree = to_arviz(model, guide, {"train": x, "test": x}, rows=40, draws=2000)
    stats = tree["sample_stats"]
    found = arviz_stats.loo_approximate_posterior(
        tree, log_p=stats["log_p"], log_q=stats["log_q"], pointwise=True
    )
    with torch.no_grad():
        evidence = model.evidence(x).numpy()
    good = found.pareto_k.values < 0.7
    assert good.mean() > 0.7
    np.testing.assert_allclose(found.elpd_i.values[good], evidence[good], atol=1.5)
    assert abs(found.elpd_i.values[good] - evidence[good]).mean() < 0.15
    arviz_plots.plot_khat(found, backend="none")
    arviz_plots.plot_ppc_dist(tree, backend="none")
    arviz_plots.plot_ppc_tstat(tree, backend="none")
    arviz_plots.plot_prior_posterior(tree, backend="none")
    arviz_plots.plot_ppc_pit(tree.isel(x_dim=0), backend="none")  # it takes one column
    plt.close("all")


class OneHot(GenerativeModel):
    """Shifted, with a one-hot label of three classes: x ~ Normal(z + 3 k, 1)."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            label = dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2]))
            y = pyro.sample("y", label, infer={"enumerate": "parallel"})
            loc = z + 3 * (y * torch.arange(3.0)).sum(-1, keepdim=True)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def test_one_hot_labels_that_are_enumerated():
    tree = to_arviz(*pair(OneHot()), rows=10, draws=3000)
    y = tree["posterior"]["y"]
    assert dict(y.sizes) == {"chain": 1, "draw": 3000, "row": 10, "y_dim": 3}
    x = torch.as_tensor(tree["observed_data"]["x"].values)
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    log_p = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(
        z + 3 * torch.arange(3.0), 1.0
    ).log_prob(x)
    exact = log_p.softmax(-1).mean(0).numpy()
    assert exact.max() - exact.min() > 0.3
    np.testing.assert_allclose(y[0].mean("draw"), exact, atol=5 * 0.5 / np.sqrt(3000))
    loc = z.numpy()[..., 0] + 3 * y.values[0] @ np.arange(3)
    residual = tree["posterior_predictive"]["x"].values[0, ..., 0] - loc
    assert residual.std() == pytest.approx(1, abs=0.05)


def test_what_a_label_brought_about_is_replicated_given_that_label():
    """x ~ Normal(W z + m(y), s) with z given x and y: with another y, z would be another's."""
    torch.manual_seed(0)
    model = LabeledPPCA()
    guide = Factorized(z=(Given(model.posterior), ["x", "y"]))
    tree = to_arviz(model, guide, rows_of(model, train=10, test=200), rows=200, draws=20)
    y = torch.as_tensor(tree["observed_data"]["y"].values).float()
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    mean = model.x_dist(y, z).mean.numpy(force=True)
    residual = tree["posterior_predictive"]["x"].values[0] - mean
    assert residual.std() == pytest.approx(0.7, rel=0.02)  # 1.3 with labels drawn anew
    labels = tree["posterior_predictive"]["y"].values[0]
    assert labels.mean((0, 1)) == pytest.approx(np.full(3, 1 / 3), abs=0.04)
    assert (labels != y.numpy()).any()  # it is drawn all the same


def test_rows_are_a_random_subset(template):
    model, guide, data = template
    tree = to_arviz(model, guide, data, rows=20, draws=1, seed=1)
    rows = tree["posterior"]["row"].values
    assert len(set(rows)) == 20
    assert rows.max() > 30  # a prefix would end at 19
    np.testing.assert_array_equal(tree["observed_data"]["x"], data["test"][torch.tensor(rows)])
    other = to_arviz(model, guide, data, rows=20, draws=1, seed=2)
    assert (other["posterior"]["row"].values != rows).any()


def test_repeatable_and_leaves_the_random_state(template):
    state = torch.get_rng_state()
    a, b, c = (to_arviz(*template, rows=6, draws=4, seed=s) for s in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert a.equals(b)
    assert not a.equals(c)


def test_saved_and_read_back_equal(template, tmp_path):
    tree = to_arviz(*template, rows=6, draws=4)
    tree.to_netcdf(tmp_path / "idata.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "idata.nc", engine="h5netcdf") as back:
        assert back.identical(tree)


def test_runs_stay_small(template, monkeypatch):
    model, guide, data = template
    monkeypatch.setattr(ppl_vae.draws, "_ROWS_AT_ONCE", 20)
    sizes = []
    hook = model.decoder.register_forward_hook(lambda m, i, out: sizes.append(out[..., 0].numel()))
    tree = to_arviz(model, guide, data, rows=6, draws=11)
    hook.remove()
    assert max(sizes) <= 20
    assert tree["posterior"].sizes["draw"] == 11
    assert len(np.unique(tree["posterior"]["z"].values)) == 66  # no chunk is a copy


def test_errors(template):
    model, guide, data = template
    with pytest.raises(ValueError, match="draws=0"):
        to_arviz(model, guide, data, draws=0)
    with pytest.raises(ValueError, match="validation"):
        to_arviz(model, guide, data, split="validation")
    with pytest.raises(ValueError, match="observes x, but the data have columns u"):
        to_arviz(model, guide, {"train": {"u": data["test"]}, "test": {"u": data["test"]}})
    with pytest.raises(PairError, match="cannot emit"):
        to_arviz(model, guide, {"train": -data["test"], "test": -data["test"]})
    with pytest.raises(PairError):
        to_arviz(VAE.toy(), guide, data)
