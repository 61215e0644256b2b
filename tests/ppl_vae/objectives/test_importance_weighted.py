"""IWAE: weights of each row its own, against loops, Pyro and the exact evidence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from ppl_vae.fitting import fit
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives import IWAE, DReG
from ppl_vae.svi import SVI

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10


def log_density(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def log_weight(model, guide, x, z):
    """Of one row ``(3,)`` and one draw ``(2,)``, in plain numbers."""
    raw = guide.conditionals["z"].net(x)
    scales = nn.functional.softplus(raw[2:]).tolist()
    mean, sigma = model.likelihood.net(z).tolist(), model.likelihood.log_scale.exp().item()
    q = sum(map(log_density, z.tolist(), raw[:2].tolist(), scales))
    p = sum(log_density(value, 0.0, 1.0) for value in z.tolist())
    return sum(log_density(*pair, sigma) for pair in zip(x.tolist(), mean, strict=True)) + p - q


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("objective", [IWAE, DReG])
def test_the_bound_is_that_of_a_loop_over_rows_and_draws(ppca, losses, draws, objective):
    model, guide, x = ppca
    drawn = []

    class Spy(nn.Module):
        def forward(self, *args, **kwargs):
            values = guide(*args, **kwargs)
            drawn.append(values["z"])
            return values

    loss, _ = losses(objective(draws), model, Spy(), x, total=TOTAL)
    [z] = drawn
    assert z.shape == (draws, ROWS, 2)
    bound = 0.0
    for row in range(ROWS):
        weights = [math.exp(log_weight(model, guide, x[row], z[k, row])) for k in range(draws)]
        bound += math.log(math.fsum(weights) / draws)
    assert loss == pytest.approx(-TOTAL / ROWS * bound, rel=1e-10)


def test_one_draw_gives_the_elbo(ppca, losses):
    model, guide, x = ppca
    ours = losses(IWAE(1), model, guide, x, total=TOTAL)
    torch.testing.assert_close(ours, losses(Trace_ELBO(), model, guide, x, total=TOTAL))
    assert IWAE(1).loss(model, guide, x).requires_grad is False


@pytest.mark.parametrize("draws", [2, 5])
def test_of_rows_that_are_all_there_is_pyros_bound_is_the_same(ppca, losses, draws):
    model, guide, x = ppca
    renyi = RenyiELBO(0.0, num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
    for rows in (x, x[:1]):
        ours = losses(IWAE(draws), model, guide, rows)
        torch.testing.assert_close(ours, losses(renyi, model, guide, rows))
    # Pyro takes total / rows for a power of the weights.
    loss, gradients = losses(IWAE(draws), model, guide, x, total=TOTAL)
    plain, its_gradients = losses(IWAE(draws), model, guide, x)
    assert loss == pytest.approx(TOTAL / ROWS * plain, rel=1e-12)
    torch.testing.assert_close(gradients, [TOTAL / ROWS * g for g in its_gradients])
    assert loss > losses(renyi, model, guide, x, total=TOTAL)[0] + 0.1


@pytest.mark.parametrize("draws", [1, 5])
@pytest.mark.parametrize("objective", [IWAE, DReG])
def test_with_the_exact_posterior_every_draw_gives_the_evidence(ppca, exact, draws, objective):
    model, _, x = ppca
    evidence = model.evidence(x).sum().item()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = objective(draws).loss(model, exact(model), x, total=TOTAL)
        assert loss.item() == pytest.approx(-evidence * TOTAL / ROWS, rel=1e-10)


def test_more_draws_make_a_tighter_bound(ppca):
    model, guide, x = ppca
    copies = x[:1].expand(500, 3)

    def bound(draws):
        """Mean and standard error, nats a row, over runs of many copies of a row."""
        with torch.no_grad():
            found = [-IWAE(draws).loss(model, guide, copies) / len(copies) for _ in range(10)]
        return torch.stack(found).mean().item(), (torch.stack(found).std() / math.sqrt(10)).item()

    (one, a), (three, b), (many, c) = bound(1), bound(3), bound(30)
    assert three - one > 5 * math.hypot(a, b)
    assert many - three > 5 * math.hypot(b, c)
    evidence = model.evidence(x[:1]).item()
    assert many < evidence + 4 * c
    assert evidence - many < 0.2 * (evidence - one)


@pytest.mark.parametrize("objective", [IWAE(3), DReG(3)], ids=repr)
def test_rows_do_not_mix(ppca, losses, noise, objective):
    model, guide, x = ppca
    eps = torch.randn(3, ROWS, 2)
    noise(eps)
    loss, gradients = losses(objective, model, guide, x)
    singles = []
    for row in range(ROWS):
        noise(eps[:, row])
        singles.append(losses(objective, model, guide, x[row : row + 1]))
    assert loss == pytest.approx(sum(single for single, _ in singles), rel=1e-12)
    summed = [sum(each) for each in zip(*(g for _, g in singles), strict=True)]
    torch.testing.assert_close(gradients, summed)

    # What a row's data do to its own bound does not depend on the others'.
    noise(eps)
    slopes = []
    for others in (x, torch.cat([x[:1], x[1:] + 2])):
        data = others.clone().requires_grad_()
        objective.differentiable_loss(model, guide, data).backward()
        slopes.append(data.grad)
    assert torch.equal(slopes[0][0], slopes[1][0])
    assert not torch.equal(slopes[0][1], slopes[1][1])


def story(x, total=None):
    """As users of Pyro write it: a plate of another name, parameters in Pyro's store."""
    weight = pyro.param("weight", lambda: torch.full((2, 3), 0.3))
    with pyro.plate("images", total or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)


def guide_of_story(x, total=None):
    slope = pyro.param("slope", lambda: torch.full((3, 2), 0.1))
    with pyro.plate("images", total or len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x @ slope, 0.7).to_event(1))


@pytest.mark.parametrize("objective", [IWAE(4), DReG(4)], ids=repr)
def test_it_runs_under_pyros_svi_and_ours(objective):
    x = torch.randn(ROWS, 3)
    left = []
    for svi_class in (pyro.infer.SVI, SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        optimizer = pyro.optim.SGD({"lr": 1e-2})
        svi = svi_class(story, guide_of_story, optimizer, objective)
        losses = [svi.step(x, total=TOTAL) for _ in range(3)]
        left.append((losses, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}))
    torch.testing.assert_close(left[0], left[1])
    assert not torch.equal(left[0][1]["slope"], torch.full((3, 2), 0.1))


@pytest.mark.parametrize("objective", [IWAE(5), DReG(5)], ids=repr)
def test_a_fit_comes_to_the_evidence(objective):
    """Of one observable and one latent, whose model is a normal: its evidence has a maximum."""
    x = 1.5 * torch.randn(100, 1) + 2
    model = PPCA(1, 1)
    result = fit(
        model,
        MeanField(model, nn.Identity(), x),
        {"train": x},
        objective=objective,
        epochs=150,
        learning_rate=0.03,
        precision="64-true",
        compile=False,
        progress=False,
    )
    best = torch.distributions.Normal(x.mean(), x.std(correction=0)).log_prob(x).mean().item()
    found = model.evidence(x).mean().item()
    assert best - 0.01 < found <= best + 1e-12
    assert result.history[-1]["elbo"] < best + 0.05
