from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from ppl_vae import zoo
from ppl_vae.checks import NotApplicable
from ppl_vae.checks.evidence import evidence, shortfall
from ppl_vae.checks.evidence_report import draws_shown
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.sites import PairError

FAST: dict[str, Any] = {
    "rows": 40,
    "samples": 300,
    "annealed_rows": 12,
    "simulated_rows": 12,
    "temperatures": 60,
    "chains": 4,
    "leapfrog": 4,
    "compile": False,
}
TINY = FAST | {
    "rows": 8,
    "samples": 30,
    "annealed_rows": 4,
    "simulated_rows": 4,
    "temperatures": 4,
    "chains": 2,
    "leapfrog": 1,
}


class Exact(nn.Module):
    """The exact posterior of PPCA, its scale times ``factor``."""

    def __init__(self, model: PPCA, factor: float = 1.0) -> None:
        super().__init__()
        self.model, self.factor = (model,), factor

    def forward(self, x: Any) -> Any:
        exact = self.model[0].posterior(x)
        return dist.MultivariateNormal(exact.loc, scale_tril=exact.scale_tril * self.factor)


def linear(factor: float = 1.0, latents: int = 4) -> tuple[PPCA, Factorized, Any]:
    torch.manual_seed(0)
    model = PPCA(latents, 12, scale=0.5).double()
    guide = Factorized(z=(Exact(model, factor), ["x"]))
    torch.manual_seed(1)
    x = model.simulate(60)["x"]
    return model, guide, {"train": x, "test": x}


def by_figure(result: Any) -> dict[str, Any]:
    return {record["figure"]: record for record in result.statistics}


def test_with_the_exact_posterior_every_bound_is_the_evidence():
    model, guide, data = linear()
    result = evidence(model, guide, data, **FAST | {"temperatures": 200})
    rows = result.groups["evidence"]["row"].values.copy()
    assert len(set(rows)) == 40
    assert rows[-1] > 40  # no prefix
    truth = model.evidence(data["test"][rows]).detach()
    records = by_figure(result)
    for name in ("bound of 1 draw (ELBO)", "bound of 10 draws", "bound of 300 draws"):
        assert records[name]["value"] == pytest.approx(truth.mean().item(), abs=1e-9)
        assert records[name]["standard_error"] == pytest.approx(
            truth.std().item() / math.sqrt(40), abs=1e-9
        )
    assert records["NLL, Pareto-smoothed"]["value"] == pytest.approx(-truth.mean().item())
    assert records["rows with Pareto-k above 0.7"]["value"] == 0
    assert records["effective draws, median"]["value"] == pytest.approx(300)
    assert result.verdict == "pass"
    assert result.error_rate == 0.05
    annealed = result.groups["evidence_annealed"]
    own = model.evidence(data["test"][annealed["row"].values.copy()]).detach().numpy()
    assert np.abs(annealed["log_evidence"].values - own).mean() < 0.3
    # Upper less lower is above 0 in expectation, and small.
    gap = records["simulated rows: upper less lower"]
    assert -3 * gap["standard_error"] < gap["value"] < 0.3


def test_a_guide_that_misses_mass_fails_and_annealing_is_to_be_trusted():
    model, guide, data = linear(0.3, latents=8)
    result = evidence(model, guide, data, **FAST | {"temperatures": 150, "annealed_rows": 40})
    assert result.verdict == "fail"
    assert result.p is not None
    assert result.p < 0.005
    assert "Importance sampling gives too low a log p(x)" in result.meaning
    assert "trust annealing; as Pareto-k says too, the guide" in result.meaning
    records = by_figure(result)
    assert records["rows with Pareto-k above 0.7"]["value"] > 0.5
    assert records["annealing less importance sampling"]["verdict"] == "fail"
    truth = model.evidence(
        data["test"][result.groups["evidence_annealed"]["row"].values.copy()]
    ).detach()
    annealed = records["log p(x) by annealing"]["value"]
    sampled = records["log p(x) by importance sampling, same rows"]["value"]
    assert sampled + 0.5 < annealed < truth.mean().item() + 0.2


def test_annealing_that_is_too_short_is_no_fault_and_not_to_be_trusted():
    model, guide, data = linear()
    result = evidence(model, guide, data, **FAST | {"temperatures": 3, "leapfrog": 1})
    assert result.verdict == "measured"
    assert result.p is not None
    assert result.p > 0.9
    assert "Annealing gives too low a log p(x)" in result.meaning
    assert "Try more temperatures" in result.meaning
    assert by_figure(result)["simulated rows: upper less lower"]["value"] > 1


def test_the_p_value_is_uniform_where_the_difference_is_the_tolerance():
    generator = torch.Generator().manual_seed(0)
    p = [
        shortfall(0.5 + 0.1 * torch.randn(20, generator=generator, dtype=torch.float64), 0.5)
        for _ in range(2000)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001


def test_the_p_value_is_large_within_the_tolerance_and_without_spread_exact():
    generator = torch.Generator().manual_seed(0)
    p = [shortfall(0.3 * torch.randn(10, generator=generator), 0.5) for _ in range(500)]
    assert np.mean(np.array(p) <= 0.05) < 0.01
    assert shortfall(torch.full((5,), 0.4), 0.5) == 1
    assert shortfall(torch.full((5,), 0.6), 0.5) == 0
    assert shortfall(torch.full((5,), -3.0), 0.5) == 1  # annealing is what is too low
    assert shortfall(torch.tensor([0.0, math.inf]), 0.5) == 0
    assert shortfall(torch.tensor([0.0, -math.inf]), 0.5) == 1


def test_one_seed_is_one_result_and_the_random_state_stays():
    model, guide, data = linear(0.8)
    state = torch.get_rng_state()
    first, again, other = (evidence(model, guide, data, seed=s, **TINY) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.to_json() == again.to_json()
    assert first.to_json() != other.to_json()
    json.dumps(first.to_json(), allow_nan=False)


def test_progress_goes_from_start_to_end():
    model, guide, data = linear(0.8)
    shown: list[float] = []
    evidence(model, guide, data, progress=shown.append, **TINY)
    assert shown == sorted(shown)
    assert 0 < shown[0] <= 0.25
    assert shown[-1] == pytest.approx(1, abs=0.05)


def test_pictures_and_groups():
    import matplotlib.pyplot as plt

    model, guide, data = linear(0.5)
    result = evidence(model, guide, data, **FAST | {"temperatures": 5})
    assert list(result.pictures) == ["evidence", "pareto_k"]
    bounds = result.plot()
    line = bounds.axes[0].lines[0]
    records = result.groups["evidence_annealed"]
    np.testing.assert_allclose(line.get_xdata(), [1, 10, 100, 300])
    np.testing.assert_allclose(line.get_ydata(), records["bound"].mean("row"))
    pareto = result.plot("pareto_k")
    k = result.groups["evidence"]["pareto_k"].values
    shown = np.concatenate([part.get_ydata() for part in pareto.axes[0].lines[:2]])
    np.testing.assert_allclose(np.sort(shown), np.sort(k))
    assert not plt.get_fignums()
    assert records["annealed"].sizes == {"chain": 4, "row": 12}
    assert result.groups["evidence_simulated"]["lower"].sizes == {"chain": 4, "row": 12}


def test_draws_that_are_shown():
    assert draws_shown(5000) == [1, 10, 100, 1000, 5000]
    assert draws_shown(100) == [1, 10, 100]
    assert draws_shown(1) == [1]


def test_annealing_can_be_left_out():
    model, guide, data = linear()
    result = evidence(model, guide, data, **TINY | {"annealed_rows": 0, "simulated_rows": 0})
    assert (result.verdict, result.p, result.error_rate) == ("measured", None, 0.0)
    assert list(result.pictures) == ["evidence"]
    assert result.plot().axes
    assert set(result.groups) == {"evidence"}


def test_discrete_latents_are_measured_without_annealing(program):
    def story(self, x):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    model = program(story)
    x = model.simulate(30)["x"]
    result = evidence(model, Prior(model), {"train": x, "test": x}, **TINY)
    assert (result.verdict, result.p) == ("measured", None)
    assert "site 'z' of Program is discrete" in result.meaning
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 1.0]), 1.0)
    )
    full = evidence(
        model, Prior(model), {"train": x, "test": x}, **TINY | {"rows": 30, "samples": 4000}
    )
    assert by_figure(full)["NLL by importance sampling"]["value"] == pytest.approx(
        -law.log_prob(x).sum(-1).mean().item(), abs=0.02
    )


def test_enumerated_labels_and_global_latents(program, float64):
    """log p(x | w): both methods and the bracket hold the one draw of w."""
    loc = torch.tensor([-2.0, 2.0])

    def story(self, x):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(self.w + loc[y], 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = program(
        story, whole=lambda self: setattr(self, "w", pyro.sample("w", dist.Normal(0.0, 1.0)))
    )

    class Guide(nn.Module):
        def forward(self, x, total=None):
            pyro.sample("w", dist.Normal(1.0, 0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0))

    x = model.simulate(40)["x"]
    result = evidence(model, Guide(), {"train": x, "test": x}, **FAST | {"samples": 2000})
    assert result.verdict == "pass"
    assert "given one draw of w" in result.meaning
    records = by_figure(result)
    assert abs(records["annealing less importance sampling"]["value"]) < 0.25
    assert abs(records["simulated rows: upper less lower"]["value"]) < 0.5


def test_simulated_rows_alone_hold_the_global_latents_too(program, float64):
    """Nothing else is annealed that could have drawn them."""

    def story(self, x):
        z = pyro.sample("z", dist.Normal(self.w, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = program(
        story, whole=lambda self: setattr(self, "w", pyro.sample("w", dist.Normal(0.0, 3.0)))
    )

    class Guide(nn.Module):
        def forward(self, x, total=None):
            pyro.sample("w", dist.Normal(1.0, 0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0))

    x = model.simulate(40)["x"]
    result = evidence(model, Guide(), {"train": x, "test": x}, **FAST | {"annealed_rows": 0})
    record = by_figure(result)["simulated rows: upper less lower"]
    assert abs(record["value"]) < 0.3


def test_labels_that_are_withheld_are_summed_out():
    torch.manual_seed(0)
    model = M2.toy()
    drawn = model.simulate(30)
    y = drawn["y"].argmax(-1)
    splits = {"train": {"x": drawn["x"], "y": y}, "test": {"x": drawn["x"], "y": y}}
    from ppl_vae.data import Dataset

    data = Dataset("toy", splits).labeled(2 * model.classes, 0)
    guide = MeanField(model, MLP(drawn["x"].shape[-1], 8), x=drawn["x"])
    result = evidence(model, guide, data, **TINY)
    assert result.p is not None
    assert all(
        math.isfinite(r["value"]) for r in result.statistics if "Pareto-k" not in r["figure"]
    )


def test_models_without_latents_are_not_applicable(program):
    model = program(lambda self, x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x))
    x = torch.randn(20)
    with pytest.raises(NotApplicable, match="no latent: its log p"):
        evidence(model, Prior(model), {"train": x, "test": x})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 2}, "level=2"),
        ({"rows": 1}, "rows=1"),
        ({"samples": 0}, "samples=0"),
        ({"annealed_rows": 1}, "annealed_rows=1"),
        ({"tolerance": -1}, "tolerance=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evidence(*linear(), **options)


MODELS = {**zoo.models(), "Template": Template}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo(name):
    torch.manual_seed(0)
    model = MODELS[name].toy()
    data = model.simulate(20, **model.example_covariates(20))
    columns = {k: v for k, v in data.items() if k in (*model.observables, *model.covariates)}
    try:
        guide = MeanField(
            model, MLP(sum(x.shape[-1] for x in columns.values()), 8), **model.observed(columns)
        )
    except (PairError, ValueError, IndexError) as error:
        pytest.skip(f"no derived guide: {error}")
    if model.classes is not None and "y" in columns:
        columns["y"] = columns["y"].argmax(-1)  # as data hold them
    try:
        result = evidence(model, guide, {"train": columns, "test": columns}, **TINY)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    if result.p is None:
        assert "does not apply" in result.meaning
    assert result.plot().axes
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.slow
def test_a_right_pair_fails_no_more_often_than_stated():
    fails = 0
    for seed in range(60):
        model, guide, _ = linear(1.2)
        torch.manual_seed(100 + seed)
        x = model.simulate(30)["x"]
        result = evidence(
            model, guide, {"train": x, "test": x}, seed=seed, **FAST | {"simulated_rows": 0}
        )
        fails += result.verdict == "fail"
    assert fails <= 7  # of 60 at a level of 0.05, with probability 0.98
