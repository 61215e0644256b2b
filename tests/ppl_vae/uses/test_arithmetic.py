"""Arithmetic of latents, which is exact where the decoder is linear."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from benchmarks.conjugate import exact
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.conditional import BaselineNet, ConditionalVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.uses import analogy, analogy_figure, attribute_direction, shift, shift_figure

HAVE = torch.arange(40) % 3 == 0


@pytest.fixture
def model(float64):
    torch.manual_seed(3)
    return PPCA(2, 5, scale=0.7).requires_grad_(False)


@pytest.fixture
def x(model):
    torch.manual_seed(4)
    return model.simulate(40)["x"] + HAVE.unsqueeze(1) * torch.tensor([2.0, 0.0, -1.0, 0.0, 1.0])


def test_with_a_linear_decoder_all_is_linear(model, x):
    guide = exact(model)
    centers = model.posterior(x).mean
    found = attribute_direction(model, guide, {"train": x}, HAVE)
    wanted = centers[HAVE].mean(0) - centers[~HAVE].mean(0)
    torch.testing.assert_close(found.steps["z"], wanted)
    assert (found.present, found.absent) == (14, 26)
    weight, loc, _ = model._linear_map()
    means = shift(model, guide, x[:3], found, [-1.0, 0.0, 2.0])
    for amount, one in zip([-1.0, 0.0, 2.0], means, strict=True):
        torch.testing.assert_close(one, (centers[:3] + amount * wanted) @ weight.T + loc)
    a, b, c = centers[0], centers[1], centers[2:5]
    torch.testing.assert_close(
        analogy(model, guide, x[:1], x[1:2], x[2:5]), (c + b - a) @ weight.T + loc
    )
    assert torch.equal(
        analogy(model, guide, x[:3], x[:3], x[2:5]), shift(model, guide, x[2:5], found, [0])[0]
    )


def test_a_class_is_an_attribute_and_batches_do_not_matter(model, x, monkeypatch):
    guide, y = exact(model), torch.arange(40) % 3
    whole = attribute_direction(model, guide, {"train": {"x": x, "y": y}}, 0)
    monkeypatch.setattr("ppl_vae.uses.arithmetic._AT_ONCE", 7)
    parts = attribute_direction(model, guide, {"train": x}, HAVE)
    torch.testing.assert_close(whole.steps["z"], parts.steps["z"])


class Centered(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_bounded_sites_move_on_the_unconstrained_scale_and_discrete_ones_stay(program, float64):
    def story(self, x):
        r = pyro.sample("r", dist.Gamma(torch.ones(1), 1.0).to_event(1))
        d = pyro.sample("d", dist.Bernoulli(torch.full((1,), 0.5)).to_event(1))
        return pyro.sample("x", dist.Normal(torch.cat([r, d], -1), 1.0).to_event(1), obs=x)

    model = program(story)
    guide = Factorized(
        r=(Centered(lambda x: dist.Gamma(x[:, :1].exp(), 1.0).to_event(1)), ["x"]),
        d=(Centered(lambda x: dist.Bernoulli(logits=x[:, 1:]).to_event(1)), ["x"]),
    )
    x = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 1.0], [0.5, -1.0]])
    found = attribute_direction(
        model, guide, {"train": x}, torch.tensor([False, True, False, False])
    )
    assert set(found.steps) == {"r"}
    torch.testing.assert_close(found.steps["r"], torch.tensor([1.0 - 1 / 3]))
    means = shift(model, guide, x, found, [3.0])[0]
    torch.testing.assert_close(means[:, 0], (x[:, 0] + 3 * (1.0 - 1 / 3)).exp())
    assert means[:, 1].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_covariates_stay_those_of_the_rows(float64):
    torch.manual_seed(0)
    model = ConditionalVAE.toy()
    c = model.example_covariates(6)["c"]
    x = model.simulate(6, c=c)["x"]
    guide = MeanField(model, MLP(x.shape[1] + c.shape[1], 8, 7), x=x, c=c)
    found = attribute_direction(model, guide, {"train": {"x": x, "c": c}}, x[:, 0] == x[0, 0])
    means = shift(model, guide, {"x": x, "c": c}, found, [0.0, 1.0])
    assert means.shape == (2, 6, 6)
    other = shift(model, guide, {"x": x, "c": c.flip(1)}, found, [0.0])
    assert not torch.allclose(means[0], other[0])


def test_figures_have_a_cell_for_each_mean(model, x):
    guide = exact(model)
    direction = attribute_direction(model, guide, {"train": x}, HAVE)
    figure = shift_figure(model, guide, x[:3], direction, [-1.0, 0.0, 1.0], (1, 1, 5))
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["data", "-1", "0", "+1"]
    figure = analogy_figure(model, guide, x[:1], x[1:2], x[2:5], (1, 5, 1))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c", "c + b - a"]
    assert shift_figure(model, guide, x[:3], direction, [0.0], None).axes
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (HAVE[:3], "one for each of the 40 rows"),
        (HAVE.double(), "expected bool"),
        (HAVE | ~HAVE, "40 of 40 rows have the attribute"),
        (1, "no labels"),
    ],
)
def test_attributes_that_are_refused(model, x, attribute, message):
    with pytest.raises(ValueError, match=message):
        attribute_direction(model, exact(model), {"train": x}, attribute)


def test_what_else_is_refused(model, x, program, float64):
    guide = exact(model)
    direction = attribute_direction(model, guide, {"train": x}, HAVE)
    with pytest.raises(ValueError, match="no amounts"):
        shift(model, guide, x, direction, [])
    with pytest.raises(ValueError, match="2, 3 and 4 rows"):
        analogy(model, guide, x[:2], x[:3], x[:4])
    plain = BaselineNet.toy()
    c = plain.example_covariates(4)["c"]
    rows = {"x": plain.simulate(4, c=c)["x"], "c": c}
    with pytest.raises(ValueError, match="no local continuous latent"):
        shift(plain, Prior(plain), rows, direction, [1.0])


def test_leaves_the_random_state_and_the_mode(model, x):
    state = torch.get_rng_state()
    direction = attribute_direction(model, exact(model), {"train": x}, HAVE)
    shift(model, exact(model), x, direction, [1.0])
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
