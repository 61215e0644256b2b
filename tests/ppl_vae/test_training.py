from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from ppl_vae.conditionals import Normal, constrained
from ppl_vae.flows import FlowNormal, InverseAutoregressive, MaskedAutoregressive
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Gaussian
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.objectives import Beta, DReG, StickingTheLanding, backward, plain_elbo
from ppl_vae.priors import StandardNormal
from ppl_vae.svi import parameters
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL = 4, 10
NORMAL, GAMMA = dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0)


@pytest.fixture
def ppca():
    """A PPCA, a guide that is not its posterior, and rows of data."""
    model = PPCA(latents=2, observed=3, scale=0.8)
    return model, Factorized(z=(Normal(nn.Linear(3, 4)), ["x"])), torch.randn(ROWS, 3)


class Spy:
    """A guide that keeps what it drew."""

    def __init__(self, guide):
        self.guide, self.drawn = guide, []

    def __call__(self, *args, **kwargs):
        values = self.guide(*args, **kwargs)
        self.drawn.append(values["z"])


def by_hand(model, guide, x, z, closed=False):
    """Reconstruction and KL of draws z, nats per datum: plain formulas, mean over rows."""
    loc, scale = guide.conditionals["z"].net(x).chunk(2, -1)
    q = torch.distributions.Normal(loc, nn.functional.softplus(scale))
    p = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    decoder = model.likelihood.net
    mean, sigma = z @ decoder.weight.T + decoder.bias, model.likelihood.log_scale.exp()
    nats = -0.5 * ((x - mean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    kl = kl_divergence(q, p) if closed else q.log_prob(z) - p.log_prob(z)
    return nats.sum(-1).mean(), kl.sum(-1).mean()


ESTIMATORS = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    "three particles": lambda: Trace_ELBO(num_particles=3),
    "three particles at once": lambda: Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "three mean-field particles at once": lambda: TraceMeanField_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "three draws that stick the landing": lambda: StickingTheLanding(3),
    "Beta, mean field": lambda: Beta(1.0, draws=3),
}


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_terms_loss_and_gradients_are_those_computed_by_hand(ppca, name, weight):
    model, guide, x = ppca
    spy, training = Spy(guide), Training(ESTIMATORS[name](), TOTAL)
    training.weight = weight
    loss = training.loss_and_grads(model, spy, x, total=TOTAL)
    z = torch.stack(spy.drawn).detach()
    reconstruction, kl = by_hand(model, guide, x, z)
    # Terms stay unannealed; they are of the very draws on which the loss was taken.
    torch.testing.assert_close(training.terms.reconstruction, reconstruction.detach())
    torch.testing.assert_close(training.terms.kl, kl.detach())
    torch.testing.assert_close(training.terms.elbo, (reconstruction - kl).detach())
    if "ean" in name:
        kl = by_hand(model, guide, x, z, closed=True)[1]
    assert loss == pytest.approx(-(reconstruction - weight * kl).item(), rel=1e-12)

    # The gradient of the decoder needs no reparameterization: it is that of the formula.
    (-reconstruction).backward(inputs=(wanted := parameters(model.likelihood)), retain_graph=True)
    doubled = [p.grad for p in wanted]  # ours and the formula's
    own = torch.autograd.grad(-reconstruction, wanted)
    for both, one in zip(doubled, own, strict=True):
        torch.testing.assert_close(both, 2 * one)


def test_gradient_of_the_guide_is_that_of_the_annealed_objective(ppca):
    model, guide, x = ppca
    training = Training(TraceMeanField_ELBO(), TOTAL)
    training.weight = 0.3
    pyro.set_rng_seed(1)
    training.loss_and_grads(model, guide, x, total=TOTAL)
    pyro.set_rng_seed(1)
    z = guide.posterior(x).rsample()
    reconstruction, kl = by_hand(model, guide, x, z, closed=True)
    net = parameters(guide)
    expected = torch.autograd.grad(-(reconstruction - 0.3 * kl), net)
    torch.testing.assert_close([p.grad for p in net], list(expected))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_loss_without_gradients_is_the_same_and_watched_too(ppca, name):
    model, guide, x = ppca
    training = Training(ESTIMATORS[name](), TOTAL)
    pyro.set_rng_seed(1)
    loss = training.loss_and_grads(model, guide, x, total=TOTAL)
    terms = training.terms
    for p in parameters(model, guide):
        p.grad = None
    pyro.set_rng_seed(1)
    assert training.loss(model, guide, x, total=TOTAL) == pytest.approx(float(loss), rel=1e-12)
    assert training.terms.elbo == terms.elbo
    assert all(p.grad is None for p in parameters(model, guide))


class FlowPrior(nn.Module):
    """A standard normal behind a flow that is quick to score."""

    def __init__(self):
        super().__init__()
        self.flow = MaskedAutoregressive(2)

    def forward(self):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        return dist.TransformedDistribution(base, self.flow())


class Exponential(nn.Module):
    """A conditional whose transform keeps the last value that it inverted."""

    def __init__(self):
        super().__init__()
        self.base = Normal(nn.Linear(3, 4))

    def forward(self, x):
        return constrained(self.base(x), dist.constraints.positive, torch.Size([2]))


@pytest.mark.parametrize(
    "objective", [Trace_ELBO(), StickingTheLanding(2), DReG(2)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (FlowPrior, lambda: Normal(nn.Linear(3, 4))),
        (lambda: StandardNormal(2), Exponential),
        (
            lambda: StandardNormal(2),
            lambda: FlowNormal(nn.Linear(3, 4), InverseAutoregressive(2, 3)),
        ),
    ],
    ids=["prior", "support", "posterior"],
)
def test_watching_changes_no_gradient(prior, posterior, objective):
    """Though transforms that keep their last value are asked twice."""
    model = VAE(prior(), Gaussian(nn.Linear(2, 3)))
    guide, x = Factorized(z=(posterior(), ["x"])), torch.randn(ROWS, 3)
    held, found = parameters(model, guide), []
    for how in (objective, Training(objective, TOTAL)):
        pyro.set_rng_seed(1)
        backward(how, model, guide, x, total=TOTAL)
        found.append([p.grad for p in held])
        for p in held:
            p.grad = None
    assert all(gradient is not None for gradient in found[1])
    torch.testing.assert_close(found[0], [TOTAL * gradient for gradient in found[1]])


def test_masked_rows_count_for_nothing(ppca):
    model, guide, x = ppca
    keep = torch.tensor([True, False, True, True])

    def masked(program):
        return poutine.mask(program, mask=keep)

    spy, training = Spy(guide), Training(Trace_ELBO(), ROWS)
    loss = training.loss_and_grads(masked(model), masked(spy), x)
    parts = by_hand(model, guide, x[keep], spy.drawn[0][keep])
    reconstruction, kl = (part * 3 / 4 for part in parts)  # a mean over four rows, one empty
    torch.testing.assert_close(training.terms.reconstruction, reconstruction.detach())
    torch.testing.assert_close(training.terms.kl, kl.detach())
    assert loss == pytest.approx(-(reconstruction - kl).item(), rel=1e-12)


def test_terms_count_global_sites_and_the_guides_auxiliary_draws():
    model = Template.toy()
    x = model.simulate(ROWS)["x"]
    training = Training(Trace_ELBO(), TOTAL)
    loss = training.loss(model, MeanField(model, nn.Linear(4, 3), x=x), x, total=TOTAL)
    assert -training.terms.elbo.item() == pytest.approx(loss, rel=1e-12)


def coin_story(self, x):
    """y ~ Bernoulli(0.3), enumerated; x ~ Normal(2 y, 1)."""
    y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
    return pyro.sample("x", dist.Normal(2 * y.unsqueeze(-1), 1.0).to_event(1), obs=x)


def test_an_enumerated_site_is_summed_out_and_its_terms_are_means_over_its_values(program):
    model, guide = program(coin_story), program(lambda self, x: None)
    x = torch.randn(ROWS, 1)
    training = Training(plain_elbo(model, guide, x), TOTAL)
    loss = training.loss(model, guide, x, total=TOTAL)
    parts = [torch.distributions.Normal(m, 1.0).log_prob(x[:, 0]).exp() for m in (0.0, 2.0)]
    joint = 0.7 * parts[0], 0.3 * parts[1]
    evidence = sum(joint).log()
    assert loss == pytest.approx(-evidence.mean().item(), rel=1e-12)
    # The site's guide is its exact posterior.
    reconstruction = sum(j / sum(joint) * p.log() for j, p in zip(joint, parts, strict=True))
    torch.testing.assert_close(training.terms.reconstruction, reconstruction.mean())
    torch.testing.assert_close(training.terms.elbo, evidence.mean())
