"""What is read off a pair's rows, against Pyro's sums."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.nn import MLP
from ppl_vae.objectives import (
    DIPVAE,
    IWAE,
    Beta,
    BetaTC,
    Capacity,
    DReG,
    FreeBits,
    StickingTheLanding,
)

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10


def of_ppca(ppca):
    return ppca


def of_global(ppca):
    """A global latent, and one on the positive half-line."""
    model = Template.toy()
    x = model.simulate(ROWS)["x"]
    return model, MeanField(model, nn.Linear(4, 3), x=x), x


def of_levels(ppca):
    model = Hierarchy.toy()
    x = model.simulate(ROWS)["x"]
    return model, MeanField(model, MLP(6, 3), x=x), x


def scaled(handler):
    def make(ppca):
        model, guide, x = ppca
        return handler(model), handler(guide), x

    return make


def with_data_masked(ppca):
    """Some entries of x are missing: the latent counts."""
    model, guide, x = ppca

    class Missing(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "x":
                msg["mask"] = torch.tensor([True, False, True, True])

    return Missing()(model), guide, x


def with_weights(ppca):
    """Two observed sites, of which one counts less; a latent that counts more."""
    _, guide, x = ppca
    net = nn.Linear(2, 3)

    def model(x, total=None):
        with pyro.plate("data", total or len(x), subsample=torch.arange(len(x))):
            with poutine.scale(scale=2.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Laplace(net(z), 1.0).to_event(1), obs=x)

    return model, poutine.scale(guide, scale=2.0), x


PAIRS = {
    "one site": of_ppca,
    "global": of_global,
    "global scaled": lambda ppca: scaled(lambda p: poutine.scale(p, scale=0.3))(of_global(ppca)),
    "levels": of_levels,
    "scaled": scaled(lambda program: poutine.scale(program, scale=0.3)),
    "rows scaled": scaled(
        lambda program: poutine.scale(program, scale=torch.tensor([1.0, 2.0, 0.5, 3.0]))
    ),
    "rows masked": scaled(
        lambda program: poutine.mask(program, mask=torch.tensor([True, False, True, False]))
    ),
    "data masked": with_data_masked,
    "sites weighted": with_weights,
}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_weight_of_1_gives_the_elbo(ppca, losses, pair, draws):
    model, guide, x = PAIRS[pair](ppca)
    several = {"num_particles": draws, "max_plate_nesting": 1, "vectorize_particles": True}
    closed = losses(TraceMeanField_ELBO(**several), model, guide, x, total=TOTAL)
    torch.testing.assert_close(losses(Beta(1.0, draws), model, guide, x, total=TOTAL), closed)
    if pair.startswith("global"):
        return
    loss, _ = losses(Trace_ELBO(**several), model, guide, x, total=TOTAL)
    assert losses(StickingTheLanding(draws), model, guide, x, total=TOTAL)[0] == pytest.approx(loss)
    if draws == 1:
        for objective in (IWAE(1), DReG(1)):
            assert losses(objective, model, guide, x, total=TOTAL)[0] == pytest.approx(loss)


def observed(x):
    """No latent a row, one for all; a factor outside the rows."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("penalty", -pyro.param("p", torch.tensor(0.7)).square())
    with pyro.plate("images", TOTAL, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def guide_of_observed(x):
    loc = pyro.param("loc", torch.ones(3))
    pyro.sample("w", dist.Normal(loc, 0.5).to_event(1))


@pytest.mark.parametrize("objective", [Beta(4.0), Capacity(1.0, 0), FreeBits(1.0)], ids=repr)
def test_rows_without_latents_leave_the_elbo(objective):
    x, found = torch.randn(ROWS, 3), []
    for how in (objective, Trace_ELBO()):
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        loss = how.loss_and_grads(observed, guide_of_observed, x)
        store = pyro.get_param_store().named_parameters()
        found.append((float(loss), {name: p.grad for name, p in store}))
    if isinstance(objective, Capacity):
        found[0] = found[0][0] - TOTAL * objective.gamma * 1.0, found[0][1]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "objective",
    [IWAE(2), DReG(2), StickingTheLanding(2), BetaTC(3.0), DIPVAE(1.0, 1.0), FreeBits(0.1)],
    ids=repr,
)
def test_an_objective_takes_in_what_stands_outside_the_rows(objective):
    """A factor, here a penalty of a parameter."""
    strength = nn.Parameter(torch.tensor(0.7))

    def model(x):
        pyro.factor("penalty", -strength.square())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = torch.randn(ROWS, 2)
    values = []
    for value in (0.7, 0.0):
        pyro.set_rng_seed(0)
        strength.data.fill_(value)
        values.append(objective.loss(model, guide, x).item())
    assert values[0] - values[1] == pytest.approx(0.49)
    strength.data.fill_(0.7)
    objective.loss_and_grads(model, guide, x)
    assert strength.grad.item() == pytest.approx(1.4)


def levels(first, second, scale):
    def program(x):
        with pyro.plate("data", len(x)):
            above = pyro.sample(first, dist.Normal(torch.zeros(1), scale).to_event(1))
            pyro.sample(second, dist.Normal(above, 1.0).to_event(1))

    return program


@pytest.mark.parametrize(
    "objective", [Beta(1.0), FreeBits(0.0), FreeBits(0.0, "site"), FreeBits(0.0, "all")], ids=repr
)
def test_a_guide_in_another_order_has_the_kl_of_its_draws(objective):
    """q(z1) q(z2 | z1) against p(z2) p(z1 | z2): a KL given z2 is no term of it."""
    programs, x = (levels("z2", "z1", 1.0), levels("z1", "z2", 0.5)), torch.zeros(20_000, 1)
    # E log q(z1) - E log p(z1 | z2) = log 2, and E log q(z2 | z1) - E log p(z2) = 1/8.
    kl = objective.loss(*programs, x).item() / len(x)
    assert kl == pytest.approx(math.log(2) + 1 / 8, abs=0.03)
