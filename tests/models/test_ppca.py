"""PPCA: the linear-Gaussian model as oracle, in float64."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae.evaluation import evaluate
from ppl_vae.guide import Factorized
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.model import own_parameters
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

Z, D, N = 3, 5, 7


@pytest.fixture
def model() -> PPCA:
    torch.manual_seed(0)
    return PPCA(Z, D, scale=0.7).double()


@pytest.fixture
def x(model: PPCA) -> Tensor:
    return model.simulate(N)["x"]


class Exact(nn.Module):
    """p(z | x) as a conditional; the model is kept without registering it a second time."""

    def __init__(self, model: PPCA) -> None:
        super().__init__()
        self.model = (model,)

    def forward(self, x: Tensor) -> dist.MultivariateNormal:
        return self.model[0].posterior(x)


def test_evidence_and_posterior_agree_with_bayes_rule(model: PPCA, x: Tensor) -> None:
    z = torch.randn(N, Z, dtype=x.dtype)
    joint = model.z_dist().log_prob(z) + model.x_dist(z).log_prob(x)
    torch.testing.assert_close(joint - model.posterior(x).log_prob(z), model.evidence(x))


def test_evidence_is_the_marginal_of_simulated_rows(model: PPCA) -> None:
    x = model.simulate(200_000)["x"]
    weight = model.likelihood.net.weight
    expected = weight @ weight.T + 0.49 * torch.eye(D, dtype=x.dtype)
    torch.testing.assert_close(x.T.cov(), expected.detach(), atol=0.03, rtol=0)


def test_elbo_of_the_exact_posterior_is_the_evidence_for_each_draw(model: PPCA, x: Tensor) -> None:
    guide = Factorized(z=(Exact(model), ["x"]))
    expected = -model.evidence(x).sum().item()
    for seed in range(5):
        torch.manual_seed(seed)
        with own_parameters(model, guide):
            assert Trace_ELBO().loss(model, guide, x) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("samples", [1, 3, 50])
def test_nll_with_the_exact_posterior_is_the_evidence(model: PPCA, x: Tensor, samples: int) -> None:
    guide = Factorized(z=(Exact(model), ["x"]))
    result = evaluate(model, guide, {"train": x, "test": x}, samples=samples)
    evidence = model.evidence(x).mean().item()
    assert -result.nll == pytest.approx(evidence, rel=1e-12)
    assert result.elbo == pytest.approx(evidence, rel=1e-12)
    assert result.nll_se == pytest.approx(model.evidence(x).std().item() / math.sqrt(N), rel=1e-9)


def test_gap_of_a_mean_field_guide_is_its_kl_to_the_posterior(model: PPCA, x: Tensor) -> None:
    """The ELBO's expectation is exact at 2 Z sigma points, since log densities are quadratic."""
    guide = MeanField(model, MLP(D, 8, 6).double(), x).double()
    q = guide.posterior(x).base_dist
    steps = math.sqrt(Z) * torch.cat([torch.eye(Z), -torch.eye(Z)]).to(x)
    z = q.loc + q.scale * steps.unsqueeze(1)  # (2 Z, N, Z)
    particles = pyro.plate("particles", 2 * Z, dim=-2)
    with own_parameters(model, guide):
        log_p, log_q = (
            poutine.trace(poutine.condition(particles(program), {"z": z})).get_trace(x)
            for program in (model, guide)
        )
    elbo = (
        log_p.nodes["z"]["fn"].log_prob(z)
        + log_p.nodes["x"]["fn"].log_prob(x)
        - log_q.nodes["z"]["fn"].log_prob(z)
    ).mean(0)
    as_full = MultivariateNormal(q.loc, torch.diag_embed(q.scale**2))
    kl = kl_divergence(
        as_full, MultivariateNormal(model.posterior(x).loc, model.posterior(x).covariance_matrix)
    )
    torch.testing.assert_close(model.evidence(x) - elbo, kl)


def test_a_full_rank_guide_can_be_the_exact_posterior(model: PPCA, x: Tensor) -> None:
    """Its location is linear in x and its factor constant: weights set by hand reach it."""
    guide = FullRank(model, nn.Identity(), x).double()
    exact = model.posterior(torch.cat([torch.zeros(1, D), torch.eye(D)]).to(x))
    factor = exact.scale_tril[0]
    diagonal = factor.diagonal() - torch.finfo(torch.float64).eps
    rows, columns = torch.tril_indices(Z, Z, offset=-1)
    with torch.no_grad():
        guide.head.weight.zero_()
        guide.head.weight[:Z] = (exact.loc[1:] - exact.loc[0]).T
        guide.head.bias.copy_(
            torch.cat([exact.loc[0], diagonal.expm1().log(), factor[rows, columns]])
        )
    torch.manual_seed(1)
    with own_parameters(model, guide):
        loss = Trace_ELBO().loss(model, guide, x)
    assert loss == pytest.approx(-model.evidence(x).sum().item(), rel=1e-10)


@pytest.mark.parametrize("arguments", [(0, 5), (2, 0), (2, 5, 0.0), (2, 5, float("nan"))])
def test_impossible_sizes_and_scales_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected sizes of at least 1 and a positive scale"):
        PPCA(*arguments)  # pyright: ignore[reportArgumentType]
