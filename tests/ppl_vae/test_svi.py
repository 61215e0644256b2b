from __future__ import annotations

import copy
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints

import ppl_vae.svi
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.svi import SVI, NonFiniteLoss, parameters

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOTAL, RATE = 6, 20, 0.01


def zoo_pair(model, guide, seed=0):
    pyro.set_rng_seed(seed)
    model = model.toy()
    x = model.simulate(ROWS)["x"]
    return model, guide(model, MLP(x.shape[1], 4), x=x), x


def adam(model, guide):
    return torch.optim.Adam(parameters(model, guide), RATE)


def pyro_adam(*_):
    return pyro.optim.Adam({"lr": RATE})


def train(svi, x, steps=4):
    pyro.set_rng_seed(3)
    return [svi.step(x=x[:k], total=TOTAL) for k in [ROWS, 3, ROWS, 2][:steps]]


def state(*programs):
    return [p.detach().clone() for p in parameters(*programs)]


@pytest.mark.parametrize("ours", [adam, pyro_adam])
@pytest.mark.parametrize(
    ("model", "guide", "elbo"),
    [
        (VAE, MeanField, Trace_ELBO),
        (PPCA, FullRank, TraceMeanField_ELBO),
        (Template, MeanField, TraceGraph_ELBO),  # has a global site, whose scale is constrained
    ],
)
def test_modules_train_as_under_pyros_svi(model, guide, elbo, ours):
    first, its_guide, x = zoo_pair(model, guide)
    expected = train(pyro.infer.SVI(first, its_guide, pyro_adam(), elbo()), x)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}

    second, own_guide, x = zoo_pair(model, guide)
    losses = train(SVI(second, own_guide, ours(second, own_guide), elbo()), x)
    assert losses == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(state(second, own_guide), state(first, its_guide))
    # The global store, in which the first pair stands under the same names, was not touched.
    assert all(torch.equal(value, before[n]) for n, value in pyro.get_param_store().items())


def functions():
    """Two plain functions; the scales are constrained parameters of the store."""
    torch.manual_seed(0)
    decoder = nn.Linear(2, 3)

    def model(x, total):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", lambda: torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", total, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x, total):
        slope = pyro.param("slope", lambda: torch.full((3, 2), 0.1))
        spread = pyro.param(
            "spread", lambda: torch.full((2,), 0.5), constraint=constraints.interval(0.0, 2.0)
        )
        with pyro.plate("data", total, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x @ slope, spread).to_event(1))

    return model, guide


def store_after(make, loss, steps=4):
    """Losses and the parameter store after training plain functions from one seed."""
    pyro.clear_param_store()
    model, guide = functions()
    x = torch.randn(ROWS, 3)
    losses = train(make(model, guide, x, loss()), x, steps)
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def under_pyro(model, guide, x, loss):
    return pyro.infer.SVI(model, guide, pyro_adam(), loss)


def under_ours(model, guide, x, loss):
    return SVI(model, guide, pyro_adam(), loss)


def under_ours_with_torch(model, guide, x, loss):
    Trace_ELBO().loss(model, guide, x, TOTAL)  # the first run makes the parameters
    store = pyro.get_param_store()
    leaves = [store[name].unconstrained() for name in store]
    return SVI(model, guide, torch.optim.Adam(leaves, RATE), loss)


@pytest.mark.parametrize("ours", [under_ours, under_ours_with_torch])
def test_functions_train_as_under_pyros_svi(ours):
    expected, store = store_after(under_pyro, Trace_ELBO)
    losses, own_store = store_after(ours, Trace_ELBO)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert set(store) == {"decoder$$$weight", "decoder$$$bias", "scale", "slope", "spread"}
    torch.testing.assert_close(own_store, store)
    _, start = store_after(ours, Trace_ELBO, steps=1)
    assert all(not torch.allclose(store[name], start[name], rtol=1e-3) for name in store)


def test_objectives_with_two_losses_train_as_under_pyros_svi():
    def wake_sleep():
        return ReweightedWakeSleep(num_particles=3, vectorize_particles=False)

    expected, store = store_after(under_pyro, wake_sleep)
    losses, own_store = store_after(under_ours, wake_sleep)
    assert all(isinstance(both, tuple) for both in losses)
    assert torch.tensor(losses).flatten().tolist() == pytest.approx(
        torch.tensor(expected).flatten().tolist(), rel=1e-12
    )
    torch.testing.assert_close(own_store, store)


@pytest.mark.parametrize("guarded", [True, False], ids=["own parameters", "the trap"])
@pytest.mark.parametrize(("model", "ours"), [(VAE, pyro_adam), (Template, adam)])
def test_a_second_model_trains_its_own_weights(model, ours, guarded, monkeypatch):
    first, first_guide, x = zoo_pair(model, MeanField, seed=0)
    train(pyro.infer.SVI(first, first_guide, pyro_adam(), Trace_ELBO()), x)
    firsts = state(first, first_guide)
    second, second_guide, _ = zoo_pair(model, MeanField, seed=1)
    held, start = parameters(second, second_guide), state(second, second_guide)
    if not guarded:
        monkeypatch.setattr(ppl_vae.svi, "own_parameters", lambda *_, **__: nullcontext())
    train(SVI(second, second_guide, ours(second, second_guide), Trace_ELBO()), x)
    moved = [not torch.equal(p, s) for p, s in zip(held, start, strict=True)]
    assert all(moved) is guarded
    if guarded:
        now = parameters(second, second_guide)
        assert all(p is q for p, q in zip(held, now, strict=True))
        assert all(map(torch.equal, state(first, first_guide), firsts))


def test_evaluate_loss_takes_no_step_and_leaves_gradients_alone():
    model, guide, x = zoo_pair(VAE, MeanField)
    optimizer = adam(model, guide)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    train(svi, x, steps=1)
    before, moments = state(model, guide), copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in parameters(model, guide):
        parameter.grad = torch.rand_like(parameter)
    gradients = [p.grad.clone() for p in parameters(model, guide)]
    pyro.set_rng_seed(5)
    loss = svi.evaluate_loss(x=x, total=TOTAL)
    assert all(map(torch.equal, state(model, guide), before))
    assert all(map(torch.equal, [p.grad for p in parameters(model, guide)], gradients))
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)
    pyro.set_rng_seed(5)
    assert svi.step(x=x, total=TOTAL) == pytest.approx(loss, rel=1e-12)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_max_grad_norm_shortens_longer_gradients_only(factor):
    def applied(**limit):
        """What a plain gradient step of rate 1 subtracts from all parameters."""
        model, guide, x = zoo_pair(PPCA, MeanField)
        start = state(model, guide)
        optimizer = torch.optim.SGD(parameters(model, guide), lr=1.0)
        train(SVI(model, guide, optimizer, Trace_ELBO(), **limit), x, steps=1)
        pairs = zip(start, state(model, guide), strict=True)
        return torch.cat([(old - new).flatten() for old, new in pairs])

    whole = applied()
    limit = factor * whole.norm().item()
    clipped = applied(max_grad_norm=limit)
    torch.testing.assert_close(clipped, whole * min(factor, 1.0), rtol=1e-5, atol=1e-7)
    assert clipped.norm().item() == pytest.approx(min(limit, whole.norm().item()), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("ours", [adam, pyro_adam])
def test_a_loss_that_is_not_finite_changes_nothing(ours):
    model, guide, x = zoo_pair(PPCA, MeanField)
    optimizer = ours(model, guide)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    train(svi, x, steps=2)
    before = state(model, guide)
    moments = copy.deepcopy(optimizer.state_dict()) if ours is adam else None
    spoiled = x.clone()
    spoiled[2, 1] = 1e200  # its square overflows
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf)"):
        svi.step(x=spoiled)
    assert all(map(torch.equal, state(model, guide), before))
    if moments is not None:
        torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)
    svi.step(x=x)  # training can go on
    assert all(p.isfinite().all() for p in parameters(model, guide))


@pytest.mark.parametrize(
    ("optim", "limit", "message"),
    [
        (None, None, r"optim is NoneType; expected a torch.optim.Optimizer.* or a pyro.optim one"),
        (torch.optim.Adam, None, "optim is type; expected a torch.optim.Optimizer"),
        (pyro.optim.Adam({}), 1.0, "max_grad_norm goes with a torch optimizer; PyroOptim clips"),
    ],
)
def test_optimizers_of_another_kind_are_refused(optim, limit, message):
    with pytest.raises(TypeError, match=message):
        SVI(*functions(), optim, Trace_ELBO(), max_grad_norm=limit)


def test_parameters_are_listed_once_in_order_without_frozen_ones():
    shared, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    found = parameters(nn.Sequential(shared, frozen), nn.Sequential(nn.Linear(2, 1), shared))
    assert [p.shape for p in found] == [(2, 2), (2,), (1, 2), (1,)]
    assert found[0] is shared.weight


@pytest.mark.parametrize("compile", [False, True])
def test_a_reduction_stands_between_gradients_and_optimizer(compile):
    """Plain gradient descent moves twice as far on doubled gradients, in trial steps too little
    to see: those are taken back, and not reduced."""
    moved = []
    for factor in (1.0, 2.0):
        model, guide, x = zoo_pair(PPCA, MeanField)
        before = state(model, guide)
        calls = []

        def reduce(loss, used, factor=factor, calls=calls):
            calls.append(float(loss))
            for parameter in used:
                parameter.grad.mul_(factor)
            return loss * factor, used

        optimizer = torch.optim.SGD(parameters(model, guide), 1e-3)
        loss = TraceMeanField_ELBO()
        svi = SVI(model, guide, optimizer, loss, compile=compile, reduce=reduce)
        svi.prepare(x=x, total=TOTAL, steps=1)
        assert not calls
        pyro.set_rng_seed(3)
        assert svi.step(x=x, total=TOTAL) == factor * calls[0]
        moved.append([b - a for a, b in zip(before, state(model, guide), strict=True)])
    once, twice = moved
    torch.testing.assert_close(twice, [2 * step for step in once])
    assert all(step.abs().max() > 0 for step in once)
