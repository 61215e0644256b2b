"""Evaluation against quadrature, closed forms and the loss itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import evaluation
from ppl_vae.data import Dataset
from ppl_vae.evaluation import evaluate, mean_elbo
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError


def vae(latents: int, likelihood: Any = Bernoulli) -> tuple[VAE, MeanField, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(latents), likelihood(MLP(latents, 8, 6))).double()
    x = model.simulate(23)["x"]
    guide = MeanField(model, MLP(6, 8, 8).double(), x).double()
    return model, guide, {"train": x, "test": x}


def test_nll_is_the_evidence_by_quadrature() -> None:
    model, guide, data = vae(1)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64).reshape(-1, 1, 1)
    log_joint = model.z_dist().log_prob(z) + model.x_dist(z).log_prob(data["test"])
    evidence = (log_joint.logsumexp(0) + math.log(18 / 4000)).mean().item()
    assert evaluate(model, guide, data, samples=4000).nll == pytest.approx(-evidence, abs=5e-3)


def test_elbo_is_the_mean_of_the_loss_also_with_global_sites() -> None:
    torch.manual_seed(0)
    model = Template.toy().double()
    x = model.simulate(9)["x"]
    guide = MeanField(model, MLP(4, 8, 8).double(), x).double()
    losses = []
    with own_parameters(model, guide), torch.no_grad():
        for _ in range(800):
            losses.append(-Trace_ELBO().loss(model, guide, x) / 9)
    losses = torch.tensor(losses)
    error = math.hypot(losses.std().item() / math.sqrt(800), losses.std().item() / math.sqrt(2000))
    result = evaluate(model, guide, {"train": x, "test": x}, samples=2000)
    assert abs(result.elbo - losses.mean().item()) < 4 * error
    assert result.elbo == pytest.approx(result.reconstruction - result.kl, rel=1e-9)
    assert set(result.kl_per_site) == {"w", "z"}
    assert result.kl == pytest.approx(sum(result.kl_per_site.values()))


def test_memory_stays_in_the_budget() -> None:
    """Peak memory of a process, measured: all at once would take 2.5 GB for x's logits alone."""
    script = """
import resource, torch
from ppl_vae.models.vae import VAE
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError
from ppl_vae.evaluation import evaluate
model = VAE(StandardNormal(2), Bernoulli(MLP(2, 8, 784)))
x = torch.zeros(2000, 784)
guide = MeanField(model, MLP(784, 8), x)
data = {"train": x, "test": x}
evaluate(model, guide, data, samples=2, memory=32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate(model, guide, data, samples=400, memory=32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2 * 32


def test_kl_per_latent_is_the_closed_form() -> None:
    model, guide, data = vae(2)
    q = guide.posterior(data["test"]).base_dist
    closed = 0.5 * (q.loc**2 + q.scale**2 - 1 - 2 * q.scale.log())
    result = evaluate(model, guide, data, samples=4000)
    assert result.kl_per_latent["z"] == pytest.approx(closed.mean(0).tolist(), rel=1e-9)
    assert result.kl_per_site["z"] == pytest.approx(closed.sum(-1).mean().item(), rel=0.02)


def test_active_units_are_those_whose_posterior_mean_moves() -> None:
    class OneMoves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor([0.5, 1e-3, 0.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            return dist.Normal(x[:, :1] * self.size, 1.0).to_event(1)

    model, _, data = vae(3)
    result = evaluate(model, Factorized(z=(OneMoves(), ["x"])), data, samples=2)
    assert data["test"][:, 0].var(correction=0) * 0.25 > 0.01
    assert result.active_units == 1


def test_a_collapsed_latent_is_not_active_whatever_its_family() -> None:
    """q = p on a transformed support: the spread of draws is not that of posterior means."""

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, *x: Tensor) -> Any:
            return dist.LogNormal(self.loc.expand(*(len(c) for c in x), 3), 1.0).to_event(1)

    torch.manual_seed(0)
    model = VAE(Prior(), Bernoulli(MLP(3, 6))).double()
    x = model.simulate(50)["x"]
    result = evaluate(model, Factorized(z=(Prior(), ["x"])), {"train": x, "test": x}, samples=2)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.active_units == 0


def test_data_that_the_model_cannot_emit_are_refused() -> None:
    model, guide, _ = vae(2)
    grey = torch.rand(23, 6)
    with pytest.raises(PairError, match="which Bernoulli cannot emit"):
        evaluate(model, guide, {"train": grey, "test": grey})


@pytest.mark.parametrize(("unit", "shift"), [(1.0, 0.0), (255.0, math.log2(255))])
def test_bits_per_dim_of_a_density_are_in_the_stored_unit(unit: float, shift: float) -> None:
    model, guide, data = vae(2, Gaussian)
    stored = {split: {"x": x * unit} for split, x in data.items()}
    result = evaluate(model, guide, Dataset("grey", stored, unit=unit), samples=5)
    assert result.bits_per_dim == pytest.approx(result.nll / 6 / math.log(2) + shift)


def test_bits_per_dim_of_bits_have_no_unit() -> None:
    model, guide, data = vae(2)
    stored = {split: {"x": (x * 255).byte()} for split, x in data.items()}
    dynamic = Dataset("bits", stored, unit=255.0)
    result = evaluate(model, guide, dynamic, samples=5)
    assert result.bits_per_dim == pytest.approx(result.nll / 6 / math.log(2))


def test_evaluation_is_repeatable_and_leaves_no_trace() -> None:
    model, guide, data = vae(2)
    model.train()
    guide.eval()
    state = torch.get_rng_state()
    first = evaluate(model, guide, data, samples=7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not guide.training
    assert evaluate(model, guide, data, samples=7, seed=3) == first
    assert evaluate(model, guide, data, samples=7, seed=4) != first
    assert json.loads(json.dumps(first.to_json()))["rows"] == 23


def test_mean_elbo_is_the_elbo_of_one_draw_a_row() -> None:
    model, guide, data = vae(2)
    rows = Dataset("x", {s: {"x": x} for s, x in data.items()}).split("test")
    draws = [mean_elbo(model, guide, rows, seed=s) for s in range(300)]
    mean = torch.stack([terms.elbo for terms in draws])
    expected = evaluate(model, guide, data, samples=3000).elbo
    assert abs(mean.mean().item() - expected) < 4.5 * mean.std().item() / math.sqrt(300)
    assert mean.std() > 0


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"memory": 0}])
def test_impossible_budgets_are_refused(wrong: dict[str, Any]) -> None:
    model, guide, data = vae(2)
    with pytest.raises(ValueError, match="expected at least 1"):
        evaluate(model, guide, data, **wrong)


def test_a_probability_above_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, data = vae(2)
    means = evaluation.mean_figures

    def absurd(*args: Any, **kwargs: Any) -> Any:
        result = means(*args, **kwargs)
        result["log evidence", ""] = result["log evidence", ""].abs()
        return result

    monkeypatch.setattr(evaluation, "mean_figures", absurd)
    with pytest.raises(FloatingPointError, match="a probability above 1"):
        evaluate(model, guide, data)
