"""Distributions of our own, against torch's, and where torch's lose their digits."""

from __future__ import annotations

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from ppl_vae.conditionals import constrained
from ppl_vae.distributions import (
    CategoricalLevels,
    CholeskyNormal,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
)


@pytest.fixture
def factor() -> Tensor:
    torch.manual_seed(0)
    lower = torch.randn(4, 3, 3, dtype=torch.float64).tril(-1)
    return lower + torch.diag_embed(torch.rand(4, 3, dtype=torch.float64) + 0.1)


def test_cholesky_normal_is_the_multivariate_normal(factor: Tensor) -> None:
    loc = torch.randn(4, 3, dtype=torch.float64)
    ours = CholeskyNormal(loc, scale_tril=factor)
    theirs = dist.MultivariateNormal(loc, scale_tril=factor)
    torch.manual_seed(1)
    draw = ours.rsample(torch.Size([5]))
    torch.manual_seed(1)
    torch.testing.assert_close(draw, theirs.rsample(torch.Size([5])))
    for value in (draw, draw.clone(), torch.randn(4, 3, dtype=torch.float64)):
        torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.mean, loc)
    torch.testing.assert_close(ours.covariance_matrix, factor @ factor.mT)


def test_cholesky_normal_expands(factor: Tensor) -> None:
    loc = torch.zeros(4, 3, dtype=torch.float64)
    wide = CholeskyNormal(loc, scale_tril=factor).expand(torch.Size([6, 4]))
    assert isinstance(wide, CholeskyNormal)
    draw = wide.rsample()
    assert draw.shape == (6, 4, 3)
    torch.testing.assert_close(wide.log_prob(draw), wide.log_prob(draw.clone()))


def test_gradients_of_a_draws_density_are_those_of_the_noise(factor: Tensor) -> None:
    """log q(L e) = log N(e) - log |L|: its gradient is -1/L_ii on the diagonal, 0 elsewhere."""
    factor = factor.requires_grad_()
    q = CholeskyNormal(torch.zeros(4, 3, dtype=torch.float64), scale_tril=factor)
    q.log_prob(q.rsample()).sum().backward()
    assert factor.grad is not None
    diagonal = factor.detach().diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(factor.grad, torch.diag_embed(-1 / diagonal))


def test_a_nearly_singular_factor_scores_its_draws_right() -> None:
    factor = torch.ones(10, 10).tril(-1) * 5 + 1e-7 * torch.eye(10)
    q = CholeskyNormal(torch.zeros(10), scale_tril=factor)
    torch.manual_seed(0)
    draw = q.rsample()
    noise = q.noise(draw)
    exact = dist.Normal(0.0, 1.0).log_prob(noise).sum() - 10 * torch.tensor(1e-7).log()
    torch.testing.assert_close(q.log_prob(draw), exact)
    solved = dist.MultivariateNormal(torch.zeros(10), scale_tril=factor).log_prob(draw)
    assert not torch.isclose(solved, exact, rtol=0.1), "the solve has no digit left"


@pytest.mark.parametrize(
    "support",
    [
        torch.distributions.constraints.unit_interval,
        torch.distributions.constraints.simplex,
        torch.distributions.constraints.positive,
    ],
)
def test_a_saturated_draw_is_scored_by_its_own_coordinates(support: object) -> None:
    """At the edge of a support the value has lost the coordinates that it came from."""
    event = torch.Size([3])
    u = torch.distributions.biject_to(support).inverse_shape(event)[0]  # pyright: ignore
    base = dist.Normal(torch.full((u,), 60.0), 1e-3).to_event(1)
    q = constrained(base, support, event)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    log_q = q.log_prob(q.rsample())
    torch.manual_seed(0)
    drawn = base.rsample()
    transform = torch.distributions.biject_to(support)  # pyright: ignore[reportArgumentType]
    jacobian = transform.log_abs_det_jacobian(drawn, transform(drawn)).sum()
    torch.testing.assert_close(log_q, base.log_prob(drawn) - jacobian)


def test_autocast_does_not_part_a_draw_from_its_density(factor: Tensor) -> None:
    q = CholeskyNormal(torch.zeros(4, 3), scale_tril=factor.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draw = q.rsample()
    exact = dist.MultivariateNormal(torch.zeros(4, 3), scale_tril=factor.float())
    torch.testing.assert_close(q.log_prob(draw), exact.log_prob(draw), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loc", [-0.9, 0.0, 0.3])
@pytest.mark.parametrize("scale", [0.001, 0.01, 0.5, 300.0])
def test_a_levels_probability_keeps_its_digits_in_both_tails(
    dtype: torch.dtype, loc: float, scale: float
) -> None:
    """scipy's differences keep theirs left of the location; the right is the left, mirrored."""
    loc = torch.tensor(loc, dtype=dtype).item()
    inner = np.arange(1, 255)
    edges = 2 * (inner[None] + np.array([[-0.5], [0.5]])) / 255 - 1
    with np.errstate(divide="ignore"):
        low, high = scipy.stats.logistic.logcdf(edges, loc, scale)
        mirrored = scipy.stats.logistic.logcdf(-edges[::-1], -loc, scale)
        exact = np.where(
            2 * inner / 255 - 1 < loc,
            high + np.log1p(-np.exp(low - high)),
            mirrored[1] + np.log1p(-np.exp(mirrored[0] - mirrored[1])),
        )
    ours = DiscretizedLogistic(
        torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype), levels=256
    ).log_prob(torch.from_numpy(inner).to(dtype))
    assert exact.min() < -90 or scale > 0.01
    rtol = {torch.float32: 1e-4, torch.float64: 1e-8}[dtype]
    torch.testing.assert_close(ours.double(), torch.from_numpy(exact), rtol=rtol, atol=1e-6)


def levels(batch: tuple[int, ...]) -> list[dist.TorchDistribution]:
    parts = torch.randn(2, *batch, 4), torch.rand(*batch, 4) + 0.01, torch.randn(*batch, 4)
    (loc, logits), scale, _ = parts
    return [
        DiscretizedLogistic(loc[..., 0], scale[..., 0], 16),
        DiscretizedLogisticMixture(
            dist.Categorical(logits=logits), DiscretizedLogistic(loc, scale, 16)
        ),
        CategoricalLevels(logits=logits),
    ]


@pytest.mark.parametrize("index", range(3))
def test_distributions_of_levels_expand_and_copy(index: int) -> None:
    torch.manual_seed(0)
    family = levels((3, 1))[index]
    wide = copy.deepcopy(family.expand(torch.Size([5, 3, 2])))
    assert type(wide) is type(family)
    draw = wide.sample(torch.Size([7]))
    assert (draw.shape, draw.dtype, draw.requires_grad) == ((7, 5, 3, 2), torch.float32, False)
    assert wide.support.is_discrete  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(wide.log_prob(draw), family.log_prob(draw))
    torch.testing.assert_close(wide.mean, family.mean.expand(5, 3, 2))
    assert not wide.has_rsample
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(draw + 0.5)


def test_levels_mode_is_the_most_probable_one() -> None:
    family = CategoricalLevels(logits=torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]))
    torch.testing.assert_close(family.mode, torch.tensor([1.0, 0.0]))
