from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import xarray

from benchmarks.conjugate import exact
from ppl_vae import draws
from ppl_vae.checks import (
    CheckResult,
    NotApplicable,
    check,
    population_predictive,
    posterior_predictive,
    prior_predictive,
)
from ppl_vae.checks.statistics import neighbor_correlation, zeros
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

ENOUGH = 100  # replicates with which a model can fail at 0.05


def ppca(observed=4):
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=observed, scale=0.7)
    return model, MeanField(model, MLP(observed, 4), x=torch.zeros(2, observed))


def as_test(x):
    return {"train": x, "test": x}


@pytest.fixture(scope="module")
def pair():
    return ppca()


@pytest.fixture(scope="module")
def truth(pair):
    torch.manual_seed(1)
    return pair[0].simulate(400)["x"]


def by_name(result: CheckResult):
    return {record["statistic"]: record for record in result.statistics}


@pytest.mark.slow
def test_p_values_are_uniform_under_the_truth(pair):
    model, guide = pair
    p = []
    for seed in range(150):
        torch.manual_seed(1000 + seed)
        data = as_test(model.simulate(20)["x"])
        result = population_predictive(
            model, guide, data, seed=seed, replicates=99, statistics={"mean": torch.mean}
        )
        p.append(result.statistics[0]["p"])
    # p lies on a grid of 0.02: half a step is taken off, so that a continuous law fits.
    assert scipy.stats.kstest(np.array(p) - 0.01, "uniform").pvalue > 0.001
    # Never too many small ones: 3.2 standard errors above the level.
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 3.2 * np.sqrt(0.09 / 150)


def uniform(p, replicates):
    """Whether p-values ``k / (1 + replicates)`` could be uniform, by Kolmogorov and Smirnov."""
    jitter = np.random.default_rng(0).random(len(p)) / (1 + replicates)  # between the values
    return scipy.stats.kstest(np.array(p) - jitter, "uniform").pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("check_of", [population_predictive, posterior_predictive])
def test_p_values_of_a_check_are_uniform_under_the_truth(check_of):
    """Over 500 data sets, statistics that depend on each other, and an exact guide."""
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=3, scale=0.7)
    guide, statistics = exact(model), {"mean": torch.mean, "sd": torch.std, "max": torch.max}
    p = []
    for seed in range(500):
        torch.manual_seed(2000 + seed)
        data = as_test(model.simulate(10)["x"])
        result = check_of(model, guide, data, seed=seed, replicates=19, statistics=statistics)
        p.append(result.p)
    assert uniform(p, 19)
    assert not uniform(np.array(p) ** 1.3, 19)  # the test would see a check that is too eager


@pytest.mark.slow
def test_p_values_of_a_prior_predictive_check_are_uniform_under_the_truth():
    torch.manual_seed(0)
    model, p = Template.toy(), []
    for seed in range(200):
        torch.manual_seed(3000 + seed)
        data = as_test(model.simulate(5)["x"])
        result = prior_predictive(
            model, None, data, seed=seed, replicates=19, statistics={"mean": torch.mean}
        )
        p.append(result.p)
    assert uniform(p, 19)


def test_the_prior_predictive_check_draws_global_latents_from_their_prior():
    torch.manual_seed(0)
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    with torch.no_grad():
        guide.global_guide.locs.w.fill_(3.0)
        guide.global_guide.scales.w = torch.full((4,), 1e-3)
    x = model.simulate(200)["x"]
    narrow = population_predictive(model, guide, as_test(x), replicates=ENOUGH)
    wide = prior_predictive(model, guide, as_test(x), replicates=ENOUGH)
    assert by_name(narrow)["mean"]["verdict"] == "fail"  # a w of 3 emits more
    assert by_name(wide)["mean"]["verdict"] == "pass"
    ratio = by_name(wide)["mean"]["replicated_sd"] / by_name(narrow)["mean"]["replicated_sd"]
    assert ratio > 3
    with pytest.raises(NotApplicable, match="no global latent"):
        prior_predictive(*ppca(), as_test(torch.zeros(20, 4)))


def test_the_posterior_predictive_check_finds_noise_of_the_wrong_size():
    """Rows' latents are right, and the noise is not: spread is all that shows it."""
    torch.manual_seed(0)
    truth, wrong = (PPCA(latents=2, observed=8, scale=s) for s in (0.7, 0.8))
    wrong.load_state_dict(truth.state_dict() | {"likelihood.log_scale": torch.tensor(0.8).log()})
    x = truth.simulate(500)["x"]
    right = posterior_predictive(truth, exact(truth), as_test(x), replicates=ENOUGH)
    assert right.verdict == "pass"
    found = posterior_predictive(wrong, exact(wrong), as_test(x), replicates=ENOUGH)
    assert found.verdict == "fail"
    assert "standard deviation too high" in found.meaning
    assert by_name(found)["mean"]["verdict"] == "pass"


def test_replicates_of_the_posterior_have_one_draw_of_the_latents():
    """Given the latents, x ~ Normal(W z + mu, s): all replicates of a row have one mean."""
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=3, scale=0.7)
    x = model.simulate(2)["x"]
    result = posterior_predictive(
        model,
        exact(model),
        as_test(x),
        replicates=2000,
        statistics={"first": lambda x: x[0, 0], "second": lambda x: x[1, 0]},
    )
    for record in result.statistics:  # with latents drawn anew it would be larger
        assert record["replicated_sd"] == pytest.approx(0.7, rel=0.06)


@pytest.mark.slow
def test_the_family_wise_error_rate_is_as_stated(pair):
    model, guide = pair
    fails = 0
    for seed in range(200):
        torch.manual_seed(5000 + seed)
        data = as_test(model.simulate(50)["x"])
        result = population_predictive(model, guide, data, seed=seed, replicates=ENOUGH)
        fails += result.verdict == "fail"
    assert fails / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize(
    ("fault", "statistic", "direction"),
    [
        (lambda x: x + 0.3, "mean", "mean too low"),
        (lambda x: x - 0.3, "mean", "mean too high"),
        (lambda x: 1.3 * (x - x.mean(0)) + x.mean(0), "standard deviation", "deviation too low"),
        (lambda x: 0.7 * (x - x.mean(0)) + x.mean(0), "standard deviation", "deviation too high"),
    ],
)
def test_faults_are_found_on_both_sides(pair, truth, fault, statistic, direction):
    model, guide = pair
    result = population_predictive(model, guide, as_test(fault(truth)), replicates=ENOUGH)
    assert result.verdict == "fail"
    assert not result.passed
    assert by_name(result)[statistic]["verdict"] == "fail"
    assert direction in result.meaning


def test_lost_dependence_is_found_by_its_statistic_alone(pair, truth):
    model, guide = pair
    x = truth.clone()
    generator = torch.Generator().manual_seed(0)
    for column in range(x.shape[1]):
        x[:, column] = x[torch.randperm(len(x), generator=generator), column]
    records = by_name(population_predictive(model, guide, as_test(x), replicates=ENOUGH))
    assert records["neighbor correlation"]["verdict"] == "fail"
    assert records["mean"]["verdict"] == "pass"
    assert records["standard deviation"]["verdict"] == "pass"


def test_the_truth_passes(pair, truth):
    result = population_predictive(*pair, as_test(truth), replicates=ENOUGH)
    assert result.verdict == "pass"
    assert result.error_rate == 0.05
    assert by_name(result)["mean"]["observed"] == pytest.approx(truth.double().mean().item())


def test_statistics_that_say_nothing_are_not_applicable():
    model, guide = ppca(observed=1)
    torch.manual_seed(1)
    x = model.simulate(50)["x"]
    own = {
        "fraction of zeros": zeros,
        "neighbor correlation": neighbor_correlation,
        "mean": torch.mean,
    }
    result = population_predictive(model, guide, as_test(x), replicates=ENOUGH, statistics=own)
    records = by_name(result)
    assert records["neighbor correlation"]["verdict"] == "not applicable"
    assert "nan in the data" in records["neighbor correlation"]["note"]
    assert records["fraction of zeros"]["verdict"] == "not applicable"
    assert "0 in the data and in every" in records["fraction of zeros"]["note"]
    assert "Not computable: neighbor correlation." in result.meaning
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["statistics"][0]["p"] is None
    with pytest.raises(ValueError, match="no statistic is applicable"):
        population_predictive(
            model, guide, as_test(x), statistics={"nothing": lambda x: torch.tensor(torch.nan)}
        )


def test_zeros_in_the_data_that_the_model_never_emits_fail(pair, truth):
    x = truth.clone()
    x[:5, 0] = 0
    records = by_name(population_predictive(*pair, as_test(x), replicates=ENOUGH))
    assert records["fraction of zeros"]["verdict"] == "fail"


def test_statistics_of_the_user(pair, truth):
    def last_column(x):
        assert x.dtype == torch.float64
        return x[:, -1].median()

    result = population_predictive(*pair, as_test(truth), statistics={"last": last_column})
    assert [r["statistic"] for r in result.statistics] == ["last"]
    assert result.statistics[0]["observed"] == pytest.approx(truth[:, -1].median().item())
    with pytest.raises(ValueError, match=r"'by column' of the data is a tensor \(4,\)"):
        population_predictive(*pair, as_test(truth), statistics={"by column": lambda x: x.mean(0)})
    with pytest.raises(ValueError, match="'text' of the data is 'many'"):
        population_predictive(*pair, as_test(truth), statistics={"text": lambda x: "many"})


def test_settings_that_cannot_work_are_refused(pair, truth):
    data = as_test(truth)
    with pytest.raises(ValueError, match="even the worst model would pass; expected at least 19"):
        population_predictive(*pair, data, replicates=18)
    with pytest.raises(ValueError, match="level=5"):
        population_predictive(*pair, data, level=5)
    with pytest.raises(ValueError, match="rows=1"):
        population_predictive(*pair, data, rows=1)
    with pytest.raises(ValueError, match="statistics is empty"):
        population_predictive(*pair, data, statistics={})
    with pytest.raises(ValueError, match="no observable 'y' in these data, only x"):
        population_predictive(*pair, data, site="y")


def test_as_many_replicates_as_can_just_fail(pair, truth):
    result = population_predictive(*pair, as_test(truth + 5), replicates=19)
    assert by_name(result)["mean"]["p_adjusted"] == pytest.approx(0.05)
    assert result.p == pytest.approx(0.05)
    assert result.verdict == "fail"


def test_a_model_that_has_diverged_is_an_error(truth):
    model, guide = ppca()
    with torch.no_grad():
        model.likelihood.net.bias[1] = torch.inf
    with pytest.raises(ValueError, match="replicate 0: PPCA emits inf at site 'x'"):
        population_predictive(model, guide, as_test(truth))


def test_global_latents_come_from_the_guide():
    torch.manual_seed(0)
    model = Template.toy()
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    with torch.no_grad():
        guide.global_guide.locs.w.fill_(3.0)
        guide.global_guide.scales.w = torch.full((4,), 1e-3)
    x = torch.poisson(torch.full((200, 4), 3.0))
    record = by_name(population_predictive(model, guide, as_test(x), replicates=ENOUGH))["mean"]
    with torch.no_grad():
        z = model.z_dist().sample((20000,))
        expected = model.x_dist(torch.full((4,), 3.0), z).mean.mean().item()
    assert record["replicated_mean"] == pytest.approx(expected, rel=0.02)
    assert record["replicated_sd"] < 0.3  # w ~ Normal(0, 1) would give more than 0.4


def test_runs_stay_small(pair, truth, monkeypatch):
    model, guide = pair
    monkeypatch.setattr(draws, "_ROWS_AT_ONCE", 64)
    sizes = []
    hook = model.likelihood.net.register_forward_hook(lambda m, i, out: sizes.append(len(out)))
    result = population_predictive(
        model, guide, as_test(truth[:100]), replicates=50, statistics={"mean": torch.mean}
    )
    hook.remove()
    assert (sizes.count(64), sizes.count(36)) == (50, 50)  # 100 rows a replicate
    assert max(sizes) == 100  # reading the sites
    values = result.groups["population_predictive_statistics"]["mean"].values
    assert values.shape == (1, 50)
    assert len(np.unique(values)) == 50


def test_repeatable_and_leaves_the_random_state(pair, truth):
    state = torch.get_rng_state()
    a, b, c = (
        population_predictive(*pair, as_test(truth), seed=s, rows=100, replicates=ENOUGH)
        for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert a.to_json() == b.to_json()
    assert a.to_json() != c.to_json()
    assert a.settings["rows"] == 100


def test_plot_shows_each_statistic_and_the_data(pair, truth):
    import matplotlib.pyplot as plt

    result = population_predictive(*pair, as_test(truth + 0.5), replicates=ENOUGH)
    figure = result.plot()
    assert not plt.get_fignums()
    shown = {ax.get_title().split("\n")[0]: ax for ax in figure.axes if ax.get_title()}
    applicable = [r for r in result.statistics if r["verdict"] != "not applicable"]
    assert set(shown) == {r["statistic"] for r in applicable}
    for record in applicable:
        *_, line = shown[record["statistic"]].lines
        assert list(line.get_xdata()) == [record["observed"]] * 2
        assert (line.get_color() == "C3") == (record["verdict"] == "fail")


def test_plot_of_replicates_that_are_all_the_same(pair, truth):
    x = truth.clone()
    x[:5, 0] = 0
    result = population_predictive(*pair, as_test(x), statistics={"zeros": zeros}, replicates=50)
    assert result.plot().axes


def test_check_reports_and_saves(pair, truth, tmp_path):
    report = check(
        *pair,
        as_test(truth),
        seed=2,
        out=tmp_path,
        only=["support", "population_predictive", "posterior_predictive", "label_calibration"],
        population_predictive={"replicates": ENOUGH},
        posterior_predictive={"replicates": ENOUGH},
        to_arviz={"rows": 5, "draws": 6},
    )
    assert report.passed
    names = ["support", "population_predictive", "posterior_predictive"]
    assert [r.name for r in report.results] == names
    assert set(report.skipped) == {"label_calibration"}
    assert report.idata["posterior"].sizes["draw"] == 6
    assert report.idata["population_predictive_statistics"].sizes["draw"] == ENOUGH
    saved = json.loads((tmp_path / "check.json").read_text())
    assert saved == report.to_json()
    rates = [one["error_rate"] for one in saved["checks"]]
    assert rates == pytest.approx([0, 0.05 / 3, 0.05 / 3])  # the third chance enters is skipped
    assert saved["settings"]["seed"] == 2
    with xarray.open_datatree(tmp_path / "idata.nc", engine="h5netcdf") as back:
        assert back.identical(report.idata)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "check.json",
        "idata.nc",
        "index.html",
        "population_predictive.png",
        "population_predictive-x-pit.png",
        "posterior_predictive.png",
        "posterior_predictive-x-pit.png",
    }
    assert "population_predictive: pass" in str(report)


def test_draws_keep_their_groups_beside_the_statistics_of_the_checks():
    torch.manual_seed(0)
    model = Template.toy()  # with a global latent, so that both checks apply
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    names = ["prior_predictive", "posterior_predictive"]
    report = check(
        model,
        guide,
        as_test(model.simulate(20)["x"]),
        only=names,
        to_arviz={"rows": 5, "draws": 6},
        **{name: {"replicates": ENOUGH} for name in names},
    )
    for name in names:
        assert report.idata[name]["x"].shape == (1, 6, 5, 4)
        assert report.idata[f"{name}_statistics"]["mean"].shape == (1, ENOUGH)


def test_a_failed_save_leaves_the_earlier_report(pair, truth, tmp_path, monkeypatch):
    options: dict[str, Any] = {
        "only": ["population_predictive"],
        "population_predictive": {"replicates": ENOUGH},
        "to_arviz": {"rows": 5, "draws": 2},
    }
    report = check(*pair, as_test(truth), out=tmp_path, **options)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def half(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(xarray.DataTree, "to_netcdf", half)
    with pytest.raises(OSError, match="disk full"):
        report.save(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_unknown_checks_are_refused(pair, truth):
    with pytest.raises(ValueError, match="no check 'sbc', only support"):
        check(*pair, as_test(truth), only=["sbc"])
    with pytest.raises(ValueError, match="no check 'predictiv'"):
        check(*pair, as_test(truth), predictiv={})
