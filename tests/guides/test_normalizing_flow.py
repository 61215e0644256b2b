"""Guides of every flow on the toy VAE, in recorded steps too; and on PPCA, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.evaluation import evaluate
from ppl_vae.flows import (
    Coupling,
    Flow,
    FlowNormal,
    Householder,
    InverseAutoregressive,
    MaskedAutoregressive,
    Planar,
    Radial,
    RationalQuadratic,
)
from ppl_vae.graphs import record
from ppl_vae.guides.normalizing_flow import NormalizingFlow
from ppl_vae.model import own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.sites import PairError, check_pair
from ppl_vae.svi import SVI, parameters
from ppl_vae.sylvester import Sylvester
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

ROWS = 6
SPLINE = RationalQuadratic(bins=4)

FLOWS: dict[str, Callable[..., Flow]] = {
    name: partial(flow, layers=2, **options)
    for name, flow, options in (
        ("planar", Planar, {}),
        ("radial", Radial, {}),
        ("householder", Householder, {}),
        ("orthogonal Sylvester", Sylvester, {}),
        ("householder Sylvester", Sylvester, {"kind": "householder"}),
        ("triangular Sylvester", Sylvester, {"kind": "triangular"}),
        ("IAF", InverseAutoregressive, {}),
        ("IAF of splines", InverseAutoregressive, {"elementwise": SPLINE}),
        ("MAF", MaskedAutoregressive, {}),
        ("coupling", Coupling, {}),
        ("coupling of splines", Coupling, {"elementwise": SPLINE}),
    )
}

flows = pytest.mark.parametrize("name", FLOWS)


def pair(name: str) -> tuple[VAE, NormalizingFlow, Tensor]:
    model = VAE.toy()
    x = model.simulate(ROWS)["x"]
    return model, NormalizingFlow(model, MLP(6, 8, 5), x, flow=FLOWS[name]), x


@flows
def test_fits_the_model_and_every_parameter_learns(name: str) -> None:
    model, guide, x = pair(name)
    check_pair(model, guide, x, total=10 * ROWS)
    with own_parameters(model, guide):
        backward(Trace_ELBO(), model, guide, x)
    for parameter_name, parameter in guide.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    result = evaluate(model, copy.deepcopy(guide), {"train": x, "test": x}, samples=3)
    assert result.elbo <= -result.nll < 0


@pytest.mark.parametrize(
    ("name", "particles"),
    [*((name, 1) for name in FLOWS), ("IAF", 3), ("orthogonal Sylvester", 3)],
)
def test_a_recorded_step_gives_the_bits_of_an_eager_one(name: str, particles: int) -> None:
    model, guide, x = pair(name)
    loss = Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1)
    leaves = list(parameters(model, guide))

    def step(x: Tensor) -> tuple[Any, list[Tensor | None]]:
        for leaf in leaves:
            leaf.grad = None
        with own_parameters(model, guide):
            value = backward(loss, model, guide, x)
        return value, [leaf.grad for leaf in leaves]

    with traceable():
        _, graph = record(step, x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected, gradients = step(x)
        torch.manual_seed(seed)
        value, recorded = graph(x)
        assert float(value) == float(expected)
        for gradient, other in zip(gradients, recorded, strict=True):
            assert gradient is not None
            assert torch.equal(gradient, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IAF", "orthogonal Sylvester"])
def test_compiled_steps_lead_where_eager_ones_do(name: str) -> None:
    def losses(compile: bool) -> list[Any]:
        torch.manual_seed(0)
        model, guide, x = pair(name)
        optimizer = torch.optim.Adam(list(parameters(model, guide)), 1e-2)
        svi = SVI(model, guide, optimizer, Trace_ELBO(), compile=compile)
        found = [svi.step(x) for _ in range(20)]
        assert (svi.compile_seconds > 0) is compile
        assert not svi.refused
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-9)


def test_a_flow_that_cannot_move_a_site_is_refused_by_the_sites_name() -> None:
    model = Template.toy()
    x = model.simulate(ROWS)["x"]
    with pytest.raises(PairError, match=r"site 'z': Coupling\(size=1\).*InverseAutoregressive"):
        NormalizingFlow(model, MLP(4, 8, 5), x, flow=Coupling)


@pytest.mark.parametrize("name", ["planar", "radial", "orthogonal Sylvester"])
def test_a_posterior_without_inverse_scores_its_draws_only(name: str) -> None:
    _, guide, x = pair(name)
    q = guide.posterior(x)
    assert q.log_prob(q.rsample()).isfinite().all()
    with pytest.raises(NotImplementedError, match="scores only the value that it drew last"):
        q.log_prob(torch.zeros(ROWS, 3))


# -- on a known posterior ------------------------------------------------------------------------


def correlated() -> tuple[PPCA, Tensor]:
    """Two latents whose posterior has a correlation of -0.98."""
    model = PPCA(2, 3, scale=0.3)
    with torch.no_grad():
        model.likelihood.net.weight.copy_(torch.tensor([[1.5, 1.2], [0.1, 0.2], [1.4, 1.3]]))
    return model, model.simulate(50)["x"]


def test_an_affine_autoregressive_step_can_be_any_normal() -> None:
    """Weights set by hand reach the exact posterior: the ELBO of each draw is the evidence."""
    model, x = correlated()
    flow = partial(InverseAutoregressive, layers=1)
    guide = NormalizingFlow(model, nn.Identity(), x, flow=flow)
    exact = model.posterior(torch.cat([torch.zeros(1, 3), torch.eye(3)]))
    factor = exact.scale_tril[0]
    with torch.no_grad():
        for parameter in guide.heads.parameters():
            parameter.zero_()
        head = guide.heads["z"]
        assert isinstance(head, FlowNormal)
        # e = L^-1 m + n; first z_1 = L_11 e_1, then z_2 = L_22 e_2 + L_21 e_1.
        locs = torch.linalg.solve(factor, exact.loc.T).T
        linear, step = head.base.net, head.flow.nets[0]
        linear.weight[:2] = (locs[1:] - locs[0]).T
        linear.bias.copy_(torch.cat([locs[0], torch.ones(2).expm1().log()]))
        step.skip_layer.weight[1, 3] = factor[1, 0]  # after the context, z_1
        step.layers[-1].bias[2:] = 5 * torch.atanh(factor.diagonal().log() / 5)
    with own_parameters(model, guide):
        loss = Trace_ELBO().loss(model, guide, x)
    assert loss == pytest.approx(-model.evidence(x).sum().item(), rel=1e-10)
