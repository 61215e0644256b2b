from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.evaluation import evaluate
from ppl_vae.flows import (
    Coupling,
    FlowNormal,
    Householder,
    InverseAutoregressive,
    MaskedAutoregressive,
    Planar,
    RationalQuadratic,
)
from ppl_vae.graphs import record
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import own_parameters
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward, plain_elbo
from ppl_vae.priors import Autoregressive, FlowPrior, StandardNormal
from ppl_vae.sites import check_pair
from ppl_vae.sylvester import Sylvester
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

SPLINE = RationalQuadratic(bins=4, bound=3.0)

PRIORS: dict[str, Callable[[int], nn.Module]] = {
    "standard normal": StandardNormal,
    "MAF": lambda size: FlowPrior(MaskedAutoregressive(size, layers=2)),
    "IAF": lambda size: FlowPrior(InverseAutoregressive(size, layers=2)),
    "Householder": lambda size: FlowPrior(Householder(size, layers=2)),
    "coupling": lambda size: FlowPrior(Coupling(size, layers=2)),
    "coupling of splines": lambda size: FlowPrior(Coupling(size, layers=2, elementwise=SPLINE)),
    "autoregressive": partial(Autoregressive, hidden=[6]),
    "autoregressive mixture": partial(Autoregressive, components=3),
}

priors = pytest.mark.parametrize("name", PRIORS)


def moved(name: str, size: int, by: float = 0.15) -> nn.Module:
    """A prior with random parameters, away from where learning starts."""
    prior = PRIORS[name](size)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += by * torch.randn_like(parameter)
    return prior


@pytest.mark.parametrize("size", [1, 4])
def test_standard_normal_is_scipys(size):
    d = StandardNormal(size)()
    assert (d.batch_shape, d.event_shape) == ((), (size,))
    z = torch.linspace(-3, 3, 5 * size).reshape(5, size)
    expected = scipy.stats.multivariate_normal.logpdf(z.numpy(), np.zeros(size))
    torch.testing.assert_close(d.log_prob(z), torch.from_numpy(np.array(expected)))
    assert d.rsample((100, 2)).shape == (100, 2, size)


def test_standard_normal_has_nothing_to_learn_or_save_and_follows_the_dtype():
    prior = StandardNormal(3)
    assert not list(prior.parameters())
    assert not prior.state_dict()
    for dtype in (torch.float32, torch.float64):
        assert prior.to(dtype)().sample().dtype == dtype
    assert prior.to("meta").loc.device.type == "meta"


@priors
def test_density_integrates_to_one_and_draws_have_its_moments(name: str) -> None:
    d = moved(name, 2)()
    assert (d.batch_shape, d.event_shape) == ((), (2,))
    axis = torch.linspace(-12, 12, 481)
    z = torch.cartesian_prod(axis, axis)
    mass = d.log_prob(z).exp() * (axis[1] - axis[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    draws = d.sample((20_000,))
    for moment in (lambda z: z, lambda z: z[:, :1] * z, lambda z: z[:, 1:] * z, torch.cos):
        values = moment(draws)
        expected = (mass.unsqueeze(-1) * moment(z)).sum(0)
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - expected).abs() < 5 * error + 3e-3).all()


@priors
def test_starts_near_the_standard_normal(name: str) -> None:
    d, plain = PRIORS[name](4)(), StandardNormal(4)()
    z = plain.sample((500,))
    kl = (plain.log_prob(z) - d.log_prob(z)).mean().item()
    assert abs(kl) < 0.1


@priors
def test_shapes_under_plates_and_dtypes_whatever_the_default_is(name: str) -> None:
    prior = moved(name, 3)
    torch.set_default_dtype(torch.float32)  # the fixture puts it back
    for dtype in (torch.float64, torch.float32):
        prior = prior.to(dtype)
        with pyro.plate("particles", 4, dim=-2), pyro.plate("rows", 5):
            z = pyro.sample("z", prior())
        assert (z.shape, z.dtype) == ((4, 5, 3), dtype)
        expanded = prior().expand([4, 5])
        score = expanded.log_prob(z)
        assert (score.shape, score.dtype) == ((4, 5), dtype)
        torch.testing.assert_close(score[1, 2], prior().log_prob(z[1, 2]))
        torch.testing.assert_close(expanded.log_prob(z[1, 2])[3, 3], score[1, 2])


@priors
def test_learns_in_a_vae_and_is_evaluated(name: str) -> None:
    model = VAE(PRIORS[name](3), Bernoulli(MLP(3, 8, 6)))
    x = model.simulate(6)["x"]
    guide = MeanField(model, MLP(6, 8, 5), x)
    check_pair(model, guide, x, total=60)
    with own_parameters(model, guide):
        backward(plain_elbo(model, guide, x), model, guide, x)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    result = evaluate(model, guide, {"train": x, "test": x}, samples=3)
    assert result.elbo <= -result.nll < 0
    # A copy, and loaded weights, have the same density after all that.
    z = torch.randn(7, 3)
    other = moved(name, 3)
    other.load_state_dict(model.prior.state_dict())
    for same in (copy.deepcopy(model.prior), other):
        assert torch.equal(same().log_prob(z), model.prior().log_prob(z))


@priors
def test_a_recorded_score_and_its_gradient_have_the_bits_of_eager_ones(name: str) -> None:
    prior = moved(name, 3)

    def score(z: Tensor) -> tuple[Tensor, ...]:
        z = z.clone().requires_grad_()
        log_p = prior().log_prob(z).sum()
        return log_p, *torch.autograd.grad(log_p, [z, *prior.parameters()])

    with traceable():
        _, graph = record(score, torch.randn(5, 3))
    z = 2 * torch.randn(5, 3)
    for own, eager in zip(graph(z), score(z), strict=True):
        assert torch.equal(own, eager)


@pytest.mark.parametrize("components", [1, 3])
def test_autoregressive_is_the_product_of_its_conditionals(components: int) -> None:
    """Each a mixture by scipy's normals, which the latents before it, and no others, decide."""
    size = 4
    prior = Autoregressive(size, [7, 5], components=components)
    locs = prior.net(torch.zeros(size)).reshape(3, components, size)[1]
    assert (locs.diff(dim=0) > 0.3).all(), "components begin apart"
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    z = torch.randn(size)
    jacobian = torch.autograd.functional.jacobian(prior.net, z)  # (3 C, size, size)
    assert jacobian.tril(-1).any()
    assert not jacobian.triu().any()
    logits, loc, raw = prior.net(z).detach().reshape(3, components, size)
    weights, scale = logits.softmax(0), nn.functional.softplus(raw + np.log(np.e - 1))
    normals = scipy.stats.norm(loc.numpy(), scale.numpy())
    density = weights * torch.from_numpy(normals.pdf(z.numpy()))
    torch.testing.assert_close(prior().log_prob(z), density.sum(0).log().sum())


def test_one_normal_a_latent_is_a_masked_flow_of_one_step() -> None:
    prior = Autoregressive(3)
    flow = MaskedAutoregressive(3, layers=1)
    assert isinstance(flow.nets[0], type(prior.net))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

        class Same(nn.Module):
            """The numbers of the flow's inverse affine map that the prior's normals are."""

            coordinates = prior.net.coordinates

            def forward(self, z: Tensor, context: None) -> Tensor:
                _, loc, raw = prior.net(z).unbind(-2)
                scale = nn.functional.softplus(raw + np.log(np.e - 1))
                return torch.stack([-loc / scale, 5 * torch.atanh(-scale.log() / 5)], -2)

        flow.nets[0] = Same()
        z = torch.randn(5, 3)
        torch.testing.assert_close(FlowPrior(flow)().log_prob(z), prior().log_prob(z))


def test_a_prior_with_context_is_a_conditional() -> None:
    """p(z | c) as the module's page says, in a guide's place and in particles."""
    q = FlowNormal(MLP(4, 6), MaskedAutoregressive(3, 4))
    labels = torch.eye(4)
    trace = poutine.trace(Factorized(z=(q, ["c"]))).get_trace(c=labels)
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(q(labels).log_prob(z), trace.nodes["z"]["fn"].log_prob(z))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StandardNormal(0), r"StandardNormal\(0\): expected at least 1 latent"),
        (lambda: StandardNormal(-2), r"StandardNormal\(-2\): expected at least 1 latent"),
        (lambda: FlowPrior(Planar(3)), r"FlowPrior\(Planar\).*take MaskedAutoregressive or"),
        (lambda: FlowPrior(Sylvester(3)), r"FlowPrior\(Sylvester\).*that it did not draw"),
        (lambda: FlowPrior(Coupling(3, 2)), r"its context has width 2, and a prior has none"),
        (lambda: Autoregressive(0), r"size 0.*expected at least 1 coordinate"),
        (lambda: Autoregressive(3, components=0), r"components=0\): expected at least 1"),
        (lambda: Autoregressive(3, [2]), r"hidden widths \(2,\).*none narrower"),
    ],
)
def test_what_cannot_be_a_prior_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
