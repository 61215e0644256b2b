"""The conditional VAE: the plain one where c is ignored, and a closed form where all is linear."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import Factorized, Prior, evaluate
from ppl_vae.conditionals import Conditional, Normal
from ppl_vae.data import Dataset
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models import VAE, BaselineNet, ConditionalVAE
from ppl_vae.models.conditional import OnGuess
from ppl_vae.nn import MLP
from ppl_vae.objectives import IWAE, plain_elbo
from ppl_vae.priors import StandardNormal

ROWS, Z, C, D = 12, 2, 2, 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class First(nn.Module):
    """The net of the first few inputs alone."""

    def __init__(self, net: nn.Module, inputs: int) -> None:
        super().__init__()
        self.net, self.first = net, inputs

    def forward(self, joined: Tensor) -> Tensor:
        return self.net(joined[..., : self.first])


# -- where c is ignored ------------------------------------------------------------------------


def test_without_c_it_is_the_plain_vae() -> None:
    decoder, encoder = MLP(Z, 5, D), MLP(D, 5, 2 * Z)
    plain = VAE(StandardNormal(Z), Bernoulli(decoder))
    model = ConditionalVAE(StandardNormal(Z), Bernoulli(First(decoder, Z)))
    guide = Factorized(z=(Normal(encoder), ["x"]))
    c = torch.randn(ROWS, C)
    x = plain.simulate(ROWS)["x"]
    for objective in (plain_elbo(plain, guide, x=x), IWAE(3)):
        losses = []
        for one, given in ((plain, {}), (model, {"c": c})):
            torch.manual_seed(1)
            with own_parameters(one, guide):
                losses.append(float(objective.loss(one, guide, x=x, total=100, **given)))
        assert losses[0] == losses[1]  # to the bit
    rows = Dataset("rows", {"train": {"x": x, "c": c}})
    figures = [evaluate(m, guide, rows, split="train", samples=7) for m in (plain, model)]
    assert figures[0] == figures[1]


def test_a_prior_may_have_no_context() -> None:
    c = torch.randn(ROWS, C)
    with_c = ConditionalVAE(Normal(MLP(C, 2 * Z)), Bernoulli(MLP(Z + C, D)))
    without = ConditionalVAE(StandardNormal(Z), Bernoulli(MLP(Z + C, D)))
    assert with_c.z_dist(c).batch_shape == (ROWS,)
    assert without.z_dist(c).batch_shape == ()
    assert without.simulate(ROWS, c=c)["z"].shape == (ROWS, Z)


# -- where all is linear -----------------------------------------------------------------------


class Posterior(Conditional):
    """A normal around a linear map of (x, c), of a given covariance."""

    def __init__(self, net: nn.Module, covariance: Tensor) -> None:
        super().__init__(net)
        self.covariance = covariance

    def distribution(self, parameters: Tensor) -> Any:
        return dist.MultivariateNormal(parameters, self.covariance)


class Linear:
    """z ~ N(A c + a, diag s^2), x ~ N(W z + B c + b, v^2): p(x | c) and p(z | x, c) are normals."""

    def __init__(self) -> None:
        self.prior, self.decoder = MLP(C, 2 * Z), MLP(Z + C, D)
        with torch.no_grad():
            self.prior[0].weight[Z:] = 0  # scales that do not depend on c
            self.decoder[0].weight[:, :Z] *= 3  # a latent that says much of x
        self.v = 0.5
        self.model = ConditionalVAE(Normal(self.prior), Gaussian(self.decoder, self.v))
        self.c = 2 * torch.randn(ROWS, C)
        self.x = self.model.simulate(ROWS, c=self.c)["x"]
        self.data = Dataset("rows", {"train": {"x": self.x, "c": self.c}})
        with torch.no_grad():
            self.w, self.b = self.decoder[0].weight.split([Z, C], 1)
            prior: Any = self.model.z_dist(self.c).base_dist
            self.loc, self.s = prior.loc, prior.scale[0]

    def log_evidence(self) -> Tensor:
        """log p(x | c) of each row."""
        covariance = self.w @ (self.s**2).diag() @ self.w.T + self.v**2 * torch.eye(D)
        mean = self.loc @ self.w.T + self.c @ self.b.T + self.decoder[0].bias
        return dist.MultivariateNormal(mean, covariance).log_prob(self.x)

    def posterior(self, widened: float) -> Posterior:
        """p(z | x, c), with its covariance widened: exactly it, by 1."""
        precision = (self.s**-2).diag() + self.w.T @ self.w / self.v**2
        covariance = precision.inverse()
        # The mean is linear in (x, c): found on a basis, as a map with an offset.
        a, a0 = self.prior[0].weight[:Z], self.prior[0].bias[:Z]
        to_z = covariance @ self.w.T / self.v**2
        of_prior = covariance @ (self.s**-2).diag()
        net = MLP(D + C, Z)
        net[0].weight.data = torch.cat([to_z, of_prior @ a - to_z @ self.b], 1).detach()
        net[0].bias.data = (of_prior @ a0 - to_z @ self.decoder[0].bias).detach()
        return Posterior(net, widened * covariance)


def test_the_exact_posterior_gives_the_exact_conditional_likelihood() -> None:
    """All its weights are p(x | c), whatever was drawn."""
    case = Linear()
    guide = Factorized(z=(case.posterior(1.0), ["x", "c"]))
    found = evaluate(case.model, guide, case.data, split="train", samples=3)
    exact = case.log_evidence().mean().item()
    assert found.nll == pytest.approx(-exact, abs=1e-10)
    assert found.elbo == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("proposal", ["prior", "guide"])
def test_both_proposals_estimate_the_conditional_likelihood(proposal: str) -> None:
    """A z-test: by independent repetitions, whose bias is far below their standard error."""
    case = Linear()
    wide = Factorized(z=(case.posterior(1.5), ["x", "c"]))
    guide = Prior(case.model) if proposal == "prior" else wide
    found = torch.tensor(
        [
            -evaluate(case.model, guide, case.data, split="train", samples=4000, seed=s).nll
            for s in range(20)
        ]
    )
    exact = case.log_evidence().mean().item()
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - exact) < 4 * error
    assert error < 5e-3
    # Without weights, the guide's draws score another thing: far too well.
    unweighted = evaluate(case.model, wide, case.data, split="train", samples=4000).reconstruction
    assert unweighted > exact + 0.3


# -- on the guess of a net ---------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_guess_starts_from_the_baseline(frozen: bool) -> None:
    guess, net = MLP(C, 5, D), MLP(Z + C, 5, D)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.zero_()
    model = ConditionalVAE(StandardNormal(Z), Bernoulli(OnGuess(guess, net, frozen=frozen)))
    baseline = BaselineNet(Bernoulli(guess))
    c = torch.randn(ROWS, C)
    x = baseline.simulate(ROWS, c=c)["x"]
    exact = baseline.x_dist(c).log_prob(x)
    torch.testing.assert_close(model.x_dist(torch.randn(4, ROWS, Z), c).log_prob(x)[2], exact)
    rows = Dataset("rows", {"train": {"x": x, "c": c}})
    found = evaluate(model, Prior(model), rows, split="train", samples=3)
    assert found.nll == pytest.approx(-exact.mean().item())
    assert any(p.requires_grad for p in guess.parameters()) is not frozen


def test_on_a_guess_refuses_nets_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"the guess maps 2 numbers to 3, the net 2 to 3"):
        OnGuess(MLP(C, D), MLP(C, D))
    with pytest.raises(ValueError, match=r"the guess maps 2 numbers to 4, the net 4 to 3"):
        OnGuess(MLP(C, D + 1), MLP(Z + C, D))
    with pytest.raises(ValueError, match=r"guess is Linear, which does not state its .inputs"):
        OnGuess(nn.Linear(C, D), MLP(Z + C, D))
