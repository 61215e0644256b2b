from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from ppl_vae.conditionals import Normal
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives import CyclicalWarmup, LinearWarmup, plain_elbo
from ppl_vae.svi import SVI, parameters
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
    assert training.loss(model, guide, x, total=TOTAL) == pytest.approx(loss, rel=1e-12)
    assert training.terms.elbo == terms.elbo
    assert all(p.grad is None for p in parameters(model, guide))


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


def test_an_enumerated_site_is_summed_out_and_has_no_terms(program):
    model, guide = program(coin_story), program(lambda self, x: None)
    x = torch.randn(ROWS, 1)
    training = Training(plain_elbo(model, guide, x), TOTAL)
    loss = training.loss(model, guide, x, total=TOTAL)
    parts = [torch.distributions.Normal(m, 1.0).log_prob(x[:, 0]).exp() for m in (0.0, 2.0)]
    evidence = (0.7 * parts[0] + 0.3 * parts[1]).log().mean()
    assert loss == pytest.approx(-evidence.item(), rel=1e-12)
    assert training.terms.reconstruction.isnan()
    assert training.terms.kl.isnan()


def coin(self, x):
    return pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)))


def enumerated_coin(self, x):
    pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})


def two_levels(first, second):
    def story(self, x):
        above = pyro.sample(first, dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample(second, dist.Normal(above, 1.0).to_event(1))

    return story


def test_plain_elbo_is_closed_form_where_each_kl_is(program, draw, gaussian_story):
    def chosen(model, guide):
        before = torch.random.get_rng_state()
        estimator = plain_elbo(program(model), program(guide), torch.zeros(ROWS, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        return type(estimator)

    normal, lognormal = draw("z", NORMAL), draw("z", dist.LogNormal(0.0, 1.0))
    assert chosen(gaussian_story, normal) is TraceMeanField_ELBO
    assert chosen(draw("z", GAMMA), draw("z", GAMMA)) is TraceMeanField_ELBO
    assert chosen(draw("z", GAMMA), lognormal) is Trace_ELBO
    assert chosen(coin, coin) is TraceGraph_ELBO
    assert chosen(coin_story, lambda self, x: None) is TraceEnum_ELBO
    assert chosen(coin, enumerated_coin) is TraceEnum_ELBO
    assert chosen(lambda self, x: None, lambda self, x: None) is Trace_ELBO
    assert chosen(two_levels("z2", "z1"), two_levels("z2", "z1")) is TraceMeanField_ELBO


def test_a_given_label_needs_no_score_function(program):
    def labelled(self, x):
        pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), obs=x[:, 0])
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", Bernoulli(nn.Identity())(z), obs=x[:, 1:])

    def guide(self, x):
        pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))

    x = torch.ones(ROWS, 2)
    assert isinstance(plain_elbo(program(labelled), program(guide), x), TraceMeanField_ELBO)


def test_a_guide_in_another_order_than_the_model_has_no_closed_kl(program):
    # KL(q(z1) || p(z1 | z2)) with z2 ~ q(z2 | z1) is no term of the ELBO.
    model, guide = program(two_levels("z2", "z1")), program(two_levels("z1", "z2"))
    x = torch.zeros(2000, 1)
    objective = plain_elbo(model, guide, x)
    # The joints of (z1, z2) are normals of zero mean; their KL is 0.5.
    q, p = (
        torch.distributions.MultivariateNormal(torch.zeros(2), precision_matrix=torch.tensor(m))
        for m in ([[2.0, -1.0], [-1.0, 1.0]], [[1.0, -1.0], [-1.0, 2.0]])
    )
    kl = kl_divergence(q, p)
    found = objective.loss(model, guide, x) / len(x)
    assert found == pytest.approx(kl.item(), abs=0.2)


def test_the_jacobian_of_a_global_site_is_part_of_the_objective():
    """A posterior of a positive global site is found: Gamma prior, Poisson counts, conjugate."""

    class Rate(GenerativeModel):
        """A rate for all rows, a normal latent a row that nothing hangs on."""

        def forward(self, x=None, *, n=None, total=None):
            s = pyro.sample("s", dist.Gamma(torch.tensor(2.0), 1.0))
            with self.rows(x, n=n, total=total):
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                return pyro.sample("x", dist.Poisson(s.expand(1)).to_event(1), obs=x)

    x = torch.tensor([[3.0], [5.0]])
    model = Rate()
    guide = MeanField(model, nn.Identity(), x)
    optimizer = torch.optim.Adam(guide.parameters(), 0.02)
    svi = SVI(model, guide, optimizer, plain_elbo(model, guide, x))
    found = []
    for _ in range(1500):
        svi.step(x)
        found.append([guide.global_guide.locs.s.item(), guide.global_guide.scales.s.item()])
    loc, scale = torch.tensor(found[500:]).mean(0).tolist()
    # The posterior is Gamma(10, 3); of all log-normals, that with variance 1/10 on the log scale
    # and mean 10/3 is nearest to it. Without the Jacobian it would be 1/9 and 9/3.
    assert loc == pytest.approx(math.log(10 / 3) - 0.05, abs=0.02)
    assert scale == pytest.approx(math.sqrt(0.1), abs=0.02)


def test_warmups_rise_from_0_to_1_and_stay():
    linear = LinearWarmup(8)
    assert [linear(e) for e in (0, 2, 4.5, 8, 8.1, 100)] == [0, 0.25, 0.5625, 1, 1, 1]
    assert linear.ends == 8
    assert LinearWarmup(0)(0) == 1
    cyclic = CyclicalWarmup(epochs=20, cycles=4, rising=0.8)
    assert cyclic.ends == 20
    within = [0.0, 0.25, 0.5, 0.75, 1.0]
    for cycle in range(4):
        rising = [cyclic(5 * cycle + 4 * w) for w in within]
        assert rising == pytest.approx(within)
        assert cyclic(5 * cycle + 4.9) == 1
    assert [cyclic(e) for e in (20, 20.5, 22, 1000)] == [1, 1, 1, 1]
    epochs = [k / 4 for k in range(60)]
    assert [cyclic(e + 5) for e in epochs if e + 5 < 20] == [cyclic(e) for e in epochs if e < 15]


@pytest.mark.parametrize("schedule", [LinearWarmup(7), CyclicalWarmup(7, cycles=3)])
def test_from_its_end_a_schedule_stays_at_1(schedule):
    assert schedule(0) == 0
    assert all(schedule(schedule.ends + k / 10) == 1 for k in range(100))
    assert all(0 <= schedule(k / 10) <= 1 for k in range(100))
