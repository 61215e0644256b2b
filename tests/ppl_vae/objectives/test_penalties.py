"""DIP-VAE against numpy's covariances, the discrepancy of InfoVAE against quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from ppl_vae.objectives import DIPVAE, Beta, InfoVAE
from ppl_vae.objectives.aggregate import squared_mmd

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10


@pytest.mark.parametrize("kind", ["I", "II"])
def test_dip_is_the_distance_of_the_covariance_from_the_identity(ppca, losses, kind):
    model, guide, x = ppca
    q = guide.conditionals["z"](x).base_dist
    covariance = np.cov(q.loc.detach().numpy(), rowvar=False, bias=True)
    if kind == "II":
        covariance += np.diag((q.scale**2).mean(0).detach().numpy())
    outside = 2 * covariance[0, 1] ** 2
    diagonal = ((covariance.diagonal() - 1) ** 2).sum()
    plain, _ = losses(Beta(1.0), model, guide, x, total=TOTAL)
    loss, gradients = losses(DIPVAE(3.0, 5.0, kind), model, guide, x, total=TOTAL)
    assert loss - plain == pytest.approx(TOTAL * (3 * outside + 5 * diagonal), rel=1e-10)

    # The penalty reaches the guide's means, and its scales where they are part of it.
    _, without = losses(Beta(1.0), model, guide, x, total=TOTAL)
    by_penalty = gradients[-1] - without[-1]  # of the bias: two locations, then two scales
    assert by_penalty[:2].abs().max() < 1e-9, "a shift changes no covariance"
    assert bool(by_penalty[2:].abs().min() > 1e-3) is (kind == "II")


def kernel(x, y, size):
    multiples = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    squared = np.sum((x - y) ** 2)
    return sum(2 * size * c / (2 * size * c + squared) for c in multiples)


def test_the_estimate_is_a_sum_over_pairs_of_different_draws():
    one, other = torch.randn(5, 3), 1 + torch.randn(4, 3)

    def mean(first, second, *, same):
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if same or i != j]
        values = [kernel(first[i].numpy(), second[j].numpy(), 3) for i, j in pairs]
        return np.mean(values)

    expected = mean(one, one, same=False) + mean(other, other, same=False)
    expected -= 2 * mean(one, other, same=True)
    assert squared_mmd(one, other).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 1.0), (0.0, 0.4)])
def test_the_estimates_mean_is_the_discrepancy(shift, scale):
    """Of normals on the line, whose differences are normals, by quadrature."""

    def mean(loc, deviation):
        density = norm(loc, deviation).pdf
        return quad(lambda d: kernel(d, 0.0, 1) * density(d), -30, 30)[0]

    exact = mean(0, math.sqrt(2)) + mean(0, scale * math.sqrt(2))
    exact -= 2 * mean(shift, math.hypot(1, scale))
    found = torch.stack(
        [squared_mmd(torch.randn(40, 1), shift + scale * torch.randn(40, 1)) for _ in range(1000)]
    )
    error = found.std() / math.sqrt(1000)
    assert abs(found.mean() - exact) < 4 * error
    assert (exact < 1e-9) is (shift == 0 and scale == 1)
    assert exact < 1e-9 or error < 0.05 * exact


@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 10.0), (0.4, 3.0), (1.0, 2.0)])
def test_info_exchanges_part_of_the_kl_for_the_discrepancy(ppca, losses, noise, alpha, lam):
    model, guide, x = ppca
    eps, of_prior = torch.randn(ROWS, 2), torch.randn(ROWS, 2)
    noise(eps, of_prior)
    loss, gradients = losses(InfoVAE(alpha, lam), model, guide, x, total=TOTAL)
    q = guide.conditionals["z"](x).base_dist
    z = q.loc + q.scale * eps
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    sigma = model.likelihood.log_scale.exp()
    seen = dist.Normal(model.likelihood.net(z), sigma).log_prob(x).sum(-1).mean()
    bound = seen - (1 - alpha) * kl - (alpha + lam - 1) * squared_mmd(z, of_prior)
    assert loss == pytest.approx(-TOTAL * bound.item(), rel=1e-12)
    held = [*model.parameters(), *guide.parameters()]
    expected = torch.autograd.grad(-TOTAL * bound, held)
    torch.testing.assert_close(gradients, list(expected))


def test_a_single_row_has_no_discrepancy(ppca, losses):
    model, guide, x = ppca
    half = losses(Beta(0.5), model, guide, x[:1], total=TOTAL)
    torch.testing.assert_close(
        losses(InfoVAE(0.5, 9.0), model, guide, x[:1], total=TOTAL), half, rtol=1e-12, atol=1e-12
    )


def test_the_discrepancy_teaches_a_prior_that_can_learn(losses):
    """Draws of the prior are reparameterized, where they can be."""
    loc = nn.Parameter(torch.tensor([2.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    InfoVAE(1.0, 5.0).loss_and_grads(model, guide, torch.zeros(200, 1))
    assert loc.grad.item() > 1
