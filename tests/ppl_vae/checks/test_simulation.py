"""Ranks of true latents among a guide's draws: uniform for exact guides, in every quantity."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from benchmarks.conjugate import BetaBinomial, Clusters, GammaPoisson, TwoModes, exact
from ppl_vae.checks import simulation
from ppl_vae.checks.ranks import smooth_test
from ppl_vae.checks.result import NotApplicable, silent
from ppl_vae.checks.simulation import LOG_P, LOG_Q, LOG_WEIGHT, simulate
from ppl_vae.data import Dataset
from ppl_vae.flows import Planar
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.guides.normalizing_flow import NormalizingFlow
from ppl_vae.model import Program
from ppl_vae.models.conditional import BaselineNet, ConditionalVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.sites import evaluating

DRAWS = 19


def ranked(model, guide, data, rows=300, seed=0, coordinates=64, draws=DRAWS):
    with evaluating(seed, model, guide):
        return simulate(
            model,
            guide,
            data,
            split="test",
            seed=seed,
            rows=rows,
            draws=draws,
            coordinates=coordinates,
            progress=silent,
        )


def data_of(model, rows=30):
    columns = model.simulate(rows, **model.example_covariates(rows))
    seen = {name: columns[name] for name in ("x", *model.covariates)}
    return {"train": seen, "test": seen}


def names(found):
    return [quantity.name for quantity in found.quantities]


def p_values(found):
    return {
        name: smooth_test(ranks, found.draws).p
        for name, ranks in zip(names(found), found.ranks.T, strict=True)
    }


MODELS = {
    "ppca": lambda: PPCA(3, 5, 0.7),
    "gamma-poisson": GammaPoisson,
    "beta-bernoulli": lambda: BetaBinomial(trials=1),
    "beta-binomial": BetaBinomial,
    "two modes": TwoModes,
    "clusters": Clusters,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_exact_guides_have_uniform_ranks(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    found = ranked(model, exact(model), data_of(model))
    assert found.ranks.shape == (300, len(found.quantities))
    assert found.ranks.min() == 0
    assert found.ranks.max() == DRAWS
    assert names(found)[-3:] == [LOG_P, LOG_Q, LOG_WEIGHT]
    assert {q.site for q in found.quantities} == {"", "y" if name == "clusters" else "z"}
    # 60 or so p-values over all cases.
    assert min(p_values(found).values()) > 1e-4


@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_ranks_of_a_wrong_scale_follow_their_law(scale, float64):
    """The truth's place u among the guide's is of distribution function Phi(c Phi^-1(u)), and its
    rank among L draws Binomial(L, u)."""
    model = PPCA(2, 4, 0.7)
    found = ranked(model, exact(model, scale=scale), data_of(model), rows=2000)
    z = np.linspace(-8, 8, 4001)
    u, mass = scipy.stats.norm.cdf(z / scale), scipy.stats.norm.pdf(z)
    law = np.array([np.trapezoid(scipy.stats.binom.pmf(r, DRAWS, u) * mass, z) for r in range(20)])
    for ranks in found.ranks[:, :2].T:
        counts = np.bincount(ranks, minlength=DRAWS + 1)
        assert scipy.stats.chisquare(counts, 2000 * law / law.sum()).pvalue > 0.001
        assert scipy.stats.chisquare(counts).pvalue < 1e-6


def test_densities_find_what_coordinates_cannot(float64):
    model = PPCA(2, 6, 0.5)
    data = data_of(model)
    half = p_values(ranked(model, exact(model, seen=3), data))
    assert min(half["z[0]"], half["z[1]"], half[LOG_Q]) > 1e-3
    assert max(half[LOG_P], half[LOG_WEIGHT]) < 1e-6
    blind = p_values(ranked(model, Prior(model), data))
    assert min(blind["z[0]"], blind["z[1]"], blind[LOG_Q]) > 1e-3
    assert max(blind[LOG_P], blind[LOG_WEIGHT]) < 1e-6
    with torch.no_grad():  # latents that hang together given x
        model.likelihood.net.weight.fill_(0.5)
    apart = p_values(ranked(model, exact(model, independent=True), data))
    assert min(apart["z[0]"], apart["z[1]"]) > 1e-3
    assert apart[LOG_WEIGHT] < 1e-6


class Steps(nn.Module):
    """Exact q(z | x, w) where z is w + y and noise, and x is z and noise: a mixture of normals."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x, w, logits, means):
        # Given y: z ~ Normal(w + mean, 1), x ~ Normal(z, 1).
        prior = w + means
        weights = logits + dist.Normal(prior, 2**0.5).log_prob(x)
        mixing = torch.distributions.Categorical(logits=weights)
        parts = torch.distributions.Normal((prior + x) / 2 + self.shift, 0.5**0.5)
        return dist.MixtureSameFamily(mixing, parts)


class GlobalGuide(Program):
    """w near 5; z exact given it, if the w of its truth is its own, and ``shift`` 0."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.q = Steps(shift)

    def forward(self, x=None, *, n=None, total=None):
        w = pyro.sample("w", dist.Normal(torch.tensor(5.0), 0.5))
        with self.rows(x, n=n, total=total):
            pyro.sample("z", self.q(x.unsqueeze(-1), w.unsqueeze(-1), LOGITS, MEANS))


LOGITS, MEANS = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([0.0, 1.0, 3.0])


@pytest.mark.parametrize("one_hot", [True, False])
def test_enumerated_and_global_latents(program, one_hot):
    def whole(self):
        self.w = pyro.sample("w", dist.Normal(torch.tensor(0.0), 10.0))

    def story(self, x):
        infer = {"enumerate": "parallel"}
        if one_hot:
            y = pyro.sample("y", dist.OneHotCategorical(logits=LOGITS), infer=infer) @ MEANS
        else:
            y = MEANS[pyro.sample("y", dist.Categorical(logits=LOGITS), infer=infer)]
        z = pyro.sample("z", dist.Normal(self.w + y, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = program(story, whole)
    x = torch.randn(30)
    data = {"train": {"x": x}, "test": {"x": x}}
    found = ranked(model, GlobalGuide(), data, rows=600)
    own = ["y[0]", "y[1]", "y[2]"] if one_hot else ["y"]
    assert names(found) == [*own, "z", LOG_P, LOG_Q, LOG_WEIGHT]
    assert min(p_values(found).values()) > 1e-3
    # One value of w for all rows: their spread is that of z and x alone.
    values = found.columns["x"]
    assert values.mean().item() == pytest.approx(5 + 0.79, abs=1.8)
    assert values.var().item() == pytest.approx(1 + 1 + 0.96, rel=0.3)
    wrong = p_values(ranked(model, GlobalGuide(shift=0.5), data, rows=600))
    assert max(wrong["z"], wrong[LOG_WEIGHT]) < 1e-4


def test_labels_that_are_withheld_are_latent():
    torch.manual_seed(0)
    model = Clusters()
    drawn = model.simulate(60)
    split = {"x": drawn["x"], "y": drawn["y"].argmax(1)}
    dataset = Dataset("clusters", {"train": split, "test": split})
    withheld = ranked(model, exact(model), dataset.labeled(8, 0), rows=300)
    assert list(withheld.columns) == ["x"]
    assert names(withheld)[:4] == [f"y[{k}]" for k in range(4)]
    assert min(p_values(withheld).values()) > 1e-3
    with pytest.raises(NotApplicable, match="Clusters has no latent that each row has"):
        ranked(model, exact(model), dataset)


def test_covariates_are_those_of_held_out_rows():
    torch.manual_seed(0)
    model = ConditionalVAE.toy()
    data = data_of(model, rows=7)
    name = model.covariates[0]
    example = model.observed(data["test"])
    width = sum(column.shape[-1] for column in example.values())
    guide = MeanField(model, MLP(width, 6), **example)
    found = ranked(model, guide, data, rows=20)
    again = torch.arange(20) % 7
    torch.testing.assert_close(found.columns[name], data["test"][name][again])
    assert found.columns["x"].unique(dim=0).shape[0] > 7  # emitted anew


def test_a_guide_that_scores_own_draws_only_is_compared_by_the_model_alone():
    torch.manual_seed(0)
    model = PPCA(2, 4)
    x = torch.zeros(2, 4)
    guide = NormalizingFlow(model, MLP(4, 6), x=x, flow=Planar)
    found = ranked(model, guide, data_of(model), rows=100)
    assert names(found) == ["z[0]", "z[1]", LOG_P]
    assert found.ranks.shape == (100, 3)
    (note,) = found.notes
    assert note.startswith("The guide's density is not compared: Planar has no inverse")


def test_auxiliary_variables_have_no_true_value():
    model = PPCA(1, 2)

    class Guide(Program):
        def forward(self, x=None, *, n=None, total=None):
            with self.rows(x, n=n, total=total):
                noise = dist.Normal(torch.zeros(1), 1.0).to_event(1)
                u = pyro.sample("u", noise, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(u, event_dim=1))

    found = ranked(model, Guide(), data_of(model), rows=100)
    assert names(found) == ["z[0]", LOG_P]
    assert "auxiliary variables" in found.notes[0]


def test_many_coordinates_are_sampled():
    model = PPCA(12, 4)
    data = data_of(model)
    found = ranked(model, exact(model), data, rows=100, coordinates=5)
    assert len(found.quantities) == 5 + 3
    assert found.notes == ("5 of the 12 coordinates of z are compared.",)
    assert names(found)[:5] == sorted(names(found)[:5], key=lambda n: int(n[2:-1]))
    assert names(ranked(model, exact(model), data, rows=100, coordinates=5)) == names(found)


def test_ties_are_broken_evenly(float64):
    """A truth that equals some draws has each of their ranks as often."""
    torch.manual_seed(0)
    values = torch.tensor([2.0, 1.0, 2.0, 2.0, 3.0]).reshape(5, 1, 1).expand(5, 4000, 1)
    ranks = simulation._rank(values).squeeze()
    counts = np.bincount(ranks.numpy(), minlength=5)
    assert counts[0] == counts[4] == 0
    assert scipy.stats.chisquare(counts[1:4]).pvalue > 0.001


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_equal_densities_are_ties_whatever_their_size(size, float64):
    """Errors of float32 sums part few of them: those that lie at the border of two steps."""
    precision = torch.finfo(torch.float32).eps
    values = size * (1 + torch.rand(2000)) + size * precision * torch.randn(6, 2000)
    found = simulation._rounded(values, 1e-2, precision)
    assert (found == found[0]).double().mean() > 0.8
    values[0] += 100 * size * precision + 0.1
    found = simulation._rounded(values, 1e-2, precision)
    assert (found[0] > found[1:]).all()


def test_densities_that_are_not_finite_are_at_the_ends(float64):
    values = torch.tensor([[torch.inf, -torch.inf], [1.0, torch.nan]])
    found = simulation._rounded(values, 1e-3, 1e-16)
    assert found.tolist() == [[torch.inf, -torch.inf], [1000, -torch.inf]]


def test_batches_do_not_change_what_is_ranked(monkeypatch):
    torch.manual_seed(0)
    model = GammaPoisson()
    data = data_of(model)
    sizes = []
    laid_out = simulation.model_nodes

    def watched(*args, rows, **kwargs):
        sizes.append(rows)
        return laid_out(*args, rows=rows, **kwargs)

    monkeypatch.setattr(simulation, "model_nodes", watched)
    monkeypatch.setattr(simulation, "rows_at_once", lambda width: 7 * (DRAWS + 1))
    found = ranked(model, exact(model), data, rows=100)
    assert sizes == [7] * 14 + [2]
    assert found.ranks.shape == (100, 6)
    assert len(found.columns["x"]) == 100
    assert min(p_values(found).values()) > 1e-3


def test_what_cannot_be_simulated_is_said(program):
    torch.manual_seed(0)
    model = BaselineNet.toy()
    with pytest.raises(NotApplicable, match="BaselineNet has no latent"):
        ranked(model, Prior(model), data_of(model))

    def story(self, x):
        with pyro.plate("repeats", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    class Guide(Program):
        def forward(self, x=None, *, n=None, total=None):
            with self.rows(x, n=n, total=total), pyro.plate("repeats", 3, dim=-2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotApplicable, match="site 'z' stands in plates"):
        ranked(program(story), Guide(), {"train": torch.zeros(5), "test": torch.zeros(5)})


def test_settings_and_models_that_cannot_work_are_refused():
    model = PPCA(2, 4)
    data = data_of(model)
    with pytest.raises(ValueError, match="rows=0"):
        ranked(model, exact(model), data, rows=0)
    guide = Factorized(z=(Wide(), ["x"]))
    with torch.no_grad():
        model.likelihood.net.bias[1] = torch.inf
    with pytest.raises(ValueError, match="PPCA emits inf at site 'x'"):
        ranked(model, guide, data)


class Wide(nn.Module):
    def forward(self, x):
        return dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
