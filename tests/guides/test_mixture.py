"""Mixtures of normals as posteriors: densities, gradients of draws, two modes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from ppl_vae.centers import center
from ppl_vae.conditionals import constrained
from ppl_vae.graphs import record
from ppl_vae.guides.mixture import DiagonalMixture, Mixture
from ppl_vae.model import own_parameters
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

LOCS = torch.tensor([[0.0, 0.3], [1.2, -0.8], [-0.7, 0.9]], dtype=torch.float64)
SCALES = torch.tensor([[0.7, 0.5], [1.3, 0.4], [0.5, 1.1]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64)


def test_density_and_mean_are_those_of_the_mixture():
    locs, scales, logits = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.2, torch.randn(4, 3)
    q = DiagonalMixture(locs, scales, logits)
    other = dist.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Independent(torch.distributions.Normal(locs, scales), 1),
    )
    value = 3 * torch.randn(5, 4, 2)
    for same in (q, q.expand([5, 4])):
        assert isinstance(same, DiagonalMixture)
        torch.testing.assert_close(same.log_prob(value), other.log_prob(value))
        torch.testing.assert_close(same.mean, other.mean.expand(*same.batch_shape, 2))
    assert q.rsample((7,)).shape == (7, 4, 2)
    assert q.expand([5, 4]).rsample((7,)).shape == (7, 5, 4, 2)
    # Pictures show the center of a posterior on its support.
    positive = constrained(q, dist.Gamma(1.0, 1.0).expand([2]).to_event(1).support, torch.Size([2]))
    torch.testing.assert_close(center(positive), other.mean.exp())


def grid(dims: int) -> tuple[torch.Tensor, float]:
    axis = torch.linspace(-8, 8, 641)
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims), float(axis[1] - axis[0]) ** dims


@pytest.mark.parametrize("dims", [1, 2])
def test_gradients_of_draws_are_those_of_the_expectation(dims):
    """Against quadrature; every draw has a gradient of its own, whence the standard error."""
    draws = 100_000

    def integrand(z):
        return (0.9 * z.sum(-1)).cos() + z[..., 0].sin()

    points, volume = grid(dims)
    leaves = [t.clone().requires_grad_() for t in (LOCS[:, :dims], SCALES[:, :dims], LOGITS)]
    density = DiagonalMixture(*leaves).log_prob(points).exp()
    assert float(volume * density.detach().sum()) == pytest.approx(1, abs=1e-6)
    expected = torch.autograd.grad(volume * (density * integrand(points)).sum(), leaves)

    each = [t.detach().expand(draws, *t.shape).clone().requires_grad_() for t in leaves]
    z = DiagonalMixture(*each).rsample()
    found = torch.autograd.grad(integrand(z).sum(), each)
    for gradient, true in zip(found, expected, strict=True):
        error = gradient.std(0) / draws**0.5
        assert (error < 0.02).all()
        torch.testing.assert_close(
            (gradient.mean(0) - true) / (4 * error), 0 * true, rtol=0, atol=1
        )


@pytest.mark.parametrize("dims", [1, 2])
def test_draws_are_distributed_as_the_mixture(dims):
    """Counts in the cells of a coarse grid, by Pearson's chi squared."""
    q = DiagonalMixture(LOCS[:, :dims], SCALES[:, :dims], LOGITS)
    points, volume = grid(dims)
    drawn = q.sample((100_000,))

    def cell(z):  # 5 cells an axis, with edges between the points
        at = ((z + 1.2625) / 0.8).floor().long().clamp(0, 4)
        return (at * torch.tensor([1, 5])[:dims]).sum(-1)

    mass = volume * q.log_prob(points).exp()
    expected = torch.zeros(5**dims).index_add(0, cell(points), mass) * len(drawn)
    counts = torch.bincount(cell(drawn), minlength=5**dims)
    freedom = 5**dims - 1
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_gradients_stay_finite_in_many_dims():
    leaves = [torch.randn(4, 100), torch.rand(4, 100) + 0.1, torch.randn(4)]
    leaves = [leaf.float().requires_grad_() for leaf in leaves]
    z = DiagonalMixture(*leaves).rsample((1000,))
    for gradient in torch.autograd.grad(z.square().sum(), leaves):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.fixture
def square(program):
    """x = z^2 and noise: two modes."""

    def story(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.square(), 0.3).to_event(1), obs=x)

    return program(story)


def gap(guide, x):
    """KL(q || p(z | x)) of the square, averaged over rows, by quadrature."""
    points, volume = grid(1)
    z = points.unsqueeze(1)  # (points, rows, 1)
    with torch.no_grad():
        log_q = guide.posterior(x).log_prob(z)
        log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 0.3).log_prob(x)
        log_p = log_p.squeeze(-1) - (volume * log_p.exp().sum(0)).log().squeeze(-1)
        return (volume * log_q.exp() * (log_q - log_p)).sum(0).mean()


def test_components_find_two_modes(square):
    x = torch.tensor([[1.0], [1.5], [2.0]])
    torch.manual_seed(1)
    guide = Mixture(square, nn.Linear(1, 4), x)
    loss = Trace_ELBO(32, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(square, guide, torch.optim.Adam(guide.parameters(), 0.05), loss, compile=False)
    for _ in range(200):
        svi.step(x)
    assert gap(guide, x) < 0.3  # one normal covers one of two equal modes, and misses log 2


@pytest.fixture
def pair():
    model = PPCA.toy()
    x = model.simulate(6)["x"]
    return model, Mixture(model, MLP(5, 8, 4), x, components=3, learned_weights=True), x


def test_a_recorded_step_gives_the_same_bits(pair):
    model, guide, x = pair
    leaves = parameters(model, guide)

    def step():
        for leaf in leaves:
            leaf.grad = None
        with own_parameters(model, guide):
            loss = backward(Trace_ELBO(), model, guide, x)
        return loss, [leaf.grad for leaf in leaves]

    with traceable():
        _, graph = record(step)
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss, gradients = step()
        torch.manual_seed(seed)
        recorded, others = graph()
        assert float(recorded) == float(loss)
        assert all(map(torch.equal, gradients, others))


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_numbers(pair):
    model, guide, x = pair
    start = {k: v.clone() for k, v in guide.state_dict().items()}
    losses = []
    for compile in (False, True):
        guide.load_state_dict(start)
        svi = SVI(model, guide, torch.optim.Adam(guide.parameters()), Trace_ELBO(), compile=compile)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(20)])
        assert not svi.refused
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_components_start_apart(pair):
    _, guide, x = pair
    with torch.no_grad():
        locs = guide.posterior(x).locs
    assert locs.shape == (6, 3, 2)
    assert (torch.cdist(locs, locs) + torch.eye(3) > 0.1).all()


def test_no_components_are_refused(pair):
    model, _, x = pair
    with pytest.raises(ValueError, match=r"Mixture\(components=0\): expected at least 1"):
        Mixture(model, MLP(5, 8, 4), x, components=0)
