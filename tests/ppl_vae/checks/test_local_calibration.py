from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch
import xarray

from benchmarks.conjugate import BetaBinomial, Clusters, GammaPoisson, TwoModes, exact
from ppl_vae.checks.local_calibration import _correlation, _features, local_calibration
from ppl_vae.checks.local_figures import by_fifths
from ppl_vae.checks.ranks import polynomials
from ppl_vae.checks.result import NotApplicable
from ppl_vae.checks.simulation import LOG_Q
from ppl_vae.guide import Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.conditional import ConditionalVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

REPORT = 0.05 / 11  # the level of a check among those of a report


def checked(model, rows=1000, draws=29, seed=0, level=REPORT, guide=None, **faults):
    torch.manual_seed(1)
    x = model.simulate(50)["x"]
    return local_calibration(
        model,
        exact(model, **faults) if guide is None else guide,
        {"train": x, "test": x},
        rows=rows,
        draws=draws,
        seed=seed,
        level=level,
    )


def ppca(latents=2, observed=4, scale=0.7):
    torch.manual_seed(0)
    return PPCA(latents, observed, scale)


def of(result, quantity, aspect):
    (found,) = (r for r in result.statistics if (r["quantity"], r["aspect"]) == (quantity, aspect))
    return found


def by_size(x):
    """Too narrow for large x, too wide for small x."""
    size = x.square().mean(-1)
    return torch.where(size > size.median(), 0.7, 1.4)


def test_a_width_that_is_right_on_average_only_is_found():
    result = checked(ppca(), rows=1600, scale=by_size)
    assert result.verdict == "fail"
    for quantity in ("z[0]", "z[1]"):
        record = of(result, quantity, "spread")
        assert record["verdict"] == "fail"
        assert record["region"] == "large distance of x from its mean"
        assert record["direction"] == "too narrow there, too wide at the other end"
        assert record["lowest"] < 0 < record["highest"]
        assert of(result, quantity, "shift")["verdict"] == "pass"
    assert of(result, LOG_Q, "shift")["direction"] == "too wide there, too narrow at the other end"
    assert "for large distance of x from its mean: too narrow there" in result.meaning


def test_data_that_a_guide_does_not_look_at_are_named():
    result = checked(ppca(), seen=2)
    assert result.verdict == "fail"
    worst = min(result.statistics, key=lambda record: record["p"])
    assert worst["aspect"] == "shift"
    assert worst["quantity"] in ("z[0]", "z[1]")
    assert "x[2]" in worst["region"] or "x[3]" in worst["region"]
    assert {"down", "up"} == {part.split()[1] for part in worst["direction"].split(", ")}


def test_a_guide_that_looks_at_nothing_is_found():
    model = ppca()
    assert checked(model, guide=Prior(model)).verdict == "fail"


@pytest.mark.parametrize("fault", [{"scale": 0.7}, {"scale": 1.5}, {"shift": 0.5}])
def test_faults_that_are_the_same_everywhere_are_left_to_the_other_check(fault):
    assert checked(ppca(), **fault).verdict == "pass"


MODELS = {
    "ppca": ppca,
    "gamma-poisson": GammaPoisson,
    "beta-bernoulli": lambda: BetaBinomial(trials=1),
    "two modes": TwoModes,
    "clusters": Clusters,
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_guides_pass(name):
    result = checked(MODELS[name](), rows=400, draws=19, level=0.05)
    assert result.verdict == "pass"
    assert all(not record["direction"] for record in result.statistics)
    assert "as right for one kind of data as for another" in result.meaning
    assert result.p == min(record["p_adjusted"] for record in result.statistics)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_family_wise_error_rate_is_as_stated(name):
    model, runs = MODELS[name](), 200
    fails = sum(
        checked(model, rows=400, draws=19, seed=seed, level=0.05).verdict == "fail"
        for seed in range(runs)
    )
    assert fails / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_the_correlation_of_what_is_independent_is_a_standard_normal():
    """Though predictions have heavy tails, and scores of few draws a bounded, skewed law."""
    stream, replicates = np.random.default_rng(0), 5000
    score = polynomials(9)[1, stream.integers(0, 10, (replicates, 200))]
    prediction = stream.standard_cauchy((replicates, 200))
    p = np.array([_correlation(a, b)[1] for a, b in zip(prediction, score, strict=True)])
    for level in (0.05, 0.01, 0.001):
        error = np.sqrt(level / replicates)
        assert abs((p <= level).mean() - level) < 3.5 * error


def test_the_correlation_is_one_sided_and_of_ranks():
    a = np.arange(50.0)
    r, p = _correlation(np.exp(a), a)
    assert r == pytest.approx(1)
    assert p == pytest.approx(scipy.stats.norm.sf(7))
    assert _correlation(-a, a)[1] > 0.999
    assert _correlation(np.zeros(50), a) == (0.0, 1.0)


def test_nothing_is_tested_on_rows_that_were_learned_from():
    """Else a regression on more features than rows would find what is not there."""
    result = checked(ppca(observed=12), rows=200, draws=9, level=0.05)
    assert result.settings["tested_rows"] == 100
    assert len(set(result.groups["local_calibration"]["row"].values)) == 100
    assert result.verdict == "pass"


def test_fifths_are_by_rising_prediction():
    prediction = np.array([9, 1, 8, 2, 7, 3, 6, 4, 5, 0.0])
    found = by_fifths(prediction, prediction * 10)
    assert [mean for mean, _ in found] == [5, 25, 45, 65, 85]
    assert found[0][1] == pytest.approx(np.std([0, 10], ddof=1) / 2**0.5)


def test_features_of_wide_and_of_dependent_columns():
    stream = np.random.default_rng(0)
    wide = torch.from_numpy(stream.standard_normal((60, 500)))
    labels = torch.eye(3)[torch.arange(60) % 3]
    features, components = _features({"x": wide, "y": labels, "c": torch.ones(60, 2)})
    assert components.shape == (60, 10)
    assert features.shape == (60, 10 + 55 + 1)
    assert np.isfinite(features).all()
    # One-hot labels of three classes vary in two directions.
    assert _features({"y": labels})[1].shape == (60, 2)
    with pytest.raises(NotApplicable, match="the same in every row"):
        _features({"x": torch.ones(60, 3)})


def test_covariates_are_part_of_the_data():
    torch.manual_seed(0)
    model = ConditionalVAE.toy()
    columns = model.simulate(40, **model.example_covariates(40))
    seen = {name: columns[name] for name in ("x", *model.covariates)}
    example = model.observed(seen)
    guide = MeanField(model, MLP(sum(c.shape[-1] for c in example.values()), 6), **example)
    result = local_calibration(model, guide, {"train": seen, "test": seen}, rows=200, draws=9)
    assert result.plot("map").axes


def test_repeatable_saved_and_leaves_the_random_state(tmp_path):
    model = GammaPoisson()
    torch.manual_seed(1)
    x = model.simulate(50)["x"]
    state = torch.get_rng_state()
    a, b, c = (
        local_calibration(
            model, exact(model), {"train": x, "test": x}, rows=200, draws=9, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json() != c.to_json()
    json.dumps(a.to_json(), allow_nan=False)
    group = a.groups["local_calibration"]
    group.to_netcdf(tmp_path / "local.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "local.nc", engine="h5netcdf") as back:
        assert back.equals(group)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="level=0"):
        checked(GammaPoisson(), level=0)
    with pytest.raises(ValueError, match="rows=199"):
        checked(GammaPoisson(), rows=199)
    with pytest.raises(ValueError, match="draws=3"):
        checked(GammaPoisson(), draws=3)


def test_pictures():
    import matplotlib.pyplot as plt

    result = checked(ppca(), rows=400, draws=9, scale=by_size)
    assert next(iter(result.pictures)) == result.name
    figure = result.plot()
    assert not plt.get_fignums()
    assert len(figure.axes) == 6
    worst = min(result.statistics, key=lambda r: r["p"])
    title = figure.axes[0].get_title()
    assert title.startswith(f"{worst['quantity']}: {worst['aspect']}")
    assert worst["region"] in title
    scattered = result.plot("map").axes[0].collections[0]
    assert len(scattered.get_offsets()) == result.settings["tested_rows"]
    # One column of data: the score stands in for the second component.
    narrow = checked(GammaPoisson(latents=1, counts=1), rows=200, draws=9)
    assert narrow.plot("map").axes[0].get_ylabel() == "score"
