"""Anomaly scores of PPCA, whose evidence is known."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.conjugate import exact
from ppl_vae.data import as_dataset
from ppl_vae.models.ppca import PPCA
from ppl_vae.uses import anomaly_scores, detection
from ppl_vae.uses.anomaly import compressed

N = 1500


@pytest.fixture
def model(float64):
    torch.manual_seed(3)
    return PPCA(2, 5, scale=0.7).requires_grad_(False)


@pytest.fixture
def inliers(model):
    torch.manual_seed(4)
    return as_dataset({"train": model.simulate(N)["x"], "test": model.simulate(N)["x"]})


def among(inliers, x):
    return replace(inliers, splits={"train": {"x": x[:2]}, "test": {"x": x}})


def covariance(model):
    weight, loc, scale = model._linear_map()
    return loc, weight @ weight.T + scale**2 * torch.eye(5)


def test_scores_are_those_of_the_closed_form(model, inliers):
    x = inliers.splits["test"]["x"]
    found = anomaly_scores(model, exact(model), inliers, samples=3).scores
    evidence = model.evidence(x)
    typical = model.evidence(inliers.splits["train"]["x"])
    torch.testing.assert_close(found["evidence"], -evidence)
    torch.testing.assert_close(found["elbo"], -evidence)  # the guide is exact
    torch.testing.assert_close(found["kl"] + found["reconstruction"], -evidence)
    wanted = (evidence - typical.mean()).abs()
    error = 6 * typical.std() / math.sqrt(1000)  # of some of the training rows
    torch.testing.assert_close(found["typicality"], wanted, atol=float(error), rtol=0)
    q = model.posterior(x)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    kl = torch.distributions.kl_divergence(q, prior)
    assert abs(float((found["kl"] - kl).mean())) < 4 * float((found["kl"] - kl).std()) / N**0.5


@pytest.mark.parametrize("fault", ["wider", "shifted"])
def test_the_area_is_that_of_the_law_of_the_evidence(model, inliers, fault):
    """Outliers from another Gaussian: the exact area, from the law of log p(x) by simulation."""
    loc, own = covariance(model)
    shift = torch.tensor([1.0, -0.5, 0.5, 0.0, 0.8]) if fault == "shifted" else torch.zeros(5)
    spread = own * 2.0 if fault == "wider" else own
    law = torch.distributions.MultivariateNormal(loc + shift, spread)
    outliers = among(inliers, law.sample((N,)))
    guide = exact(model)
    inside, outside = (
        anomaly_scores(model, guide, data, samples=2, reference=inliers)
        for data in (inliers, outliers)
    )
    found = detection(inside, outside, baseline="gaussian")
    # -2 log p + const is chi-square inside; outside, scaled or not central.
    stream = np.random.default_rng(0)
    many = 200_000
    within = stream.chisquare(5, many)
    noncentral = float(shift @ own.inverse() @ shift)
    beyond = (
        2 * stream.chisquare(5, many)
        if fault == "wider"
        else stream.noncentral_chisquare(5, noncentral, many)
    )
    wanted = float((np.searchsorted(np.sort(within), beyond) / many).mean())
    area = found.auroc["evidence"]
    assert abs(area.value - wanted) < 4 * area.se
    # The fitted Gaussian is the model here: nothing to gain.
    assert abs(found.gain["evidence"].value) < 0.01
    assert detection(inside, outside).baseline == "nearest"


def test_a_ratio_to_the_outliers_own_model_is_optimal(model, inliers):
    """Two Gaussians with one covariance: the optimum is Phi(d / sqrt 2), d their distance."""
    _, own = covariance(model)
    shift = torch.tensor([0.6, -0.5, 0.5, 0.0, 0.4])
    torch.manual_seed(3)
    other = PPCA(2, 5, scale=0.7).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    other.likelihood.net.bias += shift
    outliers = among(inliers, other.simulate(N)["x"])
    pair, background = (model, exact(model)), (other, exact(other))
    inside, outside = (
        anomaly_scores(*pair, data, samples=2, reference=inliers, background=background)
        for data in (inliers, outliers)
    )
    found = detection(inside, outside, baseline="mean")
    distance = float(shift @ own.inverse() @ shift) ** 0.5
    area = found.auroc["ratio"]
    assert abs(area.value - scipy.stats.norm.cdf(distance / math.sqrt(2))) < 4 * area.se
    assert found.gain["ratio"].value > 5 * found.gain["ratio"].se
    assert area.value > found.auroc["evidence"].value


def test_baselines_are_what_they_say(model, inliers):
    found = anomaly_scores(model, exact(model), inliers, samples=1).baselines
    x, train = inliers.splits["test"]["x"], inliers.splits["train"]["x"]
    torch.testing.assert_close(found["mean"], (x - train.mean(0)).square().sum(1).sqrt())
    nearest = (x[:50, None] - train).square().sum(2).min(1).values.sqrt()
    torch.testing.assert_close(found["nearest"][:50], nearest)
    loc, own = covariance(model)
    exactly = ((x - loc) @ own.inverse() * (x - loc)).sum(1) / 2
    assert np.corrcoef(found["gaussian"], exactly)[0, 1] > 0.99


def test_plain_bytes_are_smaller_than_noisy_ones():
    images = torch.zeros(2, 64, dtype=torch.uint8)
    images[1] = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    data = as_dataset({"train": images, "test": images})
    for shape, how in (((1, 8, 8), "png"), (None, "zlib")):
        sizes, name = compressed(data.split("test"), "x", shape)
        assert name == how
        assert sizes[0] < sizes[1]
    assert float(sizes[0]) == pytest.approx(8 * math.log(2) * len(zlib.compress(bytes(64), 9)))


def test_figures_and_table_show_every_score(model, inliers):
    outliers = among(inliers, 2 * inliers.splits["test"]["x"])
    inside, outside = (
        anomaly_scores(model, exact(model), data, samples=1, reference=inliers)
        for data in (inliers, outliers)
    )
    found = detection(inside, outside)
    names = [*inside.scores, *inside.baselines]
    legend = [text.get_text() for text in found.plot().legends[0].get_texts()]
    assert [text.partition(":")[0] for text in legend] == names
    titles = [ax.get_title() for ax in found.histograms().axes]
    assert len([title for title in titles if title]) == len(names)
    assert not plt.get_fignums()
    assert all(name in str(found) for name in names)


def test_what_is_refused(model, inliers):
    with pytest.raises(ValueError, match="baseline 'best'"):
        anomaly_scores(model, exact(model), inliers, baseline=["best"])
    with pytest.raises(ValueError, match="no column 't'"):
        anomaly_scores(model, exact(model), inliers, site="t")
    one, other = (
        anomaly_scores(model, exact(model), inliers, samples=1, baseline=names)
        for names in (["mean"], ["gaussian"])
    )
    with pytest.raises(ValueError, match="in the same way"):
        detection(one, other)
    with pytest.raises(ValueError, match="'nearest' was not computed"):
        detection(one, one, baseline="nearest")


def test_repeatable_and_leaves_the_random_state(model, inliers):
    state = torch.get_rng_state()
    one, two = (anomaly_scores(model, exact(model), inliers, samples=2) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.array_equal(value, two.all[name]) for name, value in one.all.items())
