"""Models that are the truth, and models that have learned their training rows by heart."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.conjugate import exact
from benchmarks.faults import fitted_ppca
from ppl_vae.checks.generalization import generalization
from ppl_vae.checks.result import NotApplicable
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA


def truth(observed=4, latents=2):
    torch.manual_seed(0)
    return PPCA(latents=latents, observed=observed, scale=0.7).double()


def simulated(model, rows, seed):
    torch.manual_seed(seed)
    return model.simulate(rows)["x"]


def by_name(result):
    return {record["figure"]: record for record in result.statistics}


def test_figures_are_the_exact_evidence(float64):
    model = truth()
    train, test = simulated(model, 60, 1), simulated(model, 40, 2)
    result = generalization(model, exact(model), {"train": train, "test": test}, samples=3)
    record = by_name(result)["log p(x)"]
    held = model.evidence(test).detach().numpy()
    assert (result.settings["train_rows"], result.settings["rows"]) == (60, 40)
    seen = model.evidence(train).detach().numpy()
    assert record["train"] == pytest.approx(seen.mean(), rel=1e-9)
    assert record["held_out"] == pytest.approx(held.mean(), rel=1e-9)
    assert record["tolerated"] == pytest.approx(0.1 * held.std(ddof=1), rel=1e-9)
    assert by_name(result)["ELBO"]["gap"] == pytest.approx(record["gap"], abs=1e-9)
    parts = by_name(result)["reconstruction"]["gap"] + by_name(result)["-KL"]["gap"]
    assert parts == pytest.approx(record["gap"], abs=1e-9)


def test_without_tolerance_it_is_welchs_test(float64):
    model = truth()
    train, test = simulated(model, 25, 1), simulated(model, 90, 2)
    data = {"train": train, "test": test}
    result = generalization(model, exact(model), data, samples=3, tolerance=0.0)
    seen, held = (model.evidence(x).detach().numpy() for x in (train, test))
    expected = scipy.stats.ttest_ind(seen, held, equal_var=False, alternative="greater")
    assert by_name(result)["log p(x)"]["p"] == pytest.approx(expected.pvalue, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_p_is_uniform_where_the_gap_is_what_is_tolerated(float64, tolerance):
    """Training rows are moved so that the expected gap is just that: with the truth itself, by
    nothing; else by a draw towards the mean, whose effect is known from many rows."""
    model, p = truth(), []
    guide = exact(model)

    def closer(x, factor):
        mean = model.likelihood.net.bias.detach()
        return mean + factor * (x - mean)

    many = simulated(model, 200_000, 3)
    evidence = model.evidence(many).detach()
    low, high = 0.3, 1.0
    for _ in range(40):  # bisection
        middle = (low + high) / 2
        gap = (model.evidence(closer(many, middle)) - evidence).mean()
        low, high = (middle, high) if gap > tolerance * evidence.std() else (low, middle)
    for seed in range(120):
        data = {
            "train": closer(simulated(model, 60, 2000 + seed), low),
            "test": simulated(model, 60, 4000 + seed),
        }
        result = generalization(model, guide, data, seed=seed, samples=1, tolerance=tolerance)
        p.append(by_name(result)["log p(x)"]["p"])
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 3.2 * np.sqrt(0.09 / 120)


def test_a_model_that_has_learned_few_rows_by_heart(float64):
    source = truth(observed=12)
    train, test = simulated(source, 25, 1), simulated(source, 300, 2)
    model = fitted_ppca(train, 9)
    result = generalization(model, exact(model), {"train": train, "test": test})
    assert result.verdict == "fail"
    assert "The model is overfitted" in result.meaning
    gap = model.evidence(train).mean() - model.evidence(test).mean()
    assert by_name(result)["log p(x)"]["gap"] == pytest.approx(gap.item(), rel=0.5)
    model = fitted_ppca(simulated(source, 20_000, 3), 2)
    train = simulated(source, 300, 4)
    assert generalization(model, exact(model), {"train": train, "test": test}).passed


def test_a_guide_that_is_overfitted_alone(float64):
    model = truth()
    train, test = simulated(model, 200, 1), simulated(model, 200, 2)

    def wide(x):
        known = (x[..., None, :] == train).all(-1).any(-1)
        return torch.where(known, 1.0, 3.0)

    data = {"train": train, "test": test}
    result = generalization(model, exact(model, scale=wide), data, samples=2000)
    verdicts = {name: record["verdict"] for name, record in by_name(result).items()}
    assert verdicts["ELBO"] == "fail"
    assert verdicts["log p(x)"] == "pass"
    assert "guide is overfitted" in result.meaning
    # KL of N(m, 9 S) from N(m, S) in two dims: 2 (9 - 1 - log 9) / 2 nats
    expected = 8 - np.log(9)
    gap = by_name(result)["ELBO"]["gap"] - by_name(result)["log p(x)"]["gap"]
    assert gap == pytest.approx(expected, abs=0.1)


def test_a_global_latent():
    from ppl_vae.guides.mean_field import MeanField
    from ppl_vae.nn import MLP

    torch.manual_seed(0)
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    x = model.simulate(100)["x"]
    assert generalization(model, guide, {"train": x[:50], "test": x[50:]}).passed


def test_what_cannot_be_compared(float64):
    model = truth()
    x, other = simulated(model, 30, 1), simulated(model, 9, 2)
    guide = exact(model)
    with pytest.raises(NotApplicable, match="'test' holds the training rows"):
        generalization(model, guide, {"train": x, "test": x.clone()})
    with pytest.raises(NotApplicable, match="training rows were asked for"):
        generalization(model, guide, {"train": x, "test": other}, split="train")
    with pytest.raises(NotApplicable, match="9 rows"):
        generalization(model, guide, {"train": x, "test": other})
    with pytest.raises(ValueError, match="tolerance=-1"):
        generalization(model, guide, {"train": x, "test": x + 1}, tolerance=-1)
    with pytest.raises(ValueError, match="level=0"):
        generalization(model, guide, {"train": x, "test": x + 1}, level=0)


def test_repeatable_and_drawn(float64):
    import matplotlib.pyplot as plt

    model = truth()
    data = {"train": simulated(model, 80, 1), "test": simulated(model, 70, 2)}
    state = torch.get_rng_state()
    a, b, c = (generalization(model, exact(model), data, seed=s, rows=40) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json() != c.to_json()
    assert a.groups["generalization"].sizes == {"split": 2, "row": 40}
    assert len(a.plot().axes) == 2
    assert not plt.get_fignums()
