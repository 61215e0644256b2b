from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch
import xarray

from benchmarks.conjugate import BetaBinomial, Clusters, GammaPoisson, TwoModes, exact
from ppl_vae.checks.ranks import coverage
from ppl_vae.checks.simulation import LOG_P, LOG_Q, LOG_WEIGHT
from ppl_vae.checks.simulation_based_calibration import simulation_based_calibration
from ppl_vae.guide import Prior
from ppl_vae.models.ppca import PPCA

REPORT = 0.05 / 11  # the level of a check among those of a report


def checked(model, rows=500, draws=49, seed=0, level=REPORT, guide=None, **faults):
    torch.manual_seed(1)
    x = model.simulate(50)["x"]
    return simulation_based_calibration(
        model,
        exact(model, **faults) if guide is None else guide,
        {"train": x, "test": x},
        rows=rows,
        draws=draws,
        seed=seed,
        level=level,
    )


def ppca(latents=3, observed=5, scale=0.7):
    torch.manual_seed(0)
    return PPCA(latents, observed, scale)


def by_name(result):
    return {record["quantity"]: record for record in result.statistics}


@pytest.mark.parametrize(
    ("fault", "direction"),
    [
        ({"scale": 0.8}, "too narrow"),
        ({"scale": 1.25}, "too wide"),
        ({"shift": 0.3}, "shifted up"),
        ({"shift": -0.3}, "shifted down"),
    ],
)
def test_faults_are_found_in_every_coordinate_and_named(fault, direction):
    result = checked(ppca(), **fault)
    assert result.verdict == "fail"
    assert result.p < 1e-6
    coordinates = [record for record in result.statistics if record["site"]]
    assert [r["quantity"] for r in coordinates] == ["z[0]", "z[1]", "z[2]"]
    assert [r["direction"] for r in coordinates] == [direction] * 3
    assert f"{direction} in z[0], z[1], z[2]" in result.meaning


@pytest.mark.parametrize(("scale", "direction"), [(0.75, "too narrow"), (1.3, "too wide")])
@pytest.mark.parametrize("model", [GammaPoisson, lambda: BetaBinomial(trials=8)])
def test_wrong_widths_on_bounded_supports_are_found(model, scale, direction):
    found = by_name(checked(model(), rows=800, scale=scale))
    assert [found[f"z[{k}]"]["direction"] for k in range(3)] == [direction] * 3


def test_a_narrow_guide_holds_the_truth_too_rarely(float64):
    """Coverage of a central interval of a normal whose scale is off by a factor c: the normal
    probability of c times its bounds."""
    found = by_name(checked(ppca(), rows=2000, draws=99, scale=0.75))
    for k in range(3):
        record = found[f"z[{k}]"]
        for percent in (50, 90):
            bound = scipy.stats.norm.ppf(0.5 + percent / 200)
            expected = 2 * scipy.stats.norm.cdf(0.75 * bound) - 1
            error = record[f"coverage_{percent}_se"]
            assert record[f"coverage_{percent}"] == pytest.approx(expected, abs=4 * error + 0.005)
    # In three dimensions, of the region of highest density: a chi-squared.
    bound = scipy.stats.chi2.ppf(0.9, 3)
    expected = scipy.stats.chi2.cdf(0.75**2 * bound, 3)
    assert found[LOG_Q]["coverage_90"] == pytest.approx(expected, abs=0.05)
    assert found[LOG_Q]["direction"] == "too narrow"


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ({"seen": 3}, LOG_P),
        ({"seen": 3}, LOG_WEIGHT),
        ({"rotation": 0.6}, LOG_P),
        ({"rotation": 0.6}, LOG_WEIGHT),
        ({"independent": True}, LOG_WEIGHT),
    ],
)
def test_faults_of_latents_together_are_found(fault, found_by):
    record = by_name(checked(ppca(), rows=1000, **fault))[found_by]
    assert record["verdict"] == "fail"


def test_a_guide_that_looks_at_nothing_is_found_by_densities_alone():
    model = ppca()
    found = by_name(checked(model, guide=Prior(model)))
    assert [name for name, r in found.items() if r["verdict"] == "fail"] == [LOG_P, LOG_WEIGHT]
    assert "blind to part of the data" in found[LOG_P]["direction"]


def test_a_dropped_mode_is_found():
    result = checked(TwoModes(), modes=1)
    assert result.verdict == "fail"
    found = by_name(result)
    assert found["z[0]"]["direction"] == "too narrow, shifted up"
    assert found[LOG_WEIGHT]["mean_rank"] > 0.8
    assert f"with probability {found[LOG_WEIGHT]['mean_rank']:.2f}" in result.meaning


def test_labels_that_are_too_sure_are_found():
    assert checked(Clusters(), rows=1000, sharpness=3.0).verdict == "fail"


def test_the_best_test_tells_a_shift_as_often_as_computed(float64):
    """Unit normals d apart: the truth has the larger ratio with probability Phi(d / sqrt 2)."""
    model = ppca(latents=1, observed=3)
    record = by_name(checked(model, rows=2000, shift=0.8))[LOG_WEIGHT]
    expected = scipy.stats.norm.cdf(0.8 / 2**0.5)
    assert record["mean_rank"] == pytest.approx(expected, abs=4 * record["mean_rank_se"])


MODELS = {
    "ppca": ppca,
    "gamma-poisson": GammaPoisson,
    "beta-bernoulli": lambda: BetaBinomial(trials=1),
    "two modes": TwoModes,
    "clusters": Clusters,
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_guides_pass(name):
    result = checked(MODELS[name](), rows=300, draws=19, level=0.05)
    assert result.verdict == "pass"
    assert result.error_rate == 0.05
    assert all(not record["direction"] for record in result.statistics)
    assert "are not told from the posterior's" in result.meaning


def test_p_values_are_uniform_for_an_exact_guide():
    """Of the z, which are independent of each other from seed to seed."""
    model = GammaPoisson(latents=1)
    p = [by_name(checked(model, rows=100, draws=9, seed=s))["z[0]"]["p"] for s in range(60)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_family_wise_error_rate_is_as_stated(name):
    model, runs = MODELS[name](), 200
    fails = sum(
        checked(model, rows=200, draws=19, seed=seed, level=0.05).verdict == "fail"
        for seed in range(runs)
    )
    assert fails / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_records_are_those_of_the_ranks():
    result = checked(ppca(), scale=0.8)
    ranks = result.groups["simulation_based_calibration"]["rank"]
    assert ranks.sizes == {"row": 500, "quantity": 6}
    for record in result.statistics:
        own = ranks.sel(quantity=record["quantity"]).values
        assert record["mean_rank"] == pytest.approx(own.mean() / 49)
        share = coverage(own, 49, 0.9, highest=not record["site"])
        assert record["coverage_90"] == pytest.approx(share)
        assert record["p_adjusted"] >= record["p"]
        assert (record["verdict"] == "fail") == (record["p_adjusted"] <= REPORT)
    assert result.p == min(record["p_adjusted"] for record in result.statistics)


def test_repeatable_saved_and_leaves_the_random_state(tmp_path):
    state = torch.get_rng_state()
    model = GammaPoisson()
    torch.manual_seed(1)
    x = model.simulate(50)["x"]
    after = torch.get_rng_state()
    a, b, c = (
        simulation_based_calibration(
            model, exact(model), {"train": x, "test": x}, rows=100, draws=9, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(state)
    assert a.to_json() == b.to_json() != c.to_json()
    json.dumps(a.to_json(), allow_nan=False)
    group = a.groups["simulation_based_calibration"]
    group.to_netcdf(tmp_path / "ranks.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "ranks.nc", engine="h5netcdf") as back:
        assert back.equals(group)


def test_progress_ends_at_one():
    model, seen = GammaPoisson(), []
    x = model.simulate(20)["x"]
    data = {"train": x, "test": x}
    simulation_based_calibration(
        model, exact(model), data, rows=300, draws=49, progress=seen.append
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_settings_that_cannot_work_are_refused():
    model = GammaPoisson()
    with pytest.raises(ValueError, match="level=2"):
        checked(model, level=2)
    with pytest.raises(ValueError, match="rows=99"):
        checked(model, rows=99)
    with pytest.raises(ValueError, match="draws=3"):
        checked(model, draws=3)


def test_pictures_show_every_quantity_and_name_what_fails():
    import matplotlib.pyplot as plt

    result = checked(ppca(), scale=0.8)
    assert next(iter(result.pictures)) == result.name
    figure = result.plot()
    assert not plt.get_fignums()
    coordinates, together = figure.axes
    assert len(coordinates.lines) == 1 + 3  # the line at 0 is one
    assert len(together.lines) == 1 + 3
    labels = [text.get_text() for text in coordinates.get_legend().get_texts()]
    assert sorted(labels) == [f"z[{k}]: too narrow" for k in range(3)]
    covered, _ = result.plot("coverage").axes
    assert len(covered.lines) == 1 + 3
    passed = checked(ppca(), rows=200)
    assert all(ax.get_legend() is None for ax in passed.plot().axes)


def test_arviz_plots_the_ranks_as_they_are():
    import arviz_plots
    import matplotlib.pyplot as plt

    result = checked(ppca(), rows=150, draws=19)
    group = result.groups["prior_sbc"]
    ranks = result.groups["simulation_based_calibration"]["rank"]
    for name in group.data_vars:
        own = ranks.sel(quantity=name).values
        np.testing.assert_allclose(group[name].values[0], (own + 0.5) / 20)
    arviz_plots.plot_ecdf_pit(xarray.DataTree.from_dict({"prior_sbc": group}), backend="none")
    plt.close("all")
