from __future__ import annotations

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn
from torch.distributions import constraints
from torch.utils.flop_counter import FlopCounterMode

from ppl_vae.conditionals import (
    Normal,
    constrained,
    entrywise,
    is_real,
    join,
    positive,
    through,
    unconstrain,
)
from ppl_vae.nn import MLP, Branches, Gated, GatedMLP

pytestmark = pytest.mark.usefixtures("float64")


def vector(constraint, dims=1):
    return constraints.independent(constraint, dims)


# name: (support, event shape, number of unconstrained coordinates, real)
SUPPORTS = {
    "positive scalar": (constraints.positive, (), 1, False),
    "positive vector": (vector(constraints.positive), (3,), 3, False),
    "positive matrix": (vector(constraints.positive, 2), (2, 3), 6, False),
    "unit interval": (vector(constraints.unit_interval), (3,), 3, False),
    "interval": (vector(constraints.interval(-2.0, 5.0)), (2,), 2, False),
    "simplex": (constraints.simplex, (4,), 3, False),
    "two simplexes": (vector(constraints.simplex), (2, 4), 6, False),
    "real scalar": (constraints.real, (), 1, True),
    "real vector": (constraints.real_vector, (3,), 3, True),
    "real matrix": (vector(constraints.real, 2), (2, 3), 6, True),
}
ON = pytest.mark.parametrize("name", SUPPORTS)


def base(size, rows=5):
    return dist.Normal(torch.randn(rows, size), torch.rand(rows, size) + 0.5).to_event(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_a_first_layer_sees_rows_once_where_they_meet_particles(kind, bias):
    net = kind(7, 11, 9, 4)
    if not bias:
        (net[0].linear if kind is GatedMLP else net[0]).register_parameter("bias", None)
    rows, particles = torch.randn(6, 5), torch.randn(50, 6, 2)
    for context in ((rows, particles), (particles, rows)):
        expected = net(join(*context))
        torch.testing.assert_close(through(net, *context), expected)
        with FlopCounterMode(display=False) as together:
            net(join(*context))
        with FlopCounterMode(display=False) as apart:
            through(net, *context)
        width = 22 if kind is GatedMLP else 11
        saved = together.get_total_flops() - apart.get_total_flops()
        assert saved == 2 * 49 * 6 * 5 * width  # multiply and add, at all particles but one
    alike = rows, particles[0]
    assert torch.equal(through(net, *alike), net(join(*alike)))


def test_a_branch_of_rows_sees_them_once():
    rows, particles = torch.randn(6, 5), torch.randn(50, 6, 2)
    net = nn.Sequential(Branches(Gated(5, 4), MLP(2, 3)), GatedMLP(7, 8, 2)).double()
    expected = net(join(rows, particles))
    with FlopCounterMode(display=False) as together:
        net(join(rows, particles))
    with FlopCounterMode(display=False) as apart:
        torch.testing.assert_close(through(net, rows, particles), expected)
    saved = together.get_total_flops() - apart.get_total_flops()
    assert saved == 2 * 49 * 6 * 5 * 8
    # Branches that part what comes in elsewhere.
    net = Branches(Gated(3, 4), MLP(4, 3)).double()
    assert torch.equal(through(net, rows, particles), net(join(rows, particles)))


class Doubling(MLP):
    """A perceptron with a forward of its own."""

    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(),
        nn.LayerNorm(7),
        Doubling(7, 4, 3),
        nn.utils.parametrizations.weight_norm(MLP(7, 4, 3)[0]),
    ],
)
def test_other_nets_are_given_what_is_joined(net):
    net = net.double()
    context = torch.randn(6, 5), torch.randn(50, 6, 2)
    assert torch.equal(through(net, *context), net(join(*context)))


def test_context_of_several_dtypes_is_promoted():
    net = MLP(7, 4, 6).double()
    labels, z = torch.randint(0, 2, (6, 5)), torch.randn(50, 6, 2)
    expected = net(join(labels, z))
    assert torch.equal(through(net, labels, z), expected)
    assert Normal(net)(labels, z).mean.dtype == torch.float64


def test_join_broadcasts_particles_with_rows():
    particles, rows, chains = torch.randn(7, 1, 2), torch.randn(5, 3), torch.randn(4, 1, 5, 1)
    joined = join(particles, rows, chains)
    assert joined.shape == (4, 7, 5, 6)
    by_hand = torch.cat([particles[6, 0], rows[3], chains[2, 0, 3]])
    assert torch.equal(joined[2, 6, 3], by_hand)
    assert join(rows) is rows


def test_normal_is_scipys_at_the_nets_location_and_softplus_scale():
    q = Normal(nn.Linear(5, 6))
    x, y, z = torch.randn(4, 3), torch.randn(7, 1, 2), torch.randn(7, 4, 3)
    d = q(x, y)
    assert (d.batch_shape, d.event_shape) == ((7, 4), (3,))
    out = q.net(torch.cat([x.expand(7, 4, 3), y.expand(7, 4, 2)], -1)).detach().numpy()
    loc, scale = out[..., :3], torch.tensor(out[..., 3:]).exp().log1p().numpy()
    by_scipy = scipy.stats.norm.logpdf(z.numpy(), loc, scale).sum(-1)
    torch.testing.assert_close(d.log_prob(z).detach(), torch.from_numpy(by_scipy))
    d.log_prob(z).sum().backward()
    assert all(p.grad.abs().min() > 0 for p in q.parameters())


def test_normal_needs_an_even_number_of_outputs():
    with pytest.raises(ValueError, match="net of Normal has 3 outputs; expected an even number"):
        Normal(nn.Linear(2, 3))(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_are_never_zero(dtype):
    pre = torch.tensor([-1e30, -800.0, -104.0, -20.0, 0.0, 30.0], dtype=dtype)
    scale = positive(pre)
    assert scale.dtype == dtype
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert scale[:2].tolist() == [torch.finfo(dtype).eps] * 2
    assert scale[4].item() == pytest.approx(0.6931472, rel=torch.finfo(dtype).eps * 4 + 1e-7)
    assert scale[5].item() == pytest.approx(30.0, rel=torch.finfo(dtype).eps)
    normal = dist.Normal(torch.zeros((), dtype=dtype), scale)
    assert normal.log_prob(torch.zeros((), dtype=dtype)).isfinite().all()


@ON
def test_constrained_has_the_density_of_the_change_of_variables(name):
    support, shape, size, real = SUPPORTS[name]
    flat = base(size)
    moved = constrained(flat, support, torch.Size(shape))
    assert (moved.batch_shape, moved.event_shape) == ((5,), shape)
    values = moved.sample()
    assert support.check(values).all()
    u = unconstrain(values, support, torch.Size(shape))
    assert u.shape == (5, size)
    move = torch.distributions.biject_to(support)
    # A simplex stands in one dim more than it has coordinates: its last entry is dropped.
    free = torch.tensor(move.inverse_shape(shape))

    def chart(row):
        y = move(row.reshape(free.tolist()))
        return (y[..., :-1] if "simplex" in name else y).reshape(-1)

    for n in range(5):
        jacobian = torch.autograd.functional.jacobian(chart, u[n])
        log_prob = flat.log_prob(u)[n] - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(moved.log_prob(values)[n], log_prob)
    assert is_real(support) is real
    if real:
        torch.testing.assert_close(values.reshape(5, -1), u, rtol=0, atol=0)


@ON
def test_unconstrain_takes_back_what_constrained_did(name):
    support, shape, size, _ = SUPPORTS[name]
    u = torch.randn(4, 5, size)
    point = dist.Delta(u).to_event(1)  # all draws are u
    moved = constrained(point, support, torch.Size(shape))
    assert moved.event_shape == shape
    torch.testing.assert_close(unconstrain(moved.sample(), support, torch.Size(shape)), u)


def test_a_real_vector_is_left_as_it_is():
    flat = base(3)
    assert constrained(flat, constraints.real_vector, torch.Size([3])) is flat


def test_entrywise_takes_off_event_dims_only():
    assert entrywise(vector(vector(constraints.positive), 2)) is constraints.positive
    assert entrywise(constraints.real_vector) is constraints.real
    assert entrywise(constraints.simplex) is constraints.simplex
    assert not is_real(constraints.unit_interval)
