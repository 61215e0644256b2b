"""Normalizing flows: densities against quadrature, and Jacobians by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import Transform
from torch import Tensor, nn

from ppl_vae.elementwise import Affine, RationalQuadratic
from ppl_vae.flow import Flow, FlowNormal, RawNumbers
from ppl_vae.flows import (
    Coupling,
    Householder,
    InverseAutoregressive,
    MaskedAutoregressive,
    Planar,
    Radial,
)
from ppl_vae.guide import Factorized
from ppl_vae.nn import MLP
from ppl_vae.sylvester import Sylvester, orthonormal

pytestmark = pytest.mark.usefixtures("float64")

SPLINE = RationalQuadratic(bins=4, bound=3.0)

FLOWS: dict[str, Callable[..., Flow]] = {
    "planar": partial(Planar, layers=3),
    "radial": partial(Radial, layers=3),
    "householder": partial(Householder, layers=4),
    "orthogonal Sylvester": partial(Sylvester, layers=2, kind="orthogonal"),
    "householder Sylvester": partial(Sylvester, layers=2, kind="householder"),
    "triangular Sylvester": partial(Sylvester, layers=2, kind="triangular"),
    "IAF": partial(InverseAutoregressive, layers=2, hidden=[6]),
    "IAF of splines": partial(InverseAutoregressive, layers=2, hidden=[6], elementwise=SPLINE),
    "MAF": partial(MaskedAutoregressive, layers=2, hidden=[6, 5]),
    "MAF of splines": partial(MaskedAutoregressive, layers=2, hidden=[6], elementwise=SPLINE),
    "coupling": partial(Coupling, layers=3, hidden=[6]),
    "coupling of splines": partial(Coupling, layers=3, hidden=[6], elementwise=SPLINE),
}
CONTEXT = 3

flows = pytest.mark.parametrize("name", FLOWS)


def moved(name: str, size: int, context: int = CONTEXT, by: float = 0.3) -> Flow:
    """A flow with random parameters, away from where learning starts."""
    flow = FLOWS[name](size, context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += by * torch.randn_like(parameter)
    return flow


def push(transforms: list[Transform], x: Tensor) -> tuple[Tensor, Tensor]:
    """The value that transforms give, and their log-determinants' sum."""
    log_det = torch.zeros(())
    for transform in transforms:
        y = transform(x)
        log_det = log_det + transform.log_abs_det_jacobian(x, y)
        x = y
    return x, log_det


def invertible(name: str) -> bool:
    return FLOWS[name](2, 0).invertible


@flows
@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("size", [2, 5])
def test_log_determinants_are_those_of_the_jacobian(name: str, context: int, size: int) -> None:
    flow, rows = moved(name, size, context), 4
    given = torch.randn(rows, context) if context else None
    x = torch.randn(rows, size)
    y, log_det = push(flow(given), x)
    for row in range(rows):
        own = None if given is None else given[row]
        jacobian = torch.autograd.functional.jacobian(
            lambda x, own=own: push(flow(own), x)[0], x[row]
        )
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet)
    assert (y - x).abs().max() > 0.02, "moved enough to tell"


def preimages(flow: Flow, context: Tensor, y: Tensor) -> Tensor:
    """x with flow(x) = y, by Newton's method with a line search a row."""
    x = y.clone()
    for _ in range(60):
        x.requires_grad_()
        residual = push(flow(context), x)[0] - y
        if residual.abs().max() < 1e-10:
            return x.detach()
        jacobian = torch.stack(
            [torch.autograd.grad(r.sum(), x, retain_graph=True)[0] for r in residual.unbind(-1)], -2
        )
        with torch.no_grad():
            step = torch.linalg.solve(jacobian, residual.unsqueeze(-1)).squeeze(-1)
            shares = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.01]).reshape(-1, 1, 1)
            tried = x - shares * step
            best = (push(flow(context), tried)[0] - y).norm(dim=-1).argmin(0)
            x = tried[best, torch.arange(len(y))]
    raise AssertionError(f"no preimage within {residual.abs().max():g}")


@flows
def test_density_integrates_to_one(name: str) -> None:
    """A density that misses a preimage, or has a wrong determinant, does not."""
    flow = moved(name, 2, by=0.15)
    context = torch.randn(CONTEXT)
    base = dist.Normal(torch.tensor([0.3, -0.4]), torch.tensor([0.9, 0.6])).to_event(1)
    drawn = push(flow(context), base.sample((500,)))[0].detach()
    mean, spread = drawn.mean(0), drawn.std(0)
    axis = torch.linspace(-9, 9, 401) if flow.invertible else torch.linspace(-6, 6, 61)
    y = mean + spread * torch.cartesian_prod(axis, axis)
    q = dist.TransformedDistribution(base, flow(context))
    if flow.invertible:
        log_q = q.log_prob(y)
    else:
        x = preimages(flow, context, y)
        for transform in q.transforms:
            x = transform(x)
        log_q = q.log_prob(x)
    cell = spread.prod() * (axis[1] - axis[0]) ** 2
    assert (log_q.exp().sum() * cell).item() == pytest.approx(1, abs=2e-3)


@flows
def test_a_value_that_was_not_drawn_is_scored_alike_or_refused(name: str) -> None:
    flow = moved(name, 4)
    context = torch.randn(6, CONTEXT)
    x = torch.randn(6, 4)
    y, log_det = push(flow(context), x)
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(6, 4), 1.0).to_event(1), flow(context))
    if flow.invertible:
        torch.testing.assert_close(q.log_prob(y), q.base_dist.log_prob(x) - log_det)
        back = y
        for transform in reversed(flow(context)):
            back = transform.inv(back)
        torch.testing.assert_close(back, x)
    else:
        with pytest.raises(NotImplementedError, match=r"scores only the value that it drew last"):
            q.log_prob(y)


@flows
def test_particles_are_moved_as_one_by_one(name: str) -> None:
    """On the value's left, on the context's, or on both; one context for all, too."""
    flow = moved(name, 3)
    x, context = torch.randn(4, 5, 3), torch.randn(4, 5, CONTEXT)
    for given, value in ((context[0], x), (context, x[0]), (context, x), (context[0, 0], x)):
        y, log_det = push(flow(given), value)
        for k in range(4):
            own = given[k] if given.dim() == 3 else given
            expected, own_det = push(flow(own), value[k] if value.dim() == 3 else value)
            torch.testing.assert_close(y[k], expected)
            torch.testing.assert_close(log_det.expand(4, 5)[k], own_det.expand(5))
        if flow.invertible:
            inverse = [t.inv for t in reversed(flow(given))]
            torch.testing.assert_close(push(inverse, y)[0], value.expand_as(y))


@flows
@pytest.mark.parametrize("context", [0, CONTEXT])
def test_starts_near_the_identity(name: str, context: int) -> None:
    given = torch.randn(200, context) if context else None
    x = torch.randn(200, 4)
    y, log_det = push(FLOWS[name](4, context)(given), x)
    assert (y - x).abs().max() < 0.25
    assert log_det.abs().max() < 0.25


@flows
@pytest.mark.parametrize("context", [0, CONTEXT])
def test_every_parameter_gets_a_gradient_where_it_starts(name: str, context: int) -> None:
    flow = FLOWS[name](4, context)
    y, log_det = push(flow(torch.randn(8, context) if context else None), torch.randn(8, 4))
    (log_det.sum() + y.cos().sum()).backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-6, f"{parameter_name}: more than rounding"


@flows
def test_a_copy_made_after_use_and_loaded_weights_move_alike(name: str) -> None:
    flow = moved(name, 3)
    context, x = torch.randn(5, CONTEXT), torch.randn(5, 3)
    expected = push(flow(context), x)
    other = moved(name, 3)
    assert not torch.equal(push(other(context), x)[0], expected[0])
    other.load_state_dict(flow.state_dict())
    for same in (copy.deepcopy(flow), other):
        for value, own in zip(expected, push(same(context), x), strict=True):
            assert torch.equal(value, own)


@flows
def test_a_step_that_has_seen_another_value_since_says_the_same(name: str) -> None:
    x = torch.randn(5, 3)
    for step in moved(name, 3)(torch.randn(5, CONTEXT)):
        y = step(x)
        log_det = step.log_abs_det_jacobian(x, y)
        step(torch.randn(5, 3))
        torch.testing.assert_close(step.log_abs_det_jacobian(x, y), log_det)
        x = y


@flows
def test_follows_the_dtype_whatever_the_default_is(name: str) -> None:
    flow = moved(name, 3)
    torch.set_default_dtype(torch.float32)  # the fixture puts it back
    for dtype in (torch.float64, torch.float32):
        x, context = torch.randn(5, 3, dtype=dtype), torch.randn(5, CONTEXT, dtype=dtype)
        flow = flow.to(dtype)
        steps = flow(context)
        if flow.invertible:
            steps = [*steps, *(t.inv for t in reversed(flow(context)))]
        for tensor in push(steps, x):
            assert tensor.dtype == dtype
            assert tensor.isfinite().all()


@flows
def test_autocast_leaves_log_determinants_in_full_precision(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    flow = moved(name, 4)
    x = torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        steps = flow(torch.randn(CONTEXT))
    for step in steps:  # one by one: triangular ones have their determinant whatever nets round
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = step(x)
            log_det = step.log_abs_det_jacobian(x, y)
        assert y.dtype == log_det.dtype == torch.float32
        rows = [torch.autograd.grad(e, x, retain_graph=True)[0] for e in y]
        expected = torch.linalg.slogdet(torch.stack(rows)).logabsdet
        torch.testing.assert_close(log_det, expected, atol=1e-5, rtol=0)
        x = y


@flows
def test_one_coordinate_is_enough_but_for_a_coupling(name: str) -> None:
    if "coupling" in name:
        with pytest.raises(ValueError, match=r"Coupling\(size=1\).*take InverseAutoregressive"):
            FLOWS[name](1, CONTEXT)
        return
    x = torch.linspace(-2, 2, 9).unsqueeze(-1).requires_grad_()
    y, log_det = push(moved(name, 1)(torch.randn(CONTEXT)), x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_det.expand(9), slope.abs().log().squeeze(-1))


# -- behind a normal -----------------------------------------------------------------------------


@flows
def test_flow_normal_scores_its_draws_by_the_base_and_the_jacobian(name: str) -> None:
    """With particles, and a context of several tensors."""
    q = FlowNormal(MLP(CONTEXT, 4, 6), moved(name, 3))
    context = torch.randn(5, 2), torch.randn(5, 1)
    d = q(*context).expand([7, 5])
    z = d.rsample()
    assert z.shape == (7, 5, 3)
    joined = torch.cat(context, -1)
    x = z
    for transform in reversed(d.transforms):
        x = transform.inv(x)  # a look-up
    loc, raw = q.base.net(joined).chunk(2, -1)
    base = dist.Normal(loc, nn.functional.softplus(raw)).to_event(1)
    expected = base.log_prob(x) - push(q.flow(joined), x)[1]
    torch.testing.assert_close(d.log_prob(z), expected)


def test_flow_normal_takes_a_flow_without_context_and_stands_in_a_guide() -> None:
    q = FlowNormal(MLP(CONTEXT, 6), InverseAutoregressive(3))
    guide = Factorized(z=(q, ["x"]))
    values = guide(x=torch.randn(4, CONTEXT))
    assert values["z"].shape == (4, 3)


def test_flow_normal_refuses_a_net_of_another_size() -> None:
    q = FlowNormal(MLP(CONTEXT, 8), InverseAutoregressive(3, CONTEXT))
    with pytest.raises(ValueError, match=r"the net has 8 outputs; expected 6"):
        q(torch.randn(4, CONTEXT))


@pytest.mark.parametrize("flow", [InverseAutoregressive, Coupling])
def test_maf_is_iaf_the_other_way_round_and_orders_alternate(flow: type[Flow]) -> None:
    """One step depends on one half, or triangle, of the coordinates; two on all of them."""
    size = 4
    for layers in (1, 2):
        made = flow(size, layers=layers)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += torch.randn_like(parameter)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, made=made: push(made(), x)[0], torch.randn(size)
        )
        above = jacobian.triu(1).count_nonzero()
        assert (above == 0) == (layers == 1)
    iaf, maf = InverseAutoregressive(size), MaskedAutoregressive(size)
    maf.load_state_dict(iaf.state_dict())
    x = torch.randn(5, size)
    y, log_det = push(iaf(), x)
    back, other = push(maf()[::-1], y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(other, -log_det)


# -- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("elementwise", [Affine(), RationalQuadratic(5, 2.0)])
def test_elementwise_maps_increase_with_the_slope_they_say(
    elementwise: Affine | RationalQuadratic,
) -> None:
    raw = 3 * torch.randn(elementwise.parameters, 2)
    x = torch.linspace(-4, 4.1, 1001).unsqueeze(-1).expand(-1, 2).clone().requires_grad_()
    y, log_slope = elementwise(x, raw)
    assert (y.diff(dim=0) > 0).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope.exp(), slope)
    back, other = elementwise.inverse(y, raw)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(other, log_slope)
    same, zero = elementwise(x, torch.zeros_like(raw))
    torch.testing.assert_close(same, x)
    assert zero.abs().max() < 1e-12


def test_a_spline_passes_through_its_knots_and_is_the_identity_outside() -> None:
    spline = RationalQuadratic(bins=3, bound=2.0)
    widths, heights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 2.0])
    slopes = torch.tensor([0.5, 4.0])
    raw = torch.cat([widths.log(), heights.log(), slopes.expm1().log() - math.log(math.e - 1)])
    # Every bin has a thousandth of the whole for itself; a slope has a thousandth, too.
    x, y = (
        4 * (0.001 * torch.tensor([1, 2]) + 0.997 * share.cumsum(0)[:2] / 6) - 2
        for share in (widths, heights)
    )
    edges = torch.tensor([-9.0, -2.0, 2.0, 7.0])
    value, log_slope = spline(torch.cat([x, edges]).unsqueeze(-1), raw.unsqueeze(-1))
    torch.testing.assert_close(value.squeeze(-1), torch.cat([y, edges]))
    expected = torch.cat([0.001 + 0.999 * slopes, torch.ones(4)])
    torch.testing.assert_close(log_slope.exp().squeeze(-1), expected)


@pytest.mark.parametrize("size", [10, 30])
def test_a_spline_stays_finite_in_float32(size: float) -> None:
    """At numbers where rounding takes an inverse's root to 0, or its share out of the bin."""
    spline = RationalQuadratic(bins=8)
    torch.manual_seed(1)
    raw = size * torch.randn(50_000, spline.parameters, 3, dtype=torch.float32)
    x = 3 * torch.randn(50_000, 3, dtype=torch.float32)
    raw.requires_grad_()
    for value, log_slope in (spline(x, raw), spline.inverse(x, raw)):
        (gradient,) = torch.autograd.grad(value.sum() + log_slope.sum(), raw)
        for tensor in (value, log_slope, gradient):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("context", [0, CONTEXT])
def test_raw_numbers_begin_near_their_start_and_apart(context: int) -> None:
    start = torch.tensor([[1.0, -2.0], [1.0, -2.0]])
    raw = RawNumbers(context, (), start)(torch.randn(7, context) if context else None)
    assert raw.shape == ((7, 2, 2) if context else (2, 2))
    assert 1e-4 < (raw - start).abs().max() < 0.1
    assert (raw[..., 0, :] - raw[..., 1, :]).abs().min() > 1e-6


def test_gram_schmidt_is_orthonormal_where_vectors_nearly_coincide() -> None:
    vectors = torch.randn(3, 1, 6) + 1e-6 * torch.randn(3, 4, 6)
    basis = orthonormal(vectors)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4).expand(3, 4, 4))
    torch.testing.assert_close(
        basis[:, 0], vectors[:, 0] / vectors[:, 0].norm(dim=-1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Planar(0), r"Planar\(size=0, context=0, layers=8\): expected at least 1"),
        (lambda: Householder(2, layers=0), r"layers=0\): expected at least 1 coordinate"),
        (lambda: Radial(2, -1), r"context=-1.*no negative width"),
        (lambda: InverseAutoregressive(4, hidden=[3]), r"hidden widths \(3,\).*none narrower"),
        (lambda: InverseAutoregressive(4, hidden=[]), r"hidden widths \(\).*at least one hidden"),
        (lambda: Sylvester(4, kind="diagonal"), r"kind='diagonal'\): expected one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Sylvester(4, vectors=5), r"vectors=5\): expected 1 to 4 orthonormal"),
        (lambda: Sylvester(4, vectors=0), r"vectors=0\): expected 1 to 4 orthonormal"),
        (lambda: Sylvester(4, kind="triangular", vectors=2), r"or none for 'triangular'"),
        (lambda: RationalQuadratic(bins=1), r"bins=1, bound=5.0\): expected 2 to 500"),
        (lambda: Affine(0.0), r"Affine\(bound=0.0\): expected a positive"),
        (lambda: Planar(2)(torch.ones(3)), r"width 0 \(0: none\), and was given one of 3"),
        (lambda: Planar(2, 3)(), r"width 3 \(0: none\), and was given one of 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
