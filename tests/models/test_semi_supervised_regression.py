"""Targets that are given in part: where all is linear, every likelihood has a closed form."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import ppl_vae
from ppl_vae.conditionals import Conditional, Normal
from ppl_vae.data import Dataset
from ppl_vae.guide import Factorized, Prior
from ppl_vae.likelihoods import Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models import SemiSupervisedRegression
from ppl_vae.nn import MLP
from ppl_vae.objectives import SemiSupervised
from ppl_vae.priors import StandardNormal

ROWS, LABELED, K, Z, D = 10, 3, 1, 2, 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Affine(Conditional):
    """A normal around an affine map of the context, of a given covariance."""

    def __init__(self, weight: Tensor, bias: Tensor, covariance: Tensor) -> None:
        net = nn.Linear(*weight.T.shape)
        net.weight.data, net.bias.data = weight.detach(), bias.detach()
        super().__init__(net)
        self.covariance = covariance.detach()

    def distribution(self, parameters: Tensor) -> Any:
        return dist.MultivariateNormal(parameters, self.covariance)


class Linear:
    """x ~ N(W_t t + W_z z + b, v^2), t and z standard normal; the exact posterior as a guide."""

    def __init__(self) -> None:
        decoder = MLP(K + Z, D)
        self.v = 0.4
        self.model = SemiSupervisedRegression(
            StandardNormal(K), StandardNormal(Z), Gaussian(decoder, self.v)
        )
        drawn = self.model.simulate(ROWS)
        self.x, self.t = drawn["x"], drawn["t"]
        (self.w_t, self.w_z), self.b = decoder[0].weight.detach().split([K, Z], 1), decoder[0].bias
        noise = self.v**2 * torch.eye(D)
        self.given_t = self.w_z @ self.w_z.T + noise  # covariance of x given t
        self.marginal = self.w_t @ self.w_t.T + self.given_t
        gain_t = self.w_t.T @ self.marginal.inverse()
        gain_z = self.w_z.T @ self.given_t.inverse()
        self.q_t = Affine(gain_t, -gain_t @ self.b, torch.eye(K) - gain_t @ self.w_t)
        q_z = Affine(
            torch.cat([gain_z, -gain_z @ self.w_t], 1),
            -gain_z @ self.b,
            torch.eye(Z) - gain_z @ self.w_z,
        )
        self.guide = Factorized(t=(self.q_t, ["x"]), z=(q_z, ["x", "t"]))
        self.data = Dataset("rows", {"train": {"x": self.x, "t": self.t}})

    def log_x(self) -> Tensor:
        return dist.MultivariateNormal(self.b.detach(), self.marginal).log_prob(self.x)

    def log_x_and_t(self) -> Tensor:
        mean = self.t @ self.w_t.T + self.b.detach()
        log_x = dist.MultivariateNormal(mean, self.given_t).log_prob(self.x)
        return log_x + dist.Normal(0.0, 1.0).log_prob(self.t).sum(1)


def test_one_program_has_the_likelihood_with_and_without_the_target() -> None:
    """All weights under the exact posterior are the likelihood, whatever was drawn."""
    case = Linear()
    how: dict[str, Any] = {"split": "train", "samples": 3}
    found = ppl_vae.evaluate(case.model, case.guide, case.data, **how)
    assert found.nll == pytest.approx(-case.log_x_and_t().mean().item(), abs=1e-10)
    found = ppl_vae.evaluate(case.model, case.guide, case.data, withheld=["t"], **how)
    assert found.nll == pytest.approx(-case.log_x().mean().item(), abs=1e-10)
    assert set(found.kl_per_site) == {"t", "z"}


def test_draws_of_the_prior_come_to_the_same_likelihood() -> None:
    case = Linear()
    found = torch.tensor(
        [
            ppl_vae.evaluate(
                case.model,
                Prior(case.model),
                case.data,
                withheld=["t"],
                split="train",
                samples=4000,
                seed=seed,
            ).nll
            for seed in range(12)
        ]
    )
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() + case.log_x().mean()) < 4 * error
    assert error < 0.02


def test_rows_of_both_kinds_stand_for_their_kind() -> None:
    """A step's loss, whose estimator is exact under the exact posterior."""
    case, total, labeled, alpha = Linear(), 1000, 30, 0.5
    objective = SemiSupervised(alpha, label="t", objective=Trace_ELBO())
    with own_parameters(case.model, case.guide):
        loss = objective.loss(
            case.model, case.guide, x=case.x, t=case.t[:LABELED], total=total, labeled=labeled
        )
    regression = case.q_t(case.x[:LABELED]).log_prob(case.t[:LABELED])
    expected = (
        labeled * case.log_x_and_t()[:LABELED].mean()
        + (total - labeled) * case.log_x()[LABELED:].mean()
        + alpha * total * regression.mean()
    )
    assert float(loss) == pytest.approx(-expected.item(), rel=1e-10)


def test_a_few_targets_name_the_latent() -> None:
    """x says how large t is, but not which way it points; fifteen targets of 300 say that too."""
    n, labeled, noise = 300, 15, 0.3
    t = torch.randn(n, K)
    w = torch.tensor([[2.0, -1.0, 1.0]])
    x = t @ w + noise * torch.randn(n, 3)
    model = SemiSupervisedRegression(
        StandardNormal(K), StandardNormal(1), Gaussian(MLP(K + 1, 3), noise)
    )
    q_t, q_z = Normal(MLP(3, 2 * K)), Normal(MLP(3 + K, 2))
    guide = Factorized(t=(q_t, ["x"]), z=(q_z, ["x", "t"]))
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = ppl_vae.SVI(model, guide, optimizer, SemiSupervised(0.5, label="t"), compile=False)
    for _ in range(200):
        svi.step(x=x, t=t[:labeled], total=n, labeled=labeled)
    with torch.no_grad():
        predicted = q_t(x[labeled:]).mean
    # The best there is, of the model that the data are from: its posterior's standard deviation.
    best = (1 + w.square().sum() / noise**2) ** -0.5
    error = (predicted - t[labeled:]).square().mean().sqrt()
    assert best < 0.15
    assert error < 1.5 * best
