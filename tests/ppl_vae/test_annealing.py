"""Annealed importance sampling against models whose evidence is known."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import annealing, graphs, hmc
from ppl_vae.annealing import Annealed, annealed_log_evidence, bidirectional, schedule
from ppl_vae.density import Density, NotAnnealable
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.sites import evaluating


class By(nn.Module):
    """A conditional written as a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *context: Any) -> Any:
        return self.function(*context)


@pytest.fixture
def linear(float64):
    model = PPCA(2, 5, scale=0.6)
    guide = Factorized(z=(By(model.posterior), ["x"]))
    return model, guide, model.simulate(24)


def z_score(found: Annealed, truth: Tensor) -> float:
    """How many standard errors p(x) is from its estimate; or 1 / p(x), from reverse chains."""
    sign = -1 if found.upper else 1
    ratio = (sign * (found.estimates - truth)).exp()
    # Chains of one row from one exact draw depend on each other, rows do not.
    ratio = ratio.mean(0)
    return float((ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio))))


def gamma_poisson(self, x):
    rate = pyro.sample("z", dist.Gamma(2.0, 0.5))
    return pyro.sample("x", dist.Poisson(rate), obs=x)


def beta_binomial(self, x):
    p = pyro.sample("z", dist.Beta(2.0, 3.0))
    return pyro.sample("x", dist.Binomial(10, p), obs=x)


def dirichlet_multinomial(self, x):
    p = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    return pyro.sample("x", dist.Multinomial(6, p), obs=x)


def two_levels(self, x):
    above = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    z = pyro.sample("z1", dist.Normal(above, 0.5).to_event(1))
    return pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)


LOC = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)


def mixture(self, x):
    y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
    z = pyro.sample("z", dist.Normal(LOC[y], 1.0))
    return pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shifted_uniform(self, x):
    """The support of one latent depends on another; x is uniform given the sum's start."""
    low = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z = pyro.sample("z2", dist.Uniform(low, low + 2))
    return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def evidence_of_shifted_uniform(x: Tensor) -> Tensor:
    # z2 - z1 is uniform from 0 to 2, and x - (z2 - z1) Normal(0, sqrt(2)).
    law = dist.Normal(0.0, math.sqrt(2))
    return ((law.cdf(x) - law.cdf(x - 2)) / 2).log()


STORIES = {
    "Gamma-Poisson": (
        gamma_poisson,
        lambda x: dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5)).log_prob(x),
    ),
    "Beta-Binomial": (beta_binomial, lambda x: dist.BetaBinomial(2.0, 3.0, 10).log_prob(x)),
    "Dirichlet-Multinomial": (
        dirichlet_multinomial,
        lambda x: dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]), 6).log_prob(x),
    ),
    "two levels": (
        two_levels,
        lambda x: dist.Normal(0.0, math.sqrt(1 + 0.25 + 0.09)).log_prob(x).sum(-1),
    ),
    "enumerated": (
        mixture,
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3)), dist.Normal(LOC, math.sqrt(1.25))
        ).log_prob(x),
    ),
    "dependent support": (shifted_uniform, evidence_of_shifted_uniform),
}


@pytest.mark.parametrize("name", STORIES)
def test_both_directions_estimate_a_known_evidence(name, program, float64):
    story, evidence = STORIES[name]
    model = program(story)
    drawn = model.simulate(60)
    guide = Factorized(z=(By(lambda x: dist.Normal(x, 0.8)), ["x"]))
    if name != "enumerated":
        guide = Prior(model)
    latents = {k: v for k, v in drawn.items() if k != "x"}
    truth = evidence(drawn["x"])
    lower, upper = bidirectional(
        model, guide, {"x": drawn["x"]}, latents, temperatures=50, chains=8, leapfrog=5
    )
    assert abs(z_score(lower, truth)) < 3.5
    for found, sign in ((lower, 1), (upper, -1)):
        error = sign * (truth - found.log_evidence)
        assert error.mean() > -3.5 * error.std() / math.sqrt(60)
        assert error.mean() < 0.3
    assert lower.acceptance.mean().item() == pytest.approx(annealing.TARGET, abs=0.12)


@pytest.mark.parametrize("name", STORIES)
def test_of_each_row_the_estimate_has_the_evidence_as_its_mean(name, program, float64):
    """Row by row: averaged over rows from the model, a wrong evidence can have the right mean."""
    story, evidence = STORIES[name]
    model = program(story)
    x = model.simulate(4)["x"]
    guide = Factorized(z=(By(lambda x: dist.Normal(x, 0.8)), ["x"]))
    if name != "enumerated":
        guide = Prior(model)
    again = x.repeat(80, *(1,) * (x.dim() - 1))
    found = annealed_log_evidence(model, guide, {"x": again}, temperatures=30, chains=4, leapfrog=4)
    ratio = (found.estimates - evidence(again)).exp().mean(0).reshape(80, 4)
    z = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(80))
    assert z.abs().max() < 4


@pytest.mark.slow
def test_reverse_chains_estimate_the_inverse_evidence(linear):
    """Without bias, so that their mean over many rows is the right one, however few chains."""
    model, guide, _ = linear
    drawn = model.simulate(2000)
    truth = model.evidence(drawn["x"]).detach()
    lower, upper = bidirectional(
        model,
        guide,
        {"x": drawn["x"]},
        {"z": drawn["z"]},
        temperatures=40,
        chains=2,
        leapfrog=3,
    )
    assert abs(z_score(lower, truth)) < 3.5
    assert abs(z_score(upper, truth)) < 3.5
    assert (upper.log_evidence - truth).mean() > 0.03
    assert (lower.log_evidence - truth).mean() < -0.03


def test_more_temperatures_close_the_bracket_around_the_truth(linear):
    model, guide, _ = linear
    drawn = model.simulate(200)
    truth = model.evidence(drawn["x"]).detach()
    gaps: list[Tensor] = []
    for temperatures in (4, 16, 64):
        found = bidirectional(
            model,
            guide,
            {"x": drawn["x"]},
            {"z": drawn["z"]},
            temperatures=temperatures,
            chains=2,
            leapfrog=3,
        )
        assert (found.lower.log_evidence - truth).mean() < 0
        assert (found.upper.log_evidence - truth).mean() > 0
        gaps.append(found.gap.mean())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_from_the_exact_posterior_every_chain_has_the_evidence(linear):
    model, guide, drawn = linear
    found = annealed_log_evidence(
        model, guide, {"x": drawn["x"]}, temperatures=5, chains=3, start="guide"
    )
    truth = model.evidence(drawn["x"]).detach()
    torch.testing.assert_close(found.estimates, truth.expand(3, 24))


def test_from_a_guide_with_enumerated_labels(program, float64):
    model = program(mixture)
    x = model.simulate(30)["x"]
    truth = STORIES["enumerated"][1](x)

    class Exact(nn.Module):
        """q(y | x) q(z | x, y), y enumerated."""

        def forward(self, x, total=None):
            with pyro.plate("data", len(x)):
                logits = dist.Normal(LOC, math.sqrt(1.25)).log_prob(x[:, None])
                y = pyro.sample(
                    "y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"}
                )
                loc = (LOC[y] + 4 * x) / 5
                pyro.sample("z", dist.Normal(loc, math.sqrt(0.2)))

    found = annealed_log_evidence(model, Exact(), {"x": x}, temperatures=4, chains=2, start="guide")
    torch.testing.assert_close(found.estimates, truth.expand(2, 30))


def test_hmc_leaves_the_posterior_as_it_is(linear):
    model, guide, drawn = linear
    x = drawn["x"][:3]
    chains, posterior = 4000, model.posterior(x)
    with evaluating(1, model, guide):
        density = Density(model, guide, {"x": x}, start="prior", given={})
        count = hmc.Count(1000, lambda done: None)
        gradients = hmc.Gradients(density, False, count)
        moves = hmc.Hmc(lambda u: gradients({"x": x}, u), leapfrog=3)
        before = posterior.sample((chains,))
        state = moves.state(before)
        for _ in range(6):
            state, accepted = moves.move(state, 1.0, torch.tensor([0.3, 0.5, 0.7]))
        # Where it was not, it arrives.
        far = moves.state(torch.full_like(before, 2.0))
        for _ in range(60):
            far, _ = moves.move(far, 1.0, torch.tensor([0.3, 0.3, 0.3]))
    assert 0.3 < accepted.mean() < 0.97
    for u in (state.u, far.u):
        centered = (u - posterior.loc).detach()
        white = torch.linalg.solve_triangular(
            posterior.scale_tril.detach(), centered.unsqueeze(-1), upper=False
        ).squeeze(-1)
        assert (white.mean(0) * math.sqrt(chains)).abs().max() < 3.7
        assert ((white.square().mean(0) - 1) / math.sqrt(2 / chains)).abs().max() < 3.7
        cross = white[..., 0] * white[..., 1]
        assert (cross.mean(0) * math.sqrt(chains)).abs().max() < 3.7
    assert (state.u != before).any(-1).double().mean() > 0.9


def test_a_global_latent_is_held_at_one_draw(program, float64):
    model = program(
        lambda self, x: pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(self.w, 1.0)), 1.0), obs=x
        ),
        whole=lambda self: setattr(self, "w", pyro.sample("w", dist.Normal(0.0, 1.0))),
    )
    x = torch.linspace(-2, 2, 30)
    found = annealed_log_evidence(model, Prior(model), {"x": x}, temperatures=30, chains=10)
    assert found.given["w"].shape == ()
    truth = dist.Normal(found.given["w"], math.sqrt(2.0)).log_prob(x)
    assert abs(z_score(found, truth)) < 3.5
    held = annealed_log_evidence(
        model, Prior(model), {"x": x}, given={"w": torch.tensor(1.5)}, temperatures=30, chains=10
    )
    assert abs(z_score(held, dist.Normal(1.5, math.sqrt(2.0)).log_prob(x))) < 3.5


def test_what_no_gradient_moves_is_refused(program, float64):
    x = torch.ones(3)

    def discrete(self, x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = program(discrete)
    with pytest.raises(NotAnnealable, match="site 'z' of Program is discrete"):
        annealed_log_evidence(model, Prior(model), {"x": x})
    model = program(lambda self, x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x))
    with pytest.raises(NotAnnealable, match="no continuous latent"):
        annealed_log_evidence(model, Prior(model), {"x": x})


def test_settings_that_cannot_work_are_refused(linear):
    model, guide, drawn = linear
    with pytest.raises(ValueError, match="temperatures=1"):
        annealed_log_evidence(model, guide, {"x": drawn["x"]}, temperatures=1)
    with pytest.raises(ValueError, match=r"expected \(temperatures - 1, rows\), \(9, 24\)"):
        annealed_log_evidence(
            model, guide, {"x": drawn["x"]}, temperatures=10, step_sizes=torch.ones(10, 24)
        )


def few(linear, **options) -> Annealed:
    model, guide, drawn = linear
    return annealed_log_evidence(
        model,
        guide,
        {"x": drawn["x"]},
        **{"temperatures": 6, "chains": 3, "leapfrog": 2, "compile": False} | options,
    )


def test_one_seed_is_one_result_and_the_random_state_stays(linear):
    state = torch.get_rng_state()
    first, again, other = few(linear), few(linear), few(linear, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.estimates, again.estimates)
    assert not torch.equal(first.estimates, other.estimates)
    assert first.step_sizes.shape == (5, 24)
    assert first.acceptance.shape == (24,)


@pytest.mark.slow
def test_run_by_python_recorded_or_compiled_the_result_is_the_same(linear, monkeypatch):
    monkeypatch.setattr(hmc, "RECORDING", 0)
    recorded = few(linear)
    compiled = few(linear, compile=True)
    torch.testing.assert_close(recorded.estimates, compiled.estimates)

    def refuse(*_: Any) -> Any:
        raise graphs.Untraceable("no")

    monkeypatch.setattr(graphs, "record", refuse)
    torch.testing.assert_close(recorded.estimates, few(linear).estimates)


def test_rows_are_annealed_in_blocks_of_one_size(linear, monkeypatch):
    model, _, drawn = linear
    monkeypatch.setattr(annealing, "_rows_at_once", lambda *_: 7)
    shapes: list[torch.Size] = []
    run = hmc.Hmc.state
    monkeypatch.setattr(hmc.Hmc, "state", lambda self, u: shapes.append(u.shape) or run(self, u))
    shown: list[float] = []
    found = few(linear, temperatures=40, chains=6, progress=shown.append)
    assert set(shapes) == {torch.Size([6, 7, 2])}
    assert found.estimates.shape == (6, 24)
    assert abs(z_score(found, model.evidence(drawn["x"]).detach())) < 3.5
    assert shown[-1] == pytest.approx(1, abs=0.02)
    assert shown == sorted(shown)


def test_memory_decides_how_many_rows_there_are_at_once(linear, monkeypatch):
    model, guide, drawn = linear
    density = Density(model, guide, {"x": drawn["x"]}, start="prior", given={})
    sizes = []
    for memory in (2**12, 2**15, 2**30):
        monkeypatch.setattr(annealing, "CACHED", memory)
        sizes.append(annealing._rows_at_once(density, {"x": drawn["x"]}, 4, 24))
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == 24


def test_a_trajectory_to_nowhere_is_refused(linear):
    found = few(linear, step_sizes=torch.full((5, 24), 1e200))
    assert found.estimates.isfinite().all()
    assert (found.acceptance == 0).all()


def test_the_schedule_is_dense_at_both_ends():
    betas = torch.tensor(schedule(100))
    steps = betas.diff()
    assert (betas[0], betas[-1]) == (0, 1)
    assert (steps > 0).all()
    assert steps[0] < steps[50] / 5
    torch.testing.assert_close(steps, steps.flip(0), atol=1e-6, rtol=0)


def test_float32_models_have_float64_estimates():
    torch.manual_seed(0)
    model = PPCA(2, 5, scale=0.6)
    x = model.simulate(20)["x"]
    guide = MeanField(model, MLP(5, 8, 8), x)
    found = annealed_log_evidence(model, guide, {"x": x}, temperatures=40, chains=8)
    assert found.estimates.dtype == torch.float64
    assert found.step_sizes.dtype == torch.float32
    assert abs(z_score(found, model.evidence(x).detach().double())) < 3.5
