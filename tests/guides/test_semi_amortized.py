"""Steps inside the guide: by hand, by finite differences, and unheard from outside."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn

from ppl_vae.evaluation import evaluate
from ppl_vae.graphs import record
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.guides.semi_amortized import SemiAmortized
from ppl_vae.model import own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.sites import PairError
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

Z, X = 2, 5


def linear(**options):
    """A linear-Gaussian model, a guide for it, and rows."""
    model = PPCA(Z, X, scale=0.7)
    x = model.simulate(6)["x"]
    return model, SemiAmortized(model, MLP(X, 8, 4), x, **options), x


def with_a_global_site(**options):
    """Counts with a positive local latent, and a global one."""
    model = Template.toy()
    x = model.simulate(6)["x"]
    return model, SemiAmortized(model, MLP(4, 8, 4), x, **options), x


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_steps_are_gradient_ascent(max_grad_norm):
    """By hand, where log p(x, z) has the gradient ``-(A z - b)``."""
    model, guide, x = linear(steps=3, learning_rate=0.05, max_grad_norm=max_grad_norm)
    posterior = model.posterior(x)
    a = posterior.precision_matrix.broadcast_to(6, Z, Z)
    b = (a @ posterior.loc.unsqueeze(-1)).squeeze(-1)
    loc, raw = guide.head(guide.encoder(x)).chunk(2, -1)
    assert guide.signs.abs().eq(1).all()
    for signs in guide.signs:
        scale = raw.exp().log1p()
        steps = torch.zeros(6, 2 * Z)
        for e in signs.reshape(2, Z):
            slope = b - (a @ (loc + scale * e).unsqueeze(-1)).squeeze(-1)
            steps = steps + torch.cat([slope, (slope * e + 1 / scale) * raw.sigmoid()], -1) / 2
        if max_grad_norm is not None:
            length = steps.square().sum(-1, keepdim=True).sqrt()
            assert (length > 0.5).any()
            steps = torch.where(length > 0.5, 0.5 * steps / length, steps)
        loc, raw = (torch.cat([loc, raw], -1) + 0.05 * steps).chunk(2, -1)
    torch.testing.assert_close(guide.refine({"x": x}), torch.cat([loc, raw], -1))


@pytest.mark.parametrize("make", [linear, with_a_global_site])
def test_gradients_are_those_of_the_whole_computation(make):
    """Of the loss after the steps, to all parameters of the pair: against finite differences."""
    model, guide, x = make(steps=2, max_grad_norm=1.0)
    leaves = parameters(model, guide)

    def loss():
        torch.manual_seed(0)
        with own_parameters(model, guide):
            return Trace_ELBO().differentiable_loss(model, guide, x)

    gradients = torch.autograd.grad(loss(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction, at = torch.randn_like(leaf), leaf.detach().clone()
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                leaf.copy_(at + step * direction)
            sides.append(loss().item())
        with torch.no_grad():
            leaf.copy_(at)
        difference = (sides[0] - sides[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-6)


class Listener(Messenger):
    """Notes every sample and parameter statement that it hears."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def _pyro_post_sample(self, msg):
        self.heard.append(msg["name"])

    def _pyro_post_param(self, msg):
        self.heard.append(msg["name"])


def test_nothing_of_the_steps_is_heard_outside():
    model, guide, x = with_a_global_site()
    plain = MeanField(model, MLP(4, 8, 4), x)
    heard = []
    for program in (guide, plain):
        with own_parameters(program), Listener() as listener:
            program(x)
        heard.append(sorted(name for name in listener.heard if "head" not in name))
    assert heard[0] == heard[1]
    assert set(heard[0]) >= {"w", "z", "data"}
    # Nor do handlers outside reach in.
    locs = []
    for program in (guide, poutine.condition(poutine.scale(guide, scale=7.0), {"w": x[0]})):
        locs.append(trace_of(program, x).nodes["z"]["fn"].base_dist.base_dist.loc)
    assert torch.equal(*locs)


def trace_of(program, x):
    with own_parameters(program):
        return poutine.trace(program).get_trace(x)


@pytest.mark.parametrize("make", [linear, with_a_global_site])
def test_rows_are_refined_each_by_itself_and_once_for_all_particles(make):
    model, guide, x = make(steps=3)
    whole = guide.refine({"x": x})
    torch.testing.assert_close(torch.cat([guide.refine({"x": row}) for row in x.split(1)]), whole)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    trace = trace_of(pyro.plate("particles", 7, dim=-2)(guide), x)
    assert len(runs) == 3
    assert trace.nodes["z"]["value"].shape[:2] == (7, 6)
    torch.testing.assert_close(
        guide.posterior(x).log_prob(trace.nodes["z"]["value"]),
        trace.nodes["z"]["fn"].log_prob(trace.nodes["z"]["value"]),
    )


def test_without_gradients_the_steps_are_the_same():
    model, guide, x = with_a_global_site()
    whole = guide.refine({"x": x})
    guide.requires_grad_(False)
    model.requires_grad_(False)
    with torch.no_grad():
        refined = guide.refine({"x": x})
    assert not refined.requires_grad
    assert torch.equal(whole, refined)
    assert torch.equal(whole, guide.refine({"x": x}))  # a frozen pair
    result = evaluate(model, guide, {"train": x, "test": x}, samples=3, compile=False)
    assert result.elbo < 0


def test_the_model_is_held_but_its_parameters_are_not_the_guides():
    model, guide, x = linear()
    assert not {*map(id, model.parameters())} & {*map(id, guide.parameters())}
    before = guide.refine({"x": x})
    other_model, other = copy.deepcopy((model, guide))
    assert torch.equal(other.refine({"x": x}), before)
    with torch.no_grad():
        other_model.likelihood.net.weight.mul_(2)
    assert torch.equal(guide.refine({"x": x}), before)
    assert not torch.equal(other.refine({"x": x}), before)


def test_a_local_latent_that_is_given_is_not_refined_again(program):
    """Nor drawn; the others are refined given it."""

    class Labeled(type(program(None))):
        def forward(self, x=None, y=None, *, n=None, total=None):
            with self.rows(x, y, n=n, total=total):
                y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=y)
                z = pyro.sample("z", dist.Normal(y, 1.0).to_event(1)) if self.story else 0.0
                return pyro.sample("x", dist.Normal(z + y, 1.0).to_event(1), obs=x)

    model = Labeled("with z")
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    guide = SemiAmortized(model, nn.Linear(2, 4), x, steps=200, learning_rate=0.1)
    assert list(guide.local_sites) == ["y", "z"]
    trace = poutine.trace(guide).get_trace(x, y)
    assert "y" not in trace.nodes
    # The posterior of z, which is normal: given y, precision 2.
    torch.testing.assert_close(trace.nodes["z"]["fn"].base_dist.loc, x / 2)
    torch.testing.assert_close(trace.nodes["z"]["fn"].base_dist.scale, torch.full((3, 2), 0.5**0.5))
    # With nothing left to draw, there is nothing to do.
    guide = SemiAmortized(Labeled(None), nn.Linear(2, 4), x)
    assert list(guide.local_sites) == ["y"]
    assert "y" not in poutine.trace(guide).get_trace(x, y).nodes


def test_further_plates_of_the_model_are_no_hindrance(program):
    """Three observations a row in a plate of their own: a posterior of precision 4."""

    def story(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("views", 3, dim=-2):
            pyro.sample("v", dist.Normal(z, 1.0).to_event(1), obs=x.expand(3, *x.shape))

    x = torch.randn(4, 2)
    guide = SemiAmortized(program(story), nn.Linear(2, 4), x, steps=200, learning_rate=0.1)
    q = guide.posterior(x).base_dist
    torch.testing.assert_close(q.loc, 3 * x / 4)
    torch.testing.assert_close(q.scale, torch.full((4, 2), 0.5))


def test_a_recorded_step_gives_the_same_bits():
    model, guide, x = with_a_global_site(steps=2)
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
def test_a_compiled_step_gives_the_same_numbers():
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        model, guide, x = linear(steps=1)
        optimizer = torch.optim.Adam(parameters(model, guide), 1e-2)
        svi = SVI(model, guide, optimizer, Trace_ELBO(), compile=compile)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(20)])
        assert not svi.refused
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_fixed_rate_is_no_parameter():
    _, guide, _ = linear(learned=False)
    assert "log_rate" not in dict(guide.named_parameters())
    _, learned, _ = linear()
    assert "log_rate" in dict(learned.named_parameters())


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"max_grad_norm": 0.0}],
)
def test_wrong_numbers_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*: expected positive and finite"):
        linear(**wrong)


def test_an_enumerated_site_is_refused(program):
    def story(self, x):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z + k.unsqueeze(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(PairError, match="the model enumerates site 'k'"):
        SemiAmortized(program(story), nn.Linear(2, 3), torch.zeros(3, 2))
