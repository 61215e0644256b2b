"""Every objective in a recorded step: the bits of the eager one."""

from __future__ import annotations

import copy

import pytest
import torch

from ppl_vae.conditionals import Normal
from ppl_vae.discrete import Bits
from ppl_vae.graphs import record
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.model import own_parameters
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.models.sigmoid_belief_network import SigmoidBeliefNetwork
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import (
    DIPVAE,
    IWAE,
    VIMCO,
    Beta,
    BetaTC,
    Capacity,
    DReG,
    FactorVAE,
    FreeBits,
    InfoVAE,
    LeaveOneOut,
    ReweightedWakeSleep,
    StickingTheLanding,
    backward,
)
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable
from ppl_vae.training import Training

ROWS, TOTAL = 6, 24
OBJECTIVES = {
    "beta": lambda: Beta(4.0, draws=2),
    "capacity": lambda: Capacity(2.0, 4.0),
    "free bits": lambda: FreeBits(0.1, "all"),
    "iwae": lambda: IWAE(3),
    "landing": lambda: StickingTheLanding(2),
    "dreg": lambda: DReG(3),
    "tc": lambda: BetaTC(6.0),
    "factor": lambda: FactorVAE(MLP(3, 8, 1)),
    "dip": lambda: DIPVAE(1.0, 2.0),
    "info": lambda: InfoVAE(),
    "vimco": lambda: VIMCO(3),
    "others": lambda: LeaveOneOut(3),
    "wake-sleep": lambda: ReweightedWakeSleep(3, sleep=0.5),
}


def of_one_site():
    model = VAE.toy()
    x = model.simulate(ROWS)["x"]
    return model, MeanField(model, MLP(6, 4), x=x), x


def of_levels():
    """The guide's levels hang on one another."""
    model = Hierarchy.toy()
    x = model.simulate(ROWS)["x"]
    sizes = {"z3": 4, "z2": 6, "z1": 8}  # locations and scales
    widths, above = {"z3": 6, "z2": 6 + 2, "z1": 6 + 3}, {"z3": [], "z2": ["z3"], "z1": ["z2"]}
    sites = {z: (Normal(MLP(widths[z], 5, sizes[z])), ["x", *above[z]]) for z in sizes}
    return model, Factorized(**sites), x


def of_bits():
    """Two layers of bits, without reparameterization."""
    model = SigmoidBeliefNetwork.toy()
    x = model.simulate(ROWS)["x"]
    return model, Factorized(z1=(Bits(MLP(6, 3)), ["x"]), z2=(Bits(MLP(3, 2)), ["z1"])), x


CASES = [
    *((of_one_site, name) for name in OBJECTIVES),
    *((of_bits, name) for name in ("vimco", "others", "wake-sleep")),
    (of_levels, "dreg"),
    *(pytest.param((of_levels, name), marks=pytest.mark.slow) for name in ("landing", "iwae")),
]


def made(make, name):
    """Pair, objective as it is trained, data, and all parameters; the same at each call."""
    torch.manual_seed(0)
    model, guide, x = make()
    training = Training(OBJECTIVES[name](), TOTAL)
    training.weight = 0.5
    training.at(1.0)
    state = [] if training.state is None else [training.state]
    return model, guide, training, x, parameters(model, guide, *state)


def called(case):
    return f"{case[1]}, {case[0].__name__}"


@pytest.mark.parametrize("case", CASES, ids=called)
def test_a_recorded_graph_gives_the_same_bits(case):
    model, guide, training, x, held = made(*case)

    def step(x):
        for parameter in held:
            parameter.grad = None
        with own_parameters(model, guide):
            loss = backward(training, model, guide, x, total=TOTAL)
        return loss, [p.grad for p in held]

    with traceable():
        _, graph = record(step, x)
    for seed in (1, 2):
        data = x.roll(seed, 0)
        torch.manual_seed(seed)
        expected, gradients = step(data)
        torch.manual_seed(seed)
        loss, recorded = graph(data)
        assert loss == expected
        assert all(gradient is not None for gradient in gradients)
        for gradient, other in zip(gradients, recorded, strict=True):
            assert torch.equal(gradient, other)
    copy.deepcopy((model, guide, training))  # nothing of a step is left in them
    training.at(3.0)  # a recorded graph follows what changes over training
    torch.manual_seed(3)
    expected, _ = step(x)
    torch.manual_seed(3)
    assert graph(x)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", [(of_levels, "dreg"), (of_one_site, "factor")], ids=called)
def test_a_compiled_step_leads_where_the_eager_one_does(case):
    found = []
    for compiled in (False, True):
        model, guide, training, x, held = made(*case)
        optimizer = torch.optim.Adam(held, 1e-2)
        svi = SVI(model, guide, optimizer, training, compile=compiled)
        torch.manual_seed(1)
        losses = [svi.step(x, total=TOTAL) for _ in range(30)]
        assert (svi.compile_seconds > 0) is compiled
        assert not svi.refused
        found.append((losses, [p.detach() for p in held]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-3)
