"""Compiled steps: the same numbers as Pyro's eager ones, for every objective and program."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.graphs import record
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.model import own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.svi import SVI, NonFiniteLoss, parameters
from ppl_vae.traceable import traceable

ROWS, WIDTH = 6, 5

Program = Callable[..., Any]


class Named:
    """A pair, an objective for it, and rows."""

    def __init__(self, model: Program, guide: Program, loss: Any, *args: Any, **kwargs: Any):
        self.model, self.guide, self.loss = model, guide, loss
        self.args, self.kwargs = args, kwargs

    def leaves(self) -> list[Tensor]:
        if isinstance(self.model, nn.Module):
            assert isinstance(self.guide, nn.Module)
            return list(parameters(self.model, self.guide))
        return [value for _, value in pyro.get_param_store().named_parameters()]


# -- programs as users of Pyro write them ------------------------------------------------------


class VanillaVAE(nn.Module):
    """As in Pyro's tutorial: `model` and `guide` are methods that register nets by name."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(7)] if batch_norm else []
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 7), *norm, nn.Softplus(), nn.Linear(7, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 7), nn.Dropout(dropout), nn.Linear(7, WIDTH))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], 3)
            z = pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def bits() -> Tensor:
    return torch.bernoulli(torch.full((ROWS, WIDTH), 0.4))


def vanilla(loss: Any = None, **options: Any) -> Named:
    vae = VanillaVAE(**options)
    return Named(vae.model, vae.guide, loss or Trace_ELBO(), bits())


def semi_supervised() -> Named:
    """Kingma et al. 2014's M2 as in Pyro's tutorial: the label is enumerated in the guide."""
    classifier, encoder = nn.Linear(WIDTH, 4), nn.Linear(WIDTH + 4, 6)
    decoder = nn.Linear(3 + 4, WIDTH)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).expand([3]).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(4) / 4))
            batch = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
            both = torch.cat([z.expand(*batch, 3), y.expand(*batch, 4)], -1)
            pyro.sample("x", dist.Bernoulli(logits=decoder(both)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("classifier", classifier)
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            y = pyro.sample("y", dist.OneHotCategorical(logits=classifier(x)))
            batch = y.shape[:-1]
            loc, scale = encoder(torch.cat([x.expand(*batch, WIDTH), y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    enumerated = config_enumerate(guide, "parallel", expand=True)
    return Named(model, enumerated, TraceEnum_ELBO(max_plate_nesting=1), bits())


def constrained() -> Named:
    """Parameters with constraints, and a global latent."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", x.new_tensor(0.7), constraint=constraints.positive)
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(WIDTH), 1.0).to_event(1))
        with pyro.plate("data", 3 * ROWS, subsample=torch.arange(ROWS)):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean = pyro.param("mean", x.new_zeros(WIDTH))
        spread = pyro.param(
            "spread", x.new_full((WIDTH,), 0.3), constraint=constraints.interval(0.0, 2.0)
        )
        pyro.sample("loc", dist.Normal(mean, spread).to_event(1))

    return Named(model, guide, Trace_ELBO(), torch.randn(ROWS, WIDTH))


def mixture() -> Named:
    """The tutorial's Gaussian mixture: assignments enumerated in the model."""

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
        locs = pyro.param("locs", torch.linspace(-1, 1, 3).to(x))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pass

    return Named(model, guide, TraceEnum_ELBO(max_plate_nesting=1), torch.randn(ROWS))


def sigmoid_belief_net(**baseline: Any) -> Named:
    """Bits under bits: a score-function gradient, with one of Pyro's baselines."""
    encoder, decoder, net = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((4,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        options = dict(baseline)
        if options.pop("neural", False):
            pyro.module("baseline", net)
            options |= {
                "nn_baseline": lambda given: net(given).squeeze(-1),
                "nn_baseline_input": x,
            }
        if options.pop("constant", False):
            options["baseline_value"] = pyro.param("constant", x.new_zeros(())).expand(len(x))
        with pyro.plate("data", x.shape[0]):
            pyro.sample(
                "z", dist.Bernoulli(logits=encoder(x)).to_event(1), infer={"baseline": options}
            )

    return Named(model, guide, TraceGraph_ELBO(), bits())


def of_the_zoo(model: type, guide: type, loss: Any) -> Named:
    made = model.toy()
    x = made.simulate(ROWS)["x"]
    return Named(made, guide(made, MLP(x.shape[1], 4), x=x), loss, x=x, total=4 * ROWS)


LOSSES: dict[str, Callable[[], Any]] = {
    "elbo": Trace_ELBO,
    "looped particles": lambda: Trace_ELBO(num_particles=3),
    "vectorized particles": lambda: Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "renyi": lambda: RenyiELBO(0.5, num_particles=2),
    "renyi vectorized": lambda: RenyiELBO(
        0.5, num_particles=2, max_plate_nesting=1, vectorize_particles=True
    ),
    "wake-sleep": lambda: ReweightedWakeSleep(num_particles=2, vectorize_particles=False),
}

PROGRAMS: dict[str, Callable[[], Named]] = {
    "vanilla": vanilla,
    "batch norm": lambda: vanilla(batch_norm=True),
    "dropout": lambda: vanilla(dropout=0.5),
    "semi-supervised": semi_supervised,
    "constrained": constrained,
    "mixture": mixture,
    "score function": sigmoid_belief_net,
    "neural baseline": lambda: sigmoid_belief_net(neural=True),
    "average baseline": lambda: sigmoid_belief_net(use_decaying_avg_baseline=True),
    "constant baseline": lambda: sigmoid_belief_net(constant=True),
    **{
        f"{model.__name__}, {guide.__name__}, {name}": (
            lambda model=model, guide=guide, loss=loss: of_the_zoo(model, guide, loss())
        )
        for model in (VAE, PPCA, Template)
        for guide in (MeanField, FullRank)
        for name, loss in LOSSES.items()
    },
}


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Any:
    before = torch.get_default_dtype()
    assert isinstance(request.param, torch.dtype)
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def seeded() -> Any:
    pyro.clear_param_store()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TraceEnum_ELBO found no sample sites")
        yield


# -- recorded, not compiled: the same bits -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in PROGRAMS
        for dtype in (torch.float32, torch.float64)
        if dtype is torch.float32 or "," not in name
    ],
    indirect=["dtype"],
)
def test_a_recorded_graph_gives_pyros_bits(name: str, dtype: torch.dtype) -> None:
    named = PROGRAMS[name]()
    loss = named.loss
    loss.loss_and_grads(named.model, named.guide, *named.args, **named.kwargs)  # makes parameters

    def pyros(*args: Any) -> tuple[Any, list[Tensor | None]]:
        for leaf in named.leaves():
            leaf.grad = None
        with own_parameters(named.model, named.guide):
            value = loss.loss_and_grads(named.model, named.guide, *args, **kwargs_of(args))
        return value, [leaf.grad for leaf in named.leaves()]

    def ours(*args: Tensor) -> tuple[Any, list[Tensor | None]]:
        for leaf in named.leaves():
            leaf.grad = None
        with own_parameters(named.model, named.guide):
            value = backward(loss, named.model, named.guide, *args, **kwargs_of(args))
        return value, [leaf.grad for leaf in named.leaves()]

    def kwargs_of(args: tuple[Any, ...]) -> dict[str, Any]:
        return {} if named.args else named.kwargs

    averaged = "average baseline" in name
    store = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    with traceable():
        _, graph = record(ours, *named.args)
    assert len(graph) > 20
    for seed in (1, 2):
        if averaged:  # each run moves the average, and the graph's stays where it was recorded
            pyro.get_param_store()["__baseline_avg_downstream_cost_z"] = store[
                "__baseline_avg_downstream_cost_z"
            ]
        torch.manual_seed(seed)
        expected, gradients = pyros(*named.args)
        torch.manual_seed(seed)
        value, recorded = graph(*named.args)
        assert as_floats(value) == as_floats(expected)
        assert sum(gradient is not None for gradient in gradients) > 0
        for gradient, other in zip(gradients, recorded, strict=True):
            assert (gradient is None) == (other is None)
            assert gradient is None or torch.equal(gradient, other)


def as_floats(loss: Any) -> tuple[float, ...]:
    return tuple(map(float, loss)) if isinstance(loss, tuple) else (float(loss),)


# -- compiled: the same numbers up to rounding -------------------------------------------------


def torch_adam(named: Named) -> torch.optim.Optimizer:
    return torch.optim.Adam(named.leaves(), 1e-2, fused=True)


def pyro_adam(_: Named) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 1e-2})


def pyro_sgd(_: Named) -> pyro.optim.PyroOptim:
    # Adam would blow up what is rounding in the gradient of a bias in front of a batch norm.
    return pyro.optim.SGD({"lr": 1e-3})


def trained(
    name: str, compile: bool, optimizer: Any = pyro_adam, steps: int = 100
) -> tuple[SVI, list[Any], dict[str, Tensor]]:
    """Losses of a training from one seed, and all that it has trained."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    named = PROGRAMS[name]()
    svi = SVI(named.model, named.guide, optimizer(named), named.loss, compile=compile)
    torch.manual_seed(1)
    losses = [svi.step(*named.args, **named.kwargs) for _ in range(steps)]
    if isinstance(named.model, nn.Module):
        left = {f"{i}": p.detach().clone() for i, p in enumerate(named.leaves())}
    else:
        left = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    owner = getattr(named.model, "__self__", None)
    if owner is not None:
        left |= {name: buffer.clone() for name, buffer in owner.named_buffers()}
    return svi, losses, left


@pytest.mark.parametrize(
    ("name", "dtype", "optimizer"),
    [
        ("VAE, MeanField, elbo", torch.float32, torch_adam),
        ("VAE, MeanField, elbo", torch.float64, torch_adam),
        ("batch norm", torch.float64, pyro_sgd),
        ("semi-supervised", torch.float64, pyro_adam),
        ("average baseline", torch.float64, pyro_adam),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("Template, FullRank, mean field", torch.float64, torch_adam),
                ("PPCA, MeanField, renyi vectorized", torch.float64, pyro_adam),
                ("PPCA, MeanField, wake-sleep", torch.float64, pyro_adam),
                ("dropout", torch.float32, pyro_adam),
                ("constrained", torch.float64, pyro_adam),
                ("mixture", torch.float64, pyro_adam),
                ("neural baseline", torch.float32, pyro_adam),
            )
        ),
    ],
    indirect=["dtype"],
)
def test_compiled_steps_lead_where_eager_ones_do(
    name: str, dtype: torch.dtype, optimizer: Any
) -> None:
    _, expected, left = trained(name, False, optimizer)
    svi, losses, own_left = trained(name, True, optimizer)
    assert svi.compile_seconds > 0
    assert not svi.refused
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    for loss, other in zip(losses, expected, strict=True):
        assert as_floats(loss) == pytest.approx(as_floats(other), rel=tolerance)
    assert len(set(map(str, losses))) == len(losses), "each step draws anew"
    assert left.keys() == own_left.keys()
    for key, value in left.items():
        torch.testing.assert_close(own_left[key], value, rtol=1e3 * tolerance, atol=1e3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adamax(p, 1e-2),
        lambda p: torch.optim.Adagrad(p, 1e-2),  # stands outside of the graph
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
                lambda p: torch.optim.NAdam(p, 1e-2),
                lambda p: torch.optim.RAdam(p, 1e-2),
                lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
                lambda p: torch.optim.Adadelta(p),
                lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, nesterov=True),
            )
        ),
    ],
    ids=["Adamax", "Adagrad", "AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta", "SGD"],
)
def test_optimizers_step_in_the_graph_as_torch_steps_them(make: Any, dtype: torch.dtype) -> None:
    """With a schedule of the learning rate, clipping, and a state that is loaded midway."""

    def run(compile: bool) -> list[Tensor]:
        torch.manual_seed(0)
        named = PROGRAMS["PPCA, MeanField, elbo"]()
        optimizer = make(named.leaves())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        svi = SVI(
            named.model, named.guide, optimizer, named.loss, compile=compile, max_grad_norm=5.0
        )
        for step in range(12):
            svi.step(**named.kwargs)
            schedule.step()
            if step == 6:
                optimizer.load_state_dict(optimizer.state_dict())
        assert not svi.refused
        assert (svi.compile_seconds > 0) is compile
        slots = [s for state in optimizer.state.values() for s in state.values()]
        return [*named.leaves(), *(s for s in slots if isinstance(s, Tensor))]

    for own, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_a_compiled_step_follows_what_it_reads(dtype: torch.dtype) -> None:
    """Training mode, a number of a module, a number among the arguments, a replaced tensor, another
    shape: each as in eager steps."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(3, WIDTH), nn.Dropout(0.5))
            self.noise = 1.0
            self.register_buffer("shift", torch.zeros(WIDTH))

        def model(self, x: Tensor, weight: float) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", 50, subsample=torch.arange(len(x))):
                with poutine.scale(scale=weight):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                loc = self.decoder(z) + self.shift
                pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

        def guide(self, x: Tensor, weight: float) -> None:
            slope = pyro.param("slope", x.new_full((WIDTH, 3), 0.1))
            rows = pyro.plate("data", 50, subsample=torch.arange(len(x)))
            with rows, poutine.scale(scale=weight):
                pyro.sample("z", dist.Normal(x @ slope, 1.0).to_event(1))

    def run(compile: bool) -> tuple[list[float], SVI]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        programs = Model()
        x = torch.randn(ROWS, WIDTH)
        svi = SVI(programs.model, programs.guide, pyro_adam(None), Trace_ELBO(), compile=compile)
        losses = [svi.step(x, 1.0) for _ in range(3)]
        losses += [svi.step(x, weight / 10) for weight in range(1, 8)]  # annealing
        seconds = svi.compile_seconds
        losses += [svi.step(x, weight / 10) for weight in range(1, 8)]
        assert svi.compile_seconds == seconds, "another weight needs no other graph"
        programs.eval()
        losses += [svi.step(x, 1.0) for _ in range(2)]
        programs.noise = 2.0
        losses += [svi.step(x, 1.0) for _ in range(2)]
        programs.shift = torch.ones(WIDTH)
        losses += [svi.step(x, 1.0) for _ in range(2)]
        losses += [svi.step(x[:4], 1.0) for _ in range(3)]
        return losses, svi

    expected, _ = run(False)
    losses, svi = run(True)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert not svi.refused


def test_a_loss_that_is_not_finite_changes_nothing_in_the_graph() -> None:
    named = PROGRAMS["PPCA, MeanField, elbo"]()
    optimizer = torch_adam(named)
    svi = SVI(named.model, named.guide, optimizer, named.loss, compile=True)
    x = named.kwargs["x"]
    for _ in range(3):
        svi.step(x=x)
    assert svi.compile_seconds > 0
    slots = [s for state in optimizer.state.values() for s in state.values()]
    before = [t.detach().clone() for t in (*named.leaves(), *slots)]
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf)"):
        svi.step(x=x + torch.inf)
    assert all(map(torch.equal, before, (*named.leaves(), *slots)))
    svi.step(x=x)
    assert not torch.equal(before[0], named.leaves()[0])


# -- what cannot be compiled -------------------------------------------------------------------


def counting(x: Tensor) -> None:
    """A geometric number of draws, as in Attend, Infer, Repeat."""
    probability = pyro.param("probability", torch.tensor(0.5), constraint=constraints.unit_interval)
    steps = 0
    while pyro.sample(f"again_{steps}", dist.Bernoulli(probability)).item():  # the line
        steps += 1
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(float(steps), 1.0).to_event(0), obs=x)


def counting_guide(x: Tensor) -> None:
    guess = pyro.param("guess", torch.tensor(0.3), constraint=constraints.unit_interval)
    steps = 0
    while pyro.sample(f"again_{steps}", dist.Bernoulli(guess)).item():
        steps += 1


def noisy(x: Tensor) -> None:
    """Draws from Python's own random state, which a graph would repeat."""
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + random.gauss(0, 1), 1.0), obs=x)


def empty(x: Tensor) -> None:
    pass


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize(
    ("model", "guide", "reason"),
    [
        (counting, counting_guide, r"test_recorded_steps.py:\d+ \(while .*value of a tensor"),
        (noisy, empty, "another result than the eager one"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly_with_one_warning(
    model: Program, guide: Program, reason: str
) -> None:
    def run(compile: bool) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        svi = SVI(model, guide, pyro_adam(None), TraceGraph_ELBO(), compile=compile)
        losses = [svi.step(x)]
        if compile:
            with pytest.warns(RuntimeWarning, match=f"steps run eagerly.*{reason}"):
                losses.append(svi.step(x))
            assert svi.refused
        random.seed(0)
        return [*losses, *(svi.step(x) for _ in range(5))][-5:]

    x = torch.randn(4)
    again, expected = run(True), run(False)
    assert len(again) == len(expected) == 5
    if model is counting:
        assert all(map(torch.isfinite, map(torch.tensor, again)))


def test_without_a_c_compiler_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def missing(*_: Any, **__: Any) -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    _, expected, _ = trained("VAE, MeanField, elbo", False, torch_adam, steps=5)
    from torch._inductor.utils import fresh_cache

    with fresh_cache(), pytest.warns(RuntimeWarning, match=r"steps run eagerly.*C\+\+ compiler"):
        svi, losses, _ = trained("VAE, MeanField, elbo", True, torch_adam, steps=5)
    assert svi.refused
    assert losses == expected, "to the same bits: the trial was taken back"


# -- auto --------------------------------------------------------------------------------------


def test_auto_leaves_short_runs_alone_and_compiles_long_ones() -> None:
    named = PROGRAMS["VAE, MeanField, elbo"]()
    svi = SVI(named.model, named.guide, torch_adam(named), named.loss, compile="auto")
    start = [leaf.detach().clone() for leaf in named.leaves()]
    random_state = torch.get_rng_state()
    assert not svi.prepare(**named.kwargs, steps=100)
    assert svi.compile_seconds == 0
    other = PROGRAMS["VAE, MeanField, elbo"]()
    torch.set_rng_state(random_state)
    svi_of_many = SVI(other.model, other.guide, torch_adam(other), other.loss, compile="auto")
    assert svi_of_many.prepare(**other.kwargs, steps=1_000_000)
    assert svi_of_many.compile_seconds > 0
    # The trial has been taken back.
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, start, [leaf.detach() for leaf in named.leaves()]))
    assert not any(s.any() for state in svi.optim.state.values() for s in state.values())
