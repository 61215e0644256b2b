"""Rows that are shuffled, sorted, a series, or copied."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.conjugate import exact
from ppl_vae.checks.result import NotApplicable
from ppl_vae.checks.row_order import row_order
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP


def ppca():
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=4, scale=0.5)
    return model, MeanField(model, MLP(4, 4), x=torch.zeros(2, 4))


def as_test(x):
    return {"train": x, "test": x}


@pytest.fixture(scope="module")
def pair():
    return ppca()


@pytest.fixture(scope="module")
def x(pair):
    torch.manual_seed(1)
    return pair[0].simulate(200)["x"]


def worst(result):
    return min(result.statistics, key=lambda record: record["p_adjusted"])


@pytest.mark.slow
def test_p_is_uniform_for_shuffled_rows(pair):
    model, guide = pair
    p = []
    for seed in range(120):
        torch.manual_seed(1000 + seed)
        data = as_test(model.simulate(25)["x"])
        p.append(row_order(model, guide, data, seed=seed, permutations=99, samples=2).p)
    # p lies on a grid of 0.01: half a step is taken off, so that a continuous law fits.
    assert scipy.stats.kstest(np.array(p) - 0.005, "uniform").pvalue > 0.001
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 3.2 * np.sqrt(0.09 / 120)


def test_a_global_latent_that_rows_share_is_no_order_of_theirs(monkeypatch):
    from ppl_vae import evaluation
    from ppl_vae.importance import Budget

    torch.manual_seed(0)
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    x = model.simulate(80)["x"]
    with torch.no_grad():
        guide.global_guide.scales.w = torch.full((4,), 8.0)
    # Each draw is for eight rows, which then have much in common.
    monkeypatch.setattr(evaluation, "budget", lambda *args, **kwargs: Budget(8, 8))
    fails = 0
    for seed in range(20):
        shuffled = x[torch.randperm(80)]
        fails += (
            row_order(model, guide, as_test(shuffled), seed=seed, samples=1, permutations=199).p
            <= 0.05
        )
    assert fails <= 4  # of 20 at 0.05: more have a probability of 0.003


def test_sorted_rows(pair, x):
    result = row_order(*pair, as_test(x[x.sum(1).argsort()]))
    assert result.verdict == "fail"
    assert result.p == pytest.approx(1 / 2000)
    assert "take no prefix" in result.meaning
    assert row_order(*pair, as_test(x)).verdict == "pass"


def test_a_series(pair, x):
    noise, series = x, [x[0]]
    for row in noise[1:]:
        series.append(0.7 * series[-1] + row)
    result = row_order(*pair, as_test(torch.stack(series)))
    assert result.verdict == "fail"
    assert worst(result)["statistic"] == "correlation with the next row"
    # sqrt((1 + 0.7) / (1 - 0.7)) = 2.4
    factor = float(result.meaning.split("factor of about ")[1].split(",")[0])
    assert factor == pytest.approx(2.4, abs=0.5)


def test_copies_that_stand_together(pair, x):
    twice = x[:100].repeat_interleave(2, 0)
    assert row_order(*pair, as_test(twice)).verdict == "fail"
    torch.manual_seed(2)
    assert row_order(*pair, as_test(twice[torch.randperm(200)])).verdict == "pass"


def test_an_order_of_labels_alone(pair, x):
    y = torch.arange(200) // 20
    result = row_order(*pair, as_test({"x": x, "y": y}))
    assert result.verdict == "fail"
    assert {r["figure"] for r in result.statistics if r["verdict"] == "fail"} == {"label"}


def test_statistics_are_rank_correlations(pair, x):
    result = row_order(*pair, as_test({"x": x, "y": torch.arange(200) % 7}))
    figures = result.groups["row_order"]
    for record in result.statistics:
        values = figures[record["figure"]].values
        if record["statistic"] == "correlation with the row number":
            expected = scipy.stats.spearmanr(values, np.arange(200)).statistic
            assert record["value"] == pytest.approx(expected, abs=1e-12)
        else:
            expected = scipy.stats.spearmanr(values[1:], values[:-1]).statistic
            assert record["value"] == pytest.approx(expected, abs=0.02)
    assert list(figures["label"].values) == [k % 7 for k in range(200)]


def test_rows_are_consecutive_and_begin_anywhere(pair, x):
    firsts = set()
    for seed in range(5):
        result = row_order(*pair, as_test(x), seed=seed, rows=50)
        numbers = result.groups["row_order"]["row"].values
        assert (np.diff(numbers) == 1).all()
        assert len(numbers) == 50
        firsts.add(numbers[0])
    assert len(firsts) > 2


def test_what_cannot_work_is_refused(pair, x):
    with pytest.raises(ValueError, match="even the worst model would pass; expected at least 199"):
        row_order(*pair, as_test(x), level=0.005, permutations=198)
    with pytest.raises(ValueError, match="level=5"):
        row_order(*pair, as_test(x), level=5)
    with pytest.raises(NotApplicable, match="9 rows"):
        row_order(*pair, as_test(x[:9]))


def test_repeatable_and_drawn(pair, x):
    import matplotlib.pyplot as plt

    state = torch.get_rng_state()
    a, b = (row_order(*pair, as_test(x), seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json()
    assert len(a.plot().axes) == 4
    assert not plt.get_fignums()


def test_rows_that_are_all_alike_have_no_order(float64):
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=4, scale=0.5)
    with pytest.raises(NotApplicable, match="alike"):
        row_order(model, exact(model), as_test(torch.ones(20, 4)), permutations=99)
