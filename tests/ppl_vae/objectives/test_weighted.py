"""KLs weighted, steered and bounded: by plain formulas of the very draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from ppl_vae.conditionals import Normal
from ppl_vae.guide import Factorized
from ppl_vae.objectives import Beta, Capacity, FreeBits
from ppl_vae.svi import parameters
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10


class Hand:
    """A pair and its terms by plain formulas, of draws made of given noise."""

    def __init__(self, pair, noise):
        self.model, self.guide, self.x = pair
        self.noise = noise
        self.parameters = parameters(self.model, self.guide)

    @property
    def posterior(self):
        loc, raw = self.guide.conditionals["z"].net(self.x).chunk(2, -1)
        return loc, nn.functional.softplus(raw)

    def reconstruction(self, eps):
        """``(rows,)``."""
        loc, scale = self.posterior
        z = loc + scale * eps
        loc, scale = self.model.likelihood.net(z), self.model.likelihood.log_scale.exp()
        return torch.distributions.Normal(loc, scale).log_prob(self.x).sum(-1).mean(0)

    @property
    def kl(self):
        """In closed form, ``(rows, Z)``."""
        loc, scale = self.posterior
        return 0.5 * (loc**2 + scale**2 - 1) - scale.log()

    def check(self, objective, loss_of, draws=1):
        """Loss and gradients are those of a formula of (reconstruction, kl)."""
        for p in self.parameters:
            p.grad = None
        eps = torch.randn(draws, ROWS, 2)
        self.noise(eps)
        loss = objective.loss_and_grads(self.model, self.guide, self.x, total=TOTAL)
        expected = loss_of(self.reconstruction(eps), self.kl)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
        gradients = torch.autograd.grad(expected, self.parameters)
        torch.testing.assert_close([p.grad for p in self.parameters], list(gradients))


@pytest.fixture
def hand(ppca, noise):
    return Hand(ppca, noise)


@pytest.mark.parametrize("draws", [1, 3])
def test_beta_multiplies_the_kl_and_a_warm_up_multiplies_beta(hand, draws):
    objective = Beta(2.5, draws)
    share = TOTAL / ROWS
    hand.check(objective, lambda r, kl: share * (2.5 * kl.sum() - r.sum()), draws)
    training = Training(objective, TOTAL)
    training.weight = 0.3
    hand.check(training, lambda r, kl: (0.75 * kl.sum() - r.sum()) / ROWS, draws)


def test_capacity_rises_in_a_straight_line_and_stays():
    objective = Capacity(6.0, 8)
    assert objective.ends == 8
    capacities = []
    for epoch in (0, 2, 5, 8, 8.1, 100):
        objective.at(epoch)
        capacities.append(objective.capacity.item())
    assert capacities == [0, 1.5, 3.75, 6, 6, 6]
    assert Capacity(6.0, 0).capacity == 6


@pytest.mark.parametrize("draws", [1, 3])
def test_capacity_holds_each_rows_kl_from_both_sides(hand, draws):
    """C lies between the rows' KLs, so that some are pushed up and some down."""
    kls = hand.kl.sum(-1)
    objective = Capacity(2 * kls.median().item() + 0.02, 4, gamma=7.0, draws=draws)
    objective.at(2)
    assert 0 < (kls < objective.capacity).sum() < ROWS
    held = objective.capacity.item()

    def loss(r, kl):
        return TOTAL / ROWS * (7 * (kl.sum(-1) - held).abs().sum() - r.sum())

    hand.check(objective, loss, draws)


def test_capacity_is_of_the_mean_of_a_rows_draws():
    """Where the KL has no closed form: the distance of the mean, not the mean distance."""
    values = []

    def program(family):
        def run(x):
            with pyro.plate("data", len(x)):
                values.append(pyro.sample("z", family.to_event(1)))

        return run

    model, guide = (
        program(dist.Gamma(torch.ones(1), 1.0)),
        program(dist.LogNormal(torch.zeros(1), 1)),
    )
    loss = Capacity(0.2, 0, gamma=1.0, draws=5).loss(model, guide, torch.zeros(3, 1))
    z = values[0].squeeze(-1)  # (5, 3)
    kl = torch.distributions.LogNormal(0.0, 1.0).log_prob(z) + z
    assert loss.item() == pytest.approx((kl.mean(0) - 0.2).abs().sum().item(), rel=1e-12)
    assert loss.item() < (kl - 0.2).abs().mean(0).sum().item() - 0.01


GROUPS = {
    "latent": lambda kl, nats: kl.mean(0).clamp(min=nats).sum(),
    "site": lambda kl, nats: kl.sum(-1).mean(0).clamp(min=nats),
    "all": lambda kl, nats: kl.sum(-1).mean(0).clamp(min=nats),
}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.01, 2.0])
@pytest.mark.parametrize("per", GROUPS)
def test_free_bits_bound_the_batchs_mean_kl_of_a_group_from_below(hand, per, share, draws):
    groups = hand.kl.mean(0) if per == "latent" else hand.kl.mean(0).sum()
    nats = share * groups.max().item()
    objective = FreeBits(nats, per, draws)

    def loss(r, kl):
        bounded = GROUPS[per](kl, nats)
        assert bounded >= nats
        return TOTAL * (bounded - r.mean())

    hand.check(objective, loss, draws)
    training = Training(objective, TOTAL)
    training.weight = 0.3
    hand.check(training, lambda r, kl: 0.3 * GROUPS[per](kl, nats) - r.mean(), draws)


@pytest.mark.parametrize("per", GROUPS)
def test_the_mean_is_by_what_rows_count(hand, per):
    counts = torch.tensor([1.0, 2.0, 0.5, 4.0])
    share = counts / counts.sum()
    kl = (share.unsqueeze(-1) * hand.kl).sum(0, keepdim=True)
    programs = [poutine.scale(program, scale=counts) for program in (hand.model, hand.guide)]
    eps = torch.randn(1, ROWS, 2)
    for nats in (0.5 * kl.max().item(), 2 * kl.sum().item()):
        hand.noise(eps)
        loss = FreeBits(nats, per).loss(*programs, hand.x).item()
        bound = counts.sum() * GROUPS[per](kl, nats) - (counts * hand.reconstruction(eps)).sum()
        assert loss == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize("per", GROUPS)
def test_below_the_floor_the_kl_has_no_gradient_at_all(hand, per):
    """Not even by rounding, which Adam would follow."""
    nn.init.zeros_(hand.model.likelihood.net.weight)
    of_guide = parameters(hand.guide)
    for nats, moves in ((100.0, False), (0.0, True)):
        for p in of_guide:
            p.grad = None
        FreeBits(nats, per).loss_and_grads(hand.model, hand.guide, hand.x, total=TOTAL)
        assert all(bool(p.grad.any()) is moves for p in of_guide)


def two_sites(x, total=None):
    with pyro.plate("data", total or len(x), subsample=torch.arange(len(x))):
        for name, size in (("a", 1), ("b", 3)):
            pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("nats", [0.0, 0.05, 0.2, 1.0, 9.0])
def test_of_several_sites_each_group_has_a_floor_of_its_own(nats):
    q_a, q_b = Normal(nn.Linear(1, 2)), Normal(nn.Linear(1, 6))
    one = math.log(math.e - 1)  # a scale of 1, before softplus
    q_a.net.bias.data = torch.tensor([0.2, one])
    q_b.net.bias.data = torch.tensor([0.1, 1.0, 0.3, one, one, one])
    for net in (q_a.net, q_b.net):
        net.weight.data *= 0.02
    guide = Factorized(a=(q_a, ["x"]), b=(q_b, ["x"]))
    x = torch.randn(ROWS, 1)
    kls = []  # of coordinates: (rows, Z)
    for conditional in (q_a, q_b):
        base = conditional(x).base_dist
        kls.append(kl_divergence(base, torch.distributions.Normal(0.0, 1.0)).mean(0))
    expected = {
        "latent": sum(kl.clamp(min=nats).sum() for kl in kls),
        "site": sum(kl.sum().clamp(min=nats) for kl in kls),
        "all": sum(kl.sum() for kl in kls).clamp(min=nats),
    }
    evidence = torch.distributions.Normal(0.0, 1.0).log_prob(x).mean().item()
    for per, kl in expected.items():
        loss = FreeBits(nats, per).loss(two_sites, guide, x, total=TOTAL).item() / TOTAL
        assert loss == pytest.approx(kl.item() - evidence, rel=1e-12)
    if 0.05 <= nats <= 1:
        assert len({round(kl.item(), 9) for kl in expected.values()}) == 3


def test_free_bits_of_a_scalar_site():
    """A latent that is one number a row is one coordinate."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([1.0, 2.0])
    assert FreeBits(0.1).loss(model, guide, x).item() == pytest.approx(0.5 * (1 + 4))
    assert FreeBits(3.0).loss(model, guide, x).item() == pytest.approx(6.0)
    assert not math.isnan(FreeBits(3.0, "all").loss(model, guide, x).item())
