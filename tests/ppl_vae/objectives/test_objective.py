from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.objectives import EnumeratedELBO, backward, plain_elbo

pytestmark = pytest.mark.usefixtures("float64")
ROWS = 4
NORMAL, GAMMA = dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0)


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
    assert chosen(enumerated_coin, lambda self, x: None) is EnumeratedELBO
    assert chosen(coin, enumerated_coin) is EnumeratedELBO
    assert chosen(lambda self, x: None, lambda self, x: None) is Trace_ELBO
    assert chosen(two_levels("z2", "z1"), two_levels("z2", "z1")) is TraceMeanField_ELBO


def test_what_rows_terms_cannot_hold_is_left_to_pyro(program):
    """A site that is summed over beside one without reparameterization, or for all rows."""

    def two_coins(self, x):
        enumerated_coin(self, x)
        pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))

    x = torch.zeros(ROWS, 2)
    assert isinstance(plain_elbo(program(two_coins), program(two_coins), x), TraceEnum_ELBO)

    def whole(self):
        enumerated_coin(self, None)

    def nothing(self, x):
        pass

    of_all = program(nothing, whole), program(nothing)
    assert isinstance(plain_elbo(*of_all, x), TraceEnum_ELBO)


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
                return pyro.sample("x", dist.Poisson(s.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.tensor([[3.0], [5.0]])
    model = Rate()
    guide = MeanField(model, nn.Identity(), x)
    at = guide.global_guide
    family = type(plain_elbo(model, guide, x))
    objective = family(50, max_plate_nesting=1, vectorize_particles=True)

    def slopes(loc, scale):
        """Of the loss, by location and scale: mean over draws, in standard errors."""
        at.locs.s, at.scales.s = torch.tensor(loc).log(), torch.tensor(scale)
        found = []
        for _ in range(20):
            guide.zero_grad()
            backward(objective, model, guide, x)
            found.append(torch.stack([p.grad for p in at.parameters()]))
        return torch.stack(found).mean(0) / torch.stack(found).std(0) * math.sqrt(20)

    # The posterior is Gamma(10, 3); of all log-normals, that with variance 1/10 on the log scale
    # and mean 10/3 is nearest to it. Without the Jacobian it would be 1/9 and 9/3.
    assert (slopes(10 / 3 * math.exp(-1 / 20), math.sqrt(1 / 10)).abs() < 4).all()
    assert (slopes(9 / 3 * math.exp(-1 / 18), math.sqrt(1 / 9)).abs() > 4).any()
