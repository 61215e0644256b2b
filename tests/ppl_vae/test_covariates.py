"""Covariates: what a conditional model is given reaches every place that runs it."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import ppl_vae
from ppl_vae import Prior, plots
from ppl_vae.draws import held_out, some_covariates
from ppl_vae.fitting import Fitted
from ppl_vae.gallery import save_gallery
from ppl_vae.guides import MeanField
from ppl_vae.likelihoods import Gaussian
from ppl_vae.model import GenerativeModel
from ppl_vae.models import PPCA, BaselineNet, ConditionalVAE
from ppl_vae.nn import MLP
from ppl_vae.show import graph, story
from ppl_vae.sites import PairError, check_data, check_pair, read_sites

N = 40


class Copy(nn.Module):
    """A net of (z, c), or c alone, that returns c: x is c, with noise."""

    inputs, outputs = 3, 2

    def forward(self, joined: Tensor) -> Tensor:
        return joined[..., -2:] + 0 * joined[..., :1]


def conditional(scale: float = 1e-3) -> ConditionalVAE:
    """x ~ Normal(c, scale); z is idle."""
    torch.manual_seed(0)
    return ConditionalVAE(ppl_vae.priors.StandardNormal(1), Gaussian(Copy(), scale))


def data(scale: float = 1e-3, rows: int = N) -> ppl_vae.data.Dataset:
    """Rows that differ much in c, and hence in x."""
    noise = torch.Generator().manual_seed(1)
    c = 10 * torch.randn(rows, 2, generator=noise)
    x = c + scale * torch.randn(rows, 2, generator=noise)
    columns = {"x": x, "c": c}
    return ppl_vae.data.Dataset("rows", {"train": columns, "test": columns})


def derived(model: GenerativeModel, columns: dict[str, Tensor]) -> MeanField:
    return MeanField(model, MLP(4, 8), **columns)


def test_covariates_are_the_keyword_only_arguments_besides_the_sizes() -> None:
    assert ConditionalVAE.toy().covariates == ("c",)
    assert ConditionalVAE.toy().observables == ("x",)
    assert PPCA.toy().covariates == ()
    assert PPCA.toy().example_covariates(3) == {}
    batch = {"x": torch.zeros(2, 6), "c": torch.eye(2), "y": torch.zeros(2)}
    assert list(ConditionalVAE.toy().observed(batch)) == ["x", "c"]
    assert list(PPCA.toy().observed(batch)) == ["x"]


def test_labels_that_are_given_come_one_hot() -> None:
    class GivenLabels(Mixed):
        classes = 3

        def forward(self, x=None, *, y, n=None, total=None):
            with self.rows(x, y, n=n, total=total):
                pyro.sample("x", dist.Normal(y, 1.0).to_event(1), obs=x)

    model, y = GivenLabels(), torch.tensor([2, 0, 1, 1])
    columns = {"x": torch.randn(4, 3), "y": y}
    rows = ppl_vae.data.Dataset("labels", {"train": columns})
    assert torch.equal(model.observed(columns)["y"], torch.eye(3)[y])
    given = some_covariates(model, rows, 8, seed=0)["y"]
    assert given.shape == (8, 3)
    assert torch.equal(given.sum(0), torch.tensor([2.0, 4.0, 2.0]))


def test_simulate_draws_given_covariates_and_returns_them() -> None:
    model, c = conditional(), torch.tensor([[1.0, 2.0], [30.0, 40.0], [-5.0, 0.0]])
    drawn = model.simulate(3, c=c)
    assert list(drawn) == ["z", "x", "c"]
    assert drawn["c"] is c
    torch.testing.assert_close(drawn["x"], c, atol=0.01, rtol=0)


def test_what_is_missing_or_unknown_is_named() -> None:
    model, rows = conditional(), data()
    missing = r"ConditionalVAE is a model given c: 'c' is missing; pass it by name"
    alone = {"train": {"x": rows.splits["test"]["x"]}, "test": {"x": rows.splits["test"]["x"]}}
    for run in (
        lambda: model.simulate(3),
        lambda: check_data(model, [{"x": torch.zeros(3, 2)}]),
        lambda: MeanField(model, MLP(2, 8), torch.zeros(3, 2)),
        lambda: ppl_vae.evaluate(model, Prior(model), alone),
        lambda: ppl_vae.fit(model, Prior(model), alone),
        lambda: ppl_vae.check(model, Prior(model), alone),
        lambda: ppl_vae.to_arviz(model, Prior(model), alone),
        lambda: plots.samples(model, None, n=3),
        lambda: Prior(model)(torch.zeros(3, 2)),
    ):
        with pytest.raises(ValueError, match=missing):
            run()
    with pytest.raises(TypeError, match=r"simulate takes no 'y': its covariates are c"):
        model.simulate(2, c=torch.eye(2), y=torch.eye(2))
    with pytest.raises(TypeError, match=r"simulate takes no 'c': its covariates are none"):
        PPCA.toy().simulate(2, c=torch.eye(2))
    with pytest.raises(ValueError, match=r"observes x, but the data have columns c"):
        held_out(model, {"train": {"c": torch.eye(2)}}, split="train", rows=2, seed=0)
    with pytest.raises(ValueError, match=r"MeanField was built on x, c; 'c' is missing"):
        derived(model, {"x": torch.zeros(3, 2), "c": torch.zeros(3, 2)}).encode(
            {"x": torch.zeros(3, 2)}
        )

    class Silent(ConditionalVAE):
        example_covariates = GenerativeModel.example_covariates

    with pytest.raises(NotImplementedError, match=r"that is given c needs them"):
        Silent.toy().example_covariates(2)


def test_check_data_judges_what_is_observed_alone() -> None:
    model = ConditionalVAE.toy()  # bits
    check_data(model, [{"x": torch.ones(2, 6), "c": torch.full((2, 2), 7.5)}])
    batch = {"x": torch.ones(2, 6), "c": torch.eye(2)}
    with pytest.raises(PairError, match=r"'x', row 3, hold 0.5"):
        check_data(model, [batch, {**batch, "x": torch.tensor([[1.0], [0.5]]).expand(2, 6)}])


def test_arviz_draws_each_row_given_its_covariates() -> None:
    model, rows = conditional(), data()
    guide = derived(model, rows.split("train").batch(slice(0, 2)))
    tree = ppl_vae.to_arviz(model, guide, rows, rows=5, draws=3)
    c = tree["constant_data"]["c"]
    assert c.dims == ("row", "c_dim")
    chosen = tree["observed_data"]["row"].values
    np.testing.assert_array_equal(c.values, rows.splits["test"]["c"].numpy()[chosen])
    for group in ("posterior_predictive", "prior_predictive"):
        x = tree[group]["x"].values
        assert x.shape == (1, 3, 5, 2)
        np.testing.assert_allclose(x, np.broadcast_to(c.values, x.shape), atol=0.01)
        assert list(tree[group].data_vars) == ["x"]
    assert list(tree["prior"].data_vars) == ["z"]


def test_replicates_are_drawn_given_the_held_out_covariates() -> None:
    model, rows = conditional(1.0), data(1.0, 300)
    only = ["population_predictive"]
    report = ppl_vae.check(model, Prior(model), rows, only=only)
    assert report.passed, str(report)
    # Its c is another row's, so that its mean is not that of the data.
    shifted = {"train": {"x": rows.splits["test"]["x"], "c": rows.splits["test"]["c"] + 1}}
    shifted["test"] = shifted["train"]
    assert not ppl_vae.check(model, Prior(model), shifted, only=only).passed


def test_the_bits_per_dim_are_of_what_is_observed() -> None:
    model, rows = conditional(1.0), data(1.0)
    found = ppl_vae.evaluate(model, Prior(model), rows, samples=2)
    assert found.bits_per_dim == pytest.approx(found.nll / 2 / np.log(2))


def test_pictures_are_given_covariates(tmp_path) -> None:
    model, rows = conditional(), data()
    guide = derived(model, rows.split("train").batch(slice(0, 2)))
    left_out = save_gallery(Fitted(model, guide, rows), tmp_path)
    assert left_out == {}
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"samples", "reconstructions", "interpolation", "traversal"}
    x, c = (rows.splits["test"][name][:4] for name in "xc")
    figure = plots.interpolation(model, guide, x, None, steps=4, covariates={"c": c})
    strips = np.asarray(figure.axes[0].images[0].get_array())
    cells = np.delete(strips, 6, 0).reshape(2, 6, 2)  # a gap between the two lines
    # The covariate changes half way, and x is the covariate.
    expected = torch.stack([c[0::2]] * 2 + [c[1::2]] * 2, 1)
    np.testing.assert_allclose(cells[:, 1:-1], expected.numpy(), atol=1e-4)


def test_a_manifold_is_that_of_the_first_covariates() -> None:
    torch.manual_seed(0)
    model = ConditionalVAE(ppl_vae.priors.StandardNormal(2), Gaussian(MLP(4, 4)))
    c = torch.tensor([[0.0, 5.0], [3.0, 0.0]])
    one, same, other = (
        plots.manifold(model, (1, 2, 2), n=3, covariates={"c": rows})
        for rows in (c, c[:1], c.flip(0))
    )
    shown = [np.asarray(f.axes[0].images[0].get_array()) for f in (one, same, other)]
    np.testing.assert_array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], shown[2])


def test_covariates_to_draw_for_are_a_random_subset_and_again_where_they_run_out() -> None:
    model, rows = conditional(), data()
    few = some_covariates(model, rows, 10, seed=0)["c"]
    assert not torch.equal(few, rows.splits["test"]["c"][:10])
    many = some_covariates(model, rows, N + 10, seed=0)["c"]
    assert torch.equal(many[:10], few)
    assert torch.equal(many[N:], few)
    assert some_covariates(PPCA.toy(), rows, 10, seed=0) == {}


def test_show_names_covariates_and_draws_no_node_for_them() -> None:
    assert "c     covariate   data    (2,)" in story(ConditionalVAE.toy())
    assert graph(ConditionalVAE.toy()).axes


# -- the model's own prior as a guide ----------------------------------------------------------


class Mixed(GenerativeModel):
    """A global latent, a label that may be observed, and a latent below it."""

    def __init__(self, enumerate_labels: bool = False) -> None:
        super().__init__()
        self.rate = pyro.nn.PyroParam(torch.tensor(2.0))
        self.infer = {"enumerate": "parallel"} if enumerate_labels else {}

    def forward(self, x=None, y=None, *, c, n=None, total=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), self.rate).to_event(1))
        with self.rows(x, y, c, n=n, total=total):
            y = pyro.sample("y", dist.Bernoulli(c.sigmoid()).to_event(1), obs=y, infer=self.infer)
            z = pyro.sample("z", dist.Normal(y + c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def columns(**more: Tensor) -> dict[str, Tensor]:
    return {"x": torch.randn(5, 2), "c": torch.randn(5, 2), **more}


@pytest.mark.parametrize("labels", [False, True], ids=["latent", "observed"])
def test_prior_draws_the_latents_from_the_model(labels: bool) -> None:
    torch.manual_seed(0)
    model = Mixed()
    guide = Prior(model)
    given = columns(y=torch.ones(5, 2)) if labels else columns()
    assert list(guide.parameters()) == []
    check_pair(model, guide, **given, total=50)
    sites = read_sites(guide, **given)
    assert list(sites) == (["w", "z"] if labels else ["w", "y", "z"])
    trace = poutine.trace(guide).get_trace(**given, total=50)
    assert trace.nodes["z"]["scale"] == 10
    y = given.get("y", trace.nodes["z"]["fn"].base_dist.loc - given["c"])
    torch.testing.assert_close(trace.nodes["z"]["fn"].base_dist.loc, y + given["c"])


def test_prior_needs_to_draw_all_that_is_latent() -> None:
    model = Mixed(enumerate_labels=True)
    with pytest.raises(PairError, match=r"enumerates site 'y', which this guide would draw"):
        Prior(model)(**columns())
    check_pair(model, Prior(model), **columns(y=torch.ones(5, 2)))


def test_a_model_without_latents_takes_no_other_guide() -> None:
    torch.manual_seed(0)
    model = BaselineNet(Gaussian(MLP(2, 2)))
    rows = data(1.0)
    with pytest.raises(PairError, match=r"no latent for a guide to draw: take ppl_vae.Prior"):
        derived(model, rows.split("train").batch(slice(0, 2)))
    fitted = ppl_vae.fit(model, Prior(model), rows, epochs=300, learning_rate=0.05, progress=False)
    x, c = (rows.splits["train"][name].double() for name in "xc")
    c = torch.cat([c, torch.ones(N, 1).double()], 1)
    residual = x - c @ torch.linalg.lstsq(c, x).solution
    best = dist.Normal(0.0, 1.0).log_prob(residual).sum(1).mean().item()
    found = ppl_vae.evaluate(model, Prior(model), rows, samples=1)
    assert found.nll == pytest.approx(-best, abs=1e-3)
    assert (found.elbo, found.kl) == (pytest.approx(-found.nll), 0)
    assert fitted.history[-1]["kl"] == 0
