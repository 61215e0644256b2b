"""BetaTC and FactorVAE: total correlations in closed form, densities by enumeration."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ppl_vae.conditionals import Conditional
from ppl_vae.guide import Factorized
from ppl_vae.objectives import Beta, BetaTC, FactorVAE
from ppl_vae.svi import parameters
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10
PARTS = ("alpha", "beta", "gamma")
A = torch.tensor([[1.0, 0.3], [0.9, 0.2]], dtype=torch.float64)
SCALES = torch.tensor([0.7, 0.7], dtype=torch.float64)


class Linear(Conditional):
    """q(z | x) = Normal(A x, SCALES)."""

    def __init__(self):
        super().__init__(nn.Identity())

    def distribution(self, parameters):
        return pyro.distributions.Normal(parameters @ A.T, SCALES).to_event(1)


def linear_pair():
    """x ~ Normal(0, I), and q(z) = Normal(0, A A' + SCALES^2)."""

    def model(x, total=None):
        with pyro.plate("data", total or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, Factorized(z=(Linear(), ["x"]))


def loss_of(objective, model, guide, x, seed=1, **options):
    pyro.set_rng_seed(seed)
    return objective.loss(model, guide, x, **options).item()


def parts(objective, *args, **options):
    """The three parts of the KL of ten rows, by what raising the weight of each adds to the loss,
    a row."""
    plain = loss_of(objective(), *args, **options)
    return [(loss_of(objective(**{p: 2.0}), *args, **options) - plain) / TOTAL for p in PARTS]


def of_estimator(estimator):
    return lambda alpha=1.0, beta=1.0, gamma=1.0: BetaTC(beta, alpha, gamma, estimator)


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_the_parts_add_up_to_the_kl_of_the_draws(ppca, losses, noise, estimator):
    model, guide, x = ppca
    eps = torch.randn(ROWS, 2)
    noise(eps)
    q = guide.conditionals["z"](x).base_dist
    z = q.loc + q.scale * eps
    kl = (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).sum()
    sigma = model.likelihood.log_scale.exp()
    seen = torch.distributions.Normal(model.likelihood.net(z), sigma).log_prob(x).sum()
    objective = of_estimator(estimator)
    found = parts(objective, model, guide, x, total=TOTAL)
    assert sum(found) == pytest.approx(kl.item() / ROWS, rel=1e-10)
    loss, gradients = losses(objective(), model, guide, x, total=TOTAL)
    assert loss == pytest.approx(TOTAL / ROWS * (kl - seen).item(), rel=1e-12)
    expected = torch.autograd.grad(
        TOTAL / ROWS * (kl - seen), parameters(model, guide), retain_graph=True
    )
    torch.testing.assert_close(gradients, list(expected))
    training = Training(objective(), TOTAL)
    training.weight = 0.3
    loss, _ = losses(training, model, guide, x, total=TOTAL)
    assert loss == pytest.approx((0.3 * kl - seen).item() / ROWS, rel=1e-12)


def by_hand(q, z, weights):
    """Information, total correlation and the coordinates' KL, mean over rows, of a mixture whose
    weights ``(rows, rows)`` may differ from draw to draw."""
    found = []
    for i in range(len(z)):
        at = torch.distributions.Normal(q.loc, q.scale).log_prob(z[i]).exp()  # (rows, Z)
        joint = (weights[i] * at.prod(-1)).sum().log()
        marginals = (weights[i].unsqueeze(-1) * at).sum(0).log().sum()
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[i]).sum()
        found.append((at[i].prod().log() - joint, joint - marginals, marginals - prior))
    return [torch.stack(each).mean().item() for each in zip(*found, strict=True)]


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_densities_are_sums_over_the_batch(ppca, noise, estimator):
    model, guide, x = ppca
    eps = torch.randn(ROWS, 2)
    noise(eps)
    q = guide.conditionals["z"](x).base_dist
    weights = torch.full((ROWS, ROWS), 1 / (ROWS * TOTAL))
    if estimator == "stratified":
        for i in range(ROWS):
            weights[i] = 1 / 3
            weights[i, i] = 1 / TOTAL
            weights[i, i - 1] = (TOTAL - 3) / (3 * TOTAL)
        assert torch.allclose(weights.sum(1), torch.ones(ROWS))
    found = parts(of_estimator(estimator), model, guide, x, total=TOTAL)
    assert found == pytest.approx(by_hand(q, q.loc + q.scale * eps, weights), rel=1e-9)


def test_the_weighted_estimate_of_all_rows_is_off_by_the_logarithm_of_their_number(ppca, noise):
    model, guide, _ = ppca
    x, eps = torch.randn(TOTAL, 3), torch.randn(TOTAL, 2)
    noise(eps)
    q = guide.conditionals["z"](x).base_dist
    mixture = torch.full((TOTAL, TOTAL), 1 / TOTAL)
    exact = by_hand(q, q.loc + q.scale * eps, mixture)
    found = parts(of_estimator("weighted"), model, guide, x)
    off = math.log(TOTAL)
    assert found == pytest.approx([exact[0] + off, exact[1] + off, exact[2] - 2 * off], rel=1e-9)


class Kept(BetaTC):
    """Keeps its estimates of log q(z) and log q(z_d)."""

    def loss_of(self, terms):
        self.kept = self.aggregate(terms, "z")
        return super().loss_of(terms)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_stratified_density_is_unbiased(noise, size):
    """Its mean over all batches in which a row stands at some place is the exact mixture."""
    model, guide = linear_pair()
    data, eps = torch.randn(4, 2), torch.randn(4, 2)
    q = torch.distributions.Normal(data @ A.T, SCALES)
    z = q.loc + SCALES * eps
    exact = q.log_prob(z.unsqueeze(1)).exp()  # of each draw under each row
    objective = Kept(1.0)
    found = {(row, place): [] for row in range(4) for place in range(size)}
    for batch in itertools.permutations(range(4), size):
        noise(eps[list(batch)])
        objective.loss(model, guide, data[list(batch)], total=4)
        for place, row in enumerate(batch):
            joint, marginals = objective.kept
            found[row, place].append(torch.cat([joint[place : place + 1], marginals[place]]).exp())
    for (row, _), densities in found.items():
        mixture = torch.cat([exact[row].prod(-1, keepdim=True), exact[row]], -1).mean(0)
        torch.testing.assert_close(torch.stack(densities).mean(0), mixture)


def test_of_gaussians_the_estimate_is_near_the_closed_form():
    model, guide = linear_pair()
    covariance = A @ A.T + SCALES.diag() ** 2
    correlation = covariance[0, 1] / covariance.diagonal().prod().sqrt()
    exact = -0.5 * math.log(1 - correlation.item() ** 2)
    information = 0.5 * (covariance.logdet() - 2 * SCALES.log().sum()).item()
    divergence = 0.5 * (covariance.trace() - 2 - covariance.diagonal().log().sum()).item()
    found = []
    for seed in range(1, 9):
        x, size = torch.randn(700, 2), 1_000_000
        scale = TOTAL / size
        each = parts(of_estimator("stratified"), model, guide, x, total=size, seed=seed)
        found.append(torch.tensor(each) * scale)
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(8)
    expected = torch.tensor([information, exact, divergence])
    assert exact > 0.2
    # A log of a mean of 700 densities is too low by half its relative variance.
    assert ((mean - expected).abs() < 4 * error + 0.01).all(), (mean, expected, error)
    assert (error < 0.02).all()


def test_a_single_row_is_its_own_aggregate(ppca):
    model, guide, x = ppca
    for total, information in ((1, 0.0), (5, math.log(5))):
        found = parts(of_estimator("stratified"), model, guide, x[:1], total=total)
        assert found[0] * TOTAL / total == pytest.approx(information, abs=1e-12)


# -- FactorVAE ---------------------------------------------------------------------------------


class Spy(nn.Module):
    """A discriminator that keeps what it is shown."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shown = net, []

    def forward(self, z):
        self.shown.append(z)
        return self.net(z)


@pytest.mark.parametrize("gamma", [0.0, 6.0])
def test_the_pair_and_the_discriminator_learn_apart(ppca, losses, noise, gamma):
    model, guide, x = ppca
    eps = torch.randn(ROWS, 2)
    noise(eps)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    objective = FactorVAE(Spy(net), gamma)
    loss, gradients = losses(objective, model, guide, x, total=TOTAL)
    fixed, own, permuted = objective.state.shown
    of_pair, of_net = parameters(model, guide), parameters(net)
    assert len(gradients) == len(of_pair) + len(of_net)
    assert not own.requires_grad
    assert not permuted.requires_grad

    # The pair's loss is ELBO and penalty by a discriminator that stands still.
    q = guide.conditionals["z"](x).base_dist
    z = q.loc + q.scale * eps
    torch.testing.assert_close(fixed, z)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    noise_scale = model.likelihood.log_scale.exp()
    seen = torch.distributions.Normal(model.likelihood.net(z), noise_scale).log_prob(x).sum()
    expected = TOTAL / ROWS * (kl - seen + gamma * net(z).sum())
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        gradients[: len(of_pair)], list(torch.autograd.grad(expected, of_pair))
    )
    # The discriminator's is the cross-entropy of what it was shown, whatever gamma is.
    entropy = sum(
        binary_cross_entropy_with_logits(net(shown), torch.full((ROWS, 1), label))
        for shown, label in ((own, 1.0), (permuted, 0.0))
    )
    slopes = torch.autograd.grad(TOTAL * entropy / 2, of_net)
    torch.testing.assert_close(gradients[len(of_pair) :], list(slopes))


def test_a_permutation_keeps_each_marginal(ppca, losses):
    model, guide, _ = ppca
    x = torch.randn(200, 3)
    objective = FactorVAE(Spy(nn.Linear(2, 1)))
    losses(objective, model, guide, x)
    _, own, permuted = objective.state.shown
    assert torch.equal(own.sort(0).values, permuted.sort(0).values)
    assert (own != permuted).any(1).float().mean() > 0.9
    moved = [(own[:, d] == permuted[:, d].unsqueeze(1)).int().argmax(1) for d in (0, 1)]
    assert (moved[0] != moved[1]).float().mean() > 0.9, "coordinates are permuted apart"


class Quadratic(nn.Module):
    """Logits ``z' M z + b``."""

    def __init__(self, matrix, bias):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(matrix), nn.Parameter(bias)

    def forward(self, z):
        return ((z @ self.matrix) * z).sum(-1, keepdim=True) + self.bias


def optimal():
    """log q(z) - log q(z_1) - log q(z_2), for the linear pair; and its mean, the correlation."""
    covariance = A @ A.T + SCALES.diag() ** 2
    alone = covariance.diagonal().diag()
    matrix = 0.5 * (alone.inverse() - covariance.inverse())
    bias = 0.5 * (alone.logdet() - covariance.logdet())
    return Quadratic(matrix, bias), bias.item()


def test_the_best_discriminator_gives_the_total_correlation(losses):
    model, guide = linear_pair()
    discriminator, correlation = optimal()
    found, slopes = [], []
    for seed in range(1, 21):
        x = torch.randn(1000, 2)
        plain = loss_of(Beta(1.0), model, guide, x, seed=seed)
        loss, gradients = losses(FactorVAE(discriminator, 3.0), model, guide, x, seed=seed)
        found.append((loss - plain) / 3000)
        slopes.append(torch.cat([g.flatten() for g in gradients]) / 1000)
    found, slopes = torch.tensor(found), torch.stack(slopes)
    error = found.std() / math.sqrt(20)
    assert abs(found.mean() - correlation) < 4 * error
    assert error < 0.1 * correlation
    # And it learns nothing more.
    assert (slopes.mean(0).abs() < 4 * slopes.std(0) / math.sqrt(20)).all()
    wrong = Quadratic(torch.zeros(2, 2), torch.zeros(()))
    _, gradients = losses(FactorVAE(wrong), model, guide, torch.randn(1000, 2))
    assert gradients[0][0, 1].abs() > 0.05 * 1000
    assert gradients[0][0, 1] < 0, "towards the correlation, which is positive"


def test_under_pyros_svi_the_discriminator_learns_too(ppca):
    model, guide, x = ppca
    discriminator = nn.Linear(2, 1)
    before = discriminator.weight.detach().clone()
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), FactorVAE(discriminator))
    for _ in range(2):
        svi.step(x)
    assert not torch.equal(discriminator.weight, before)
    assert discriminator.weight.grad is None or not discriminator.weight.grad.any()


def test_objectives_say_how_they_were_made():
    net = nn.Linear(2, 1)
    assert repr(FactorVAE(net, 4.0)) == "FactorVAE(gamma=4.0)"
    assert repr(BetaTC(6.0)) == "BetaTC(beta=6.0, alpha=1.0, gamma=1.0, estimator='stratified')"
