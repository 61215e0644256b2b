"""DReG and sticking the landing: the bound's gradient, by quadrature, and its variance."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import Normal as TorchNormal

from ppl_vae.flows import FlowNormal, Householder, InverseAutoregressive, Planar
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Gaussian
from ppl_vae.models.vae import VAE
from ppl_vae.objectives import IWAE, DReG, StickingTheLanding
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError
from ppl_vae.svi import parameters

pytestmark = pytest.mark.usefixtures("float64")


class Pair(nn.Module):
    """Numbers of a pair: each latent normal, given those drawn before; the observable normal."""

    def __init__(self, levels: int, shared: bool) -> None:
        super().__init__()
        self.levels, self.shared = levels, shared
        self.numbers = nn.Parameter(torch.tensor([0.4, -0.3, 0.8, 0.6, 0.5]))
        self.guides = nn.Parameter(torch.tensor([0.3, 0.2, -0.2, 0.4, -0.3]))

    def prior(self, level, above):
        a, b = self.numbers[:2]
        if level == self.levels:
            # Shared: the top's prior is the guide's conditional of a pseudo-input.
            return self.posterior(level, above, b) if self.shared else (a, b.exp())
        return 0.9 * torch.tanh(above[-1]) + a, (0.5 * b).exp()

    def likelihood(self, z):
        weight, bias, scale = self.numbers[2:]
        return weight * z + 0.5 * torch.sin(z) + bias, scale.exp()

    def posterior(self, level, above, x):
        slope, shift, scale, of_above, more = self.guides
        loc = slope * x + shift
        if level < self.levels:
            loc = loc + of_above * above[-1]
            scale = scale + more * torch.tanh(above[-1])
        return loc, scale.exp() * (1.0 if level == self.levels else 0.8)

    def model(self, x):
        above = []
        with pyro.plate("data", len(x)):
            for level in range(self.levels, 0, -1):
                loc, scale = self.prior(level, above)
                above.append(pyro.sample(f"z{level}", dist.Normal(loc, scale)))
            pyro.sample("x", dist.Normal(*self.likelihood(above[-1])), obs=x)

    def guide(self, x):
        above = []
        with pyro.plate("data", len(x)):
            for level in range(self.levels, 0, -1):
                loc, scale = self.posterior(level, above, x)
                above.append(pyro.sample(f"z{level}", dist.Normal(loc, scale)))

    def log_weight(self, x, eps, weight):
        """Of draws made of noise, one tensor a level, from the top."""
        above, latent = [], 0.0
        for level, own in zip(range(self.levels, 0, -1), eps, strict=True):
            loc, scale = self.posterior(level, above, x)
            prior = self.prior(level, above)
            z = loc + scale * own
            latent = latent + TorchNormal(*prior).log_prob(z) - TorchNormal(loc, scale).log_prob(z)
            above.append(z)
        return TorchNormal(*self.likelihood(above[-1])).log_prob(x) + weight * latent

    def bound(self, x, draws, weight, nodes):
        """By Gauss-Hermite quadrature over the noise of all draws."""
        points, shares = map(torch.as_tensor, hermegauss(nodes))
        shares = shares / shares.sum()
        dims = self.levels * draws
        grid = torch.meshgrid(*[points] * dims, indexing="ij")
        mass = math.prod(torch.meshgrid(*[shares] * dims, indexing="ij"))
        each = [
            self.log_weight(x, grid[k * self.levels : (k + 1) * self.levels], weight)
            for k in range(draws)
        ]
        return (mass * (torch.stack(each).logsumexp(0) - math.log(draws))).sum()


class Annealed(poutine.messenger.Messenger):
    """Gives the latents a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg):
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


def moments(objective, programs, held, x, batches=40, rows=1000):
    """Of the gradients a row, over batches of copies of one row: mean, and standard deviation."""
    found = []
    for _ in range(batches):
        loss = objective.differentiable_loss(*programs, x.expand(rows, *x.shape))
        found.append(torch.cat([-g.flatten() / rows for g in torch.autograd.grad(loss, held)]))
    return torch.stack(found).mean(0), torch.stack(found).std(0)


CASES = [
    (DReG, 2, 1, False, 1.0),
    (DReG, 2, 1, True, 1.0),
    (DReG, 2, 1, False, 0.3),
    (DReG, 2, 2, False, 1.0),
    (DReG, 2, 2, True, 0.5),
    (StickingTheLanding, 1, 1, True, 1.0),
    (StickingTheLanding, 3, 2, False, 0.3),
    (StickingTheLanding, 2, 3, False, 1.0),
    (IWAE, 2, 1, True, 0.5),
]


@pytest.mark.parametrize(("family", "draws", "levels", "shared", "weight"), CASES)
def test_the_gradients_mean_is_the_bounds_gradient(family, draws, levels, shared, weight):
    pair, x = Pair(levels, shared), torch.tensor(1.3)
    of_bound = 1 if family is StickingTheLanding else draws
    nodes = 16 if levels * of_bound > 2 else 40
    bound = pair.bound(x, of_bound, weight, nodes)
    exact = torch.cat(torch.autograd.grad(bound, list(pair.parameters())))
    programs = [Annealed(weight)(program) for program in (pair.model, pair.guide)]
    mean, deviation = moments(family(draws), programs, list(pair.parameters()), x)
    error = deviation / math.sqrt(40)
    unused = 2 * (levels == 1) + (levels == 1 and shared)
    assert (exact != 0).sum() == len(exact) - unused
    assert ((mean - exact).abs() <= 4.5 * error + 1e-9).all()
    assert (error < 0.02 * exact.abs().max()).all()


class Posterior(nn.Module):
    """A PPCA's posterior as it is now, with parameters of its own."""

    def __init__(self, model):
        super().__init__()
        zero, one = (model.posterior(x) for x in (torch.zeros(1, 3), torch.eye(3)))
        self.shift = nn.Parameter(zero.loc[0].detach())
        self.slope = nn.Parameter((one.loc - zero.loc).detach())
        self.tril = nn.Parameter(zero.scale_tril[0].detach())

    def forward(self, x):
        return dist.MultivariateNormal(self.shift + x @ self.slope, scale_tril=self.tril)


@pytest.mark.parametrize("objective", [StickingTheLanding(1), StickingTheLanding(3), DReG(3)])
def test_at_the_exact_posterior_the_guides_gradient_has_no_noise(ppca, losses, objective):
    model, _, x = ppca
    guide = Factorized(z=(Posterior(model), ["x"]))
    count = len(parameters(guide))
    for seed in range(3):
        _, gradients = losses(objective, model, guide, x, seed=seed)
        assert all(g.abs().max() < 1e-12 for g in gradients[-count:])
        _, gradients = losses(Trace_ELBO(), model, guide, x, seed=seed)
        assert all(g.abs().max() > 0.1 for g in gradients[-count:])


@pytest.mark.parametrize(("draws", "factor"), [(16, 4.0), (64, 12.0)])
def test_near_the_optimum_more_draws_help_dreg_and_not_iwae(draws, factor):
    pair, x = Pair(1, shared=False), torch.tensor(1.3)
    # The nearest normal, by the ELBO of quadrature.
    optimizer = torch.optim.LBFGS([pair.guides], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -pair.bound(x, 1, 1.0, 40)
        value.backward()
        return value

    optimizer.step(loss)
    own = [pair.guides]
    noise = [
        moments(objective, (pair.model, pair.guide), own, x, batches=60, rows=20)[1][:3]
        for objective in (IWAE(draws), DReG(draws))
    ]
    assert (noise[0] > factor * noise[1]).all(), noise


class Drop(nn.Module):
    """A conditional whose net drops half of its hidden units; keeps what it made."""

    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.BatchNorm1d(20), nn.Linear(20, 4))
        self.net, self.made = net, []

    def forward(self, x):
        loc, scale = self.net(x).chunk(2, -1)
        self.made.append(dist.Normal(loc, scale.exp()).to_event(1))
        return self.made[-1]


@pytest.mark.parametrize("objective", [StickingTheLanding(3), DReG(3)], ids=repr)
def test_draws_are_scored_by_what_drew_them(ppca, objective):
    """A guide that runs twice would drop other units, and count a batch twice."""
    model, _, x = ppca
    guide = Factorized(z=(Drop(), ["x"]))
    drawn = []

    def kept(*args, **kwargs):
        values = guide(*args, **kwargs)
        drawn.append(values["z"])
        return values

    loss = objective.loss_and_grads(model, kept, x)
    [q], [z] = guide.conditionals["z"].made, drawn
    p = TorchNormal(0.0, 1.0).log_prob(z).sum(-1)
    seen = TorchNormal(model.likelihood.net(z), 0.8).log_prob(x).sum(-1)
    assert loss.item() == pytest.approx(-objective.bound(seen + p - q.log_prob(z)).sum().item())
    assert guide.conditionals["z"].net[2].num_batches_tracked == 1


@pytest.mark.parametrize("family", [StickingTheLanding, DReG])
def test_a_site_that_the_guide_has_no_parameters_for_is_no_hindrance(losses, family):
    def model(x):
        with pyro.plate("data", len(x)):
            z = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a", "b", "c"))
            pyro.sample("x", dist.Normal(z, pyro.param("s", torch.tensor(0.5))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.3 * x, pyro.param("t", torch.tensor(0.7))))
            pyro.sample("c", dist.Normal(0.1, 0.9))

    x, found = torch.randn(5), []
    for objective in (family(3), IWAE(3) if family is DReG else plain(3)):
        pyro.clear_param_store()
        loss, _ = losses(objective, model, guide, x)
        found.append((loss, pyro.param("s").grad))
        assert pyro.param("t").grad.abs() > 1e-3
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("family", [StickingTheLanding, DReG])
@pytest.mark.parametrize("flow", [InverseAutoregressive, Householder])
def test_a_flow_that_can_score_values_is_no_other_guide(ppca, losses, family, flow):
    """Its loss, and for the model its gradient, are those of the draws themselves."""
    model, _, x = ppca
    guide = Factorized(z=(FlowNormal(nn.Linear(3, 4), flow(2, 3, layers=2)), ["x"]))
    theirs = losses(IWAE(3) if family is DReG else plain(3), model, guide, x, total=10)
    ours = losses(family(3), model, guide, x, total=10)
    of_model = len(parameters(model))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][:of_model], theirs[1][:of_model])
    assert len(ours[1]) == len(theirs[1]) == of_model + len(parameters(guide))


def plain(draws):
    return Trace_ELBO(draws, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("family", [StickingTheLanding, DReG])
def test_a_flow_that_scores_its_own_draws_only_is_refused(family):
    model = VAE(StandardNormal(2), Gaussian(nn.Linear(2, 3)))
    guide = Factorized(z=(FlowNormal(nn.Linear(3, 4), Planar(2, 3)), ["x"]))
    x = torch.randn(4, 3)
    with pytest.raises(
        PairError, match=rf"{family.__name__} scores draws as values: Planar has no"
    ):
        family(2).loss_and_grads(model, guide, x)
    assert math.isfinite(family(2).loss(model, guide, x))
