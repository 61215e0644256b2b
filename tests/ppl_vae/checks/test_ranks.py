from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from ppl_vae.checks.ranks import band, coverage, ecdf, polynomials, smooth_test

DRAWS = 39


def narrow(scale, rows, seed):
    """Ranks among draws of a normal guide whose scale is off by a factor."""
    stream = np.random.default_rng(seed)
    pit = scipy.stats.norm.cdf(stream.standard_normal(rows) / scale)
    return stream.binomial(DRAWS, pit)


@pytest.mark.parametrize("draws", [4, 5, 39, 99])
def test_polynomials_are_orthonormal_on_the_ranks(draws):
    phi = polynomials(draws)
    np.testing.assert_allclose(phi @ phi.T / (draws + 1), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(phi.mean(1), 0, atol=1e-12)
    assert phi[0, -1] > 0  # high ranks
    assert min(phi[1, 0], phi[1, -1]) > 0  # both ends


@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize(("level", "most"), [(0.05, 1.1), (0.01, 1.2), (0.001, 1.6)])
def test_uniform_ranks_are_refused_as_often_as_stated(rows, level, most):
    replicates = 60_000
    stream = np.random.default_rng(0)
    p = np.full(DRAWS + 1, 1 / (DRAWS + 1))
    counts = stream.multinomial(rows, p, size=replicates)
    components = counts @ polynomials(DRAWS).T / np.sqrt(rows)
    found = (scipy.stats.chi2.sf((components**2).sum(1), 4) <= level).mean()
    assert found < most * level + 3 * np.sqrt(level / replicates)
    assert found > 0.6 * level


def test_the_test_is_that_of_its_components():
    ranks = np.random.default_rng(0).integers(0, DRAWS + 1, 300)
    test = smooth_test(ranks, DRAWS)
    phi = polynomials(DRAWS)
    expected = sum(phi[:, r] for r in ranks) / np.sqrt(300)
    np.testing.assert_allclose(test.components, expected)
    assert test.p == pytest.approx(scipy.stats.chi2.sf((expected**2).sum(), 4))


@pytest.mark.parametrize("scale", [0.75, 1.25])
def test_a_scale_that_is_off_by_a_quarter_is_found(scale):
    found = [smooth_test(narrow(scale, 500, seed), DRAWS) for seed in range(100)]
    assert np.mean([test.p < 1e-4 for test in found]) > 0.8
    assert np.mean([(test.components[1] > 0) == (scale < 1) for test in found]) == 1


def test_a_shift_of_a_third_is_found():
    stream = np.random.default_rng(0)
    pit = scipy.stats.norm.cdf(stream.standard_normal((100, 500)) - 0.3)
    found = [smooth_test(stream.binomial(DRAWS, row), DRAWS) for row in pit]
    assert np.mean([test.p < 1e-4 for test in found]) > 0.9
    assert all(test.components[0] < 0 for test in found)


@pytest.mark.parametrize("highest", [False, True])
def test_every_rank_once_has_nominal_coverage(highest):
    nominal = np.linspace(0, 1, 23)
    found = coverage(np.arange(DRAWS + 1), DRAWS, nominal, highest=highest)
    np.testing.assert_allclose(found, nominal, atol=1e-12)


def test_coverage_of_a_scale_that_is_off_is_as_computed():
    """Of a central interval of a normal: the probability of its bounds under the true scale."""
    found = coverage(narrow(0.75, 200_000, 0), DRAWS, 0.5)
    exact = 2 * scipy.stats.norm.cdf(0.75 * scipy.stats.norm.ppf(0.75)) - 1
    assert found == pytest.approx(exact, abs=0.012)  # ranks of few draws are a little off


def test_highest_ranks():
    ranks = np.array([0, DRAWS, DRAWS, DRAWS])
    assert coverage(ranks, DRAWS, 0.5, highest=True) == pytest.approx(0.75)
    assert coverage(ranks, DRAWS, 0.5) == 0


def test_uniform_ranks_keep_the_band_as_often_as_stated():
    low, high = band(300, DRAWS, 0.9)
    stream = np.random.default_rng(1)
    ranks = stream.integers(0, DRAWS + 1, (2000, 300))
    inside = np.mean(
        [((f >= low) & (f <= high)).all() for f in (ecdf(row, DRAWS) for row in ranks)]
    )
    assert inside == pytest.approx(0.9, abs=0.03)
