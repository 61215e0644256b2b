"""Areas under ROC curves against closed forms, scikit-learn and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from ppl_vae.detection import auroc, auroc_difference, roc

STREAM = np.random.default_rng(0)
INSIDE, OUTSIDE = STREAM.normal(size=300), STREAM.normal(size=200) + 1.0


def reference(inside, outside):
    return roc_auc_score(
        np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
    )


@pytest.mark.parametrize("digits", [8, 0])
def test_the_area_is_that_of_scikit_learn_ties_included(digits):
    inside, outside = INSIDE.round(digits), OUTSIDE.round(digits)
    assert auroc(inside, outside).value == pytest.approx(reference(inside, outside))
    x, y = roc(inside, outside)
    assert np.trapezoid(y, x) == pytest.approx(reference(inside, outside))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_the_area_between_two_normals_is_in_closed_form():
    found = auroc(STREAM.normal(size=20_000), STREAM.normal(size=20_000) + 1.0)
    assert abs(found.value - scipy.stats.norm.cdf(1 / math.sqrt(2))) < 4 * found.se


def test_the_standard_error_is_that_of_new_data():
    drawn = [auroc(STREAM.normal(size=60), STREAM.normal(size=40) + 1.0) for _ in range(2000)]
    spread = np.std([one.value for one in drawn], ddof=1)
    assert np.mean([one.se for one in drawn]) == pytest.approx(spread, rel=0.06)


def test_the_standard_error_is_that_of_the_bootstrap():
    again = [reference(STREAM.choice(INSIDE, 300), STREAM.choice(OUTSIDE, 200)) for _ in range(500)]
    assert auroc(INSIDE, OUTSIDE).se == pytest.approx(np.std(again), rel=0.12)


def test_a_difference_knows_that_scores_are_of_the_same_rows():
    differences, errors = [], []
    for _ in range(1000):
        inside, outside = STREAM.normal(size=60), STREAM.normal(size=60) + 1.0
        noisy = [v + 0.5 * STREAM.normal(size=60) for v in (inside, outside)]
        found = auroc_difference((inside, outside), (noisy[0], noisy[1]))
        differences.append(found.value)
        errors.append(found.se)
    assert np.mean(errors) == pytest.approx(np.std(differences, ddof=1), rel=0.1)
    wanted = scipy.stats.norm.cdf(1 / math.sqrt(2)) - scipy.stats.norm.cdf(1 / math.sqrt(2.5))
    assert np.mean(differences) == pytest.approx(wanted, abs=4 * np.std(differences) / 31)


def test_what_is_refused():
    with pytest.raises(ValueError, match="inliers are 1 rows"):
        auroc(INSIDE[:1], OUTSIDE)
    with pytest.raises(ValueError, match="no nan"):
        auroc(INSIDE, np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="different numbers"):
        auroc_difference((INSIDE, OUTSIDE), (INSIDE, INSIDE))
