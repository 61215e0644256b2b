from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ppl_vae.checks.statistics import (
    OF_ROWS,
    STATISTICS,
    distance_to,
    frequencies,
    holm,
    max_adjusted,
    mean_below,
    p_value,
    told_apart,
    whole_numbers,
    zeros,
)


def test_default_statistics_by_hand():
    x = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0], [4.0, 8.0, 5.0]], dtype=torch.float64)
    every = {**STATISTICS, **OF_ROWS}
    values = {name: float(statistic(x)) for name, statistic in every.items()}
    totals = np.array([6.0, 10.0, 17.0])
    assert values == pytest.approx(
        {
            "mean": x.numpy().mean(),
            "standard deviation": x.numpy().std(ddof=1),
            "mean deviation of a column": x.numpy().std(0, ddof=1).mean(),
            "fraction of zeros": 1 / 9,
            "fraction of whole numbers": 1.0,
            "smallest entry": 0.0,
            "largest entry": 8.0,
            "spread of row totals": totals.std(ddof=1),
            "smallest row total": 6.0,
            "largest row total": 17.0,
            # The third column does not vary: one pair is left.
            "neighbor correlation": np.corrcoef(x[:, 0], x[:, 1])[0, 1],
            "pairwise correlation": np.corrcoef(x[:, 0], x[:, 1])[0, 1],
        }
    )


def test_p_value_by_hand():
    replicated = np.arange(9.0)
    assert p_value(100.0, replicated)[0] == pytest.approx(2 * 1 / 10)
    assert p_value(-100.0, replicated)[0] == pytest.approx(2 * 1 / 10)
    assert p_value(8.0, replicated)[0] == pytest.approx(2 * 2 / 10)  # a tie counts against
    assert p_value(4.0, replicated)[0] == 1.0
    assert p_value(1.0, np.ones(9))[0] == 1.0
    assert p_value(100.0, replicated)[1] == pytest.approx(2 * np.sqrt(0.1 * 0.9 / 9))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_statistics_of_labels_and_of_training_rows_by_hand():
    y = torch.eye(3)[[0, 0, 2, 1]].double()
    assert [float(own(y)) for own in frequencies(3).values()] == [0.5, 0.25, 0.25]
    assert float(whole_numbers(torch.tensor([[1.0, 2.5], [-3.0, 0.0]]))) == 0.75
    once = torch.full((2000, 1), 0.5)
    once[0] = 0
    assert float(zeros(once)) == float(whole_numbers(once)) == 0  # by rounding, not by nature
    once[:2] = 0
    assert float(zeros(once)) == float(whole_numbers(once)) == pytest.approx(1e-3)
    train = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    x = torch.tensor([[0.0, 1.0], [10.0, 3.0]]).double()
    assert float(distance_to(train)(x)) == 2.0


def test_a_classifier_tells_what_differs():
    """Two normals a distance d apart: the true log-odds of a row are d (x - d / 2)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, generator=generator).double()
    shift = torch.tensor([1.0, 0.0]).double()
    score = told_apart(noise[:1500] + shift, noise[1500:3000], seed=0)
    assert float(score(noise[3000:] + shift)) == pytest.approx(0.5, abs=0.15)
    assert float(score(noise[3000:])) == pytest.approx(-0.5, abs=0.15)


def test_largest_deviation_by_hand():
    replicated = np.array([[0.0, 0.0], [1.0, 4.0], [2.0, 8.0], [1.0, 4.0]])
    # The second is the first, times 4: 9 and 36 are as far off, farther than any replicate.
    assert max_adjusted(np.array([9.0, 36.0]), replicated) == pytest.approx([1 / 5, 1 / 5])
    # In the middle, every replicate is at least as far off.
    assert max_adjusted(np.array([1.0, 4.0]), replicated) == pytest.approx([1.0, 1.0])
    # What never varies says nothing, and does not disturb the other.
    assert max_adjusted(np.array([9.0, 3.0]), np.full((4, 2), [1.0, 3.0]))[1] == 1.0


def test_largest_deviation_keeps_its_level_and_finds_what_one_statistic_shows():
    """Against the exact law: of exchangeable vectors, p <= a with probability floor(a (R + 1)) /
    (R + 1), however the statistics depend on each other."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(20, 20))
    p = [
        max_adjusted(every[0], every[1:]).min()
        for every in (rng.standard_t(4, size=(100, 20)) @ mix for _ in range(2000))
    ]
    for level in (0.01, 0.05, 0.1, 0.5):
        error = np.sqrt(level * (1 - level) / 2000)
        assert np.mean(np.array(p) <= level + 1e-9) == pytest.approx(level, abs=3.5 * error)
    one_off = np.zeros(20)
    one_off[7] = 6.0
    adjusted = max_adjusted(one_off, rng.normal(size=(199, 20)))
    assert adjusted[7] == pytest.approx(1 / 200)
    assert np.delete(adjusted, 7).min() > 0.5


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_statistic_that_is_not_finite_leaves_the_others_as_they_are(strange):
    stream = np.random.default_rng(0)
    observed, replicated = stream.normal(size=2), stream.normal(size=(99, 2))
    others = max_adjusted(observed, replicated)
    for row in (None, 5):
        own = np.insert(observed, 1, 0.0), np.insert(replicated, 1, 0.0, axis=1)
        if row is None:
            own[0][1] = strange
        else:
            own[1][row, 1] = strange
        assert max_adjusted(*own).tolist() == [others[0], 1.0, others[1]]


def test_means_below_a_bound():
    """Of values that are not skewed, Student's t; without any spread, certain."""
    rng = np.random.default_rng(0)
    half = rng.normal(0.3, 1.0, 20)
    x = np.concatenate([half, 2 * half.mean() - half])  # symmetric about its mean
    expected = scipy.stats.ttest_1samp(x, 0.5, alternative="less").pvalue
    assert mean_below(x, 0.5) == pytest.approx(expected)
    assert mean_below(np.full(5, 0.1), 0.2) == 0.0
    assert mean_below(np.full(5, 0.2), 0.2) == 1.0
    # Far below, however skewed: a correction that turned back would say nothing was found.
    assert mean_below(rng.exponential(1e-4, 50) ** 2, 0.05) < 1e-6


@pytest.mark.parametrize(("rows", "share"), [(1000, 0.02), (200, 0.1), (100, 0.1)])
@pytest.mark.parametrize("level", [0.0045, 0.05])
def test_means_of_skewed_values_are_not_found_too_small_too_often(rows, share, level):
    """All or nothing: the exact error rate, summed over how many of the rows have it all."""
    rate, plain = 0.0, 0.0
    for count in range(rows):
        probability = scipy.stats.binom.pmf(count, rows, share)
        if probability < 1e-9:
            continue
        x = np.repeat([1 / share, 0.0], [count, rows - count])  # of mean 1 in expectation
        rate += probability * (mean_below(x, 1.0) <= level)
        if count:
            test = scipy.stats.ttest_1samp(x, 1.0, alternative="less")
            plain += probability * (test.pvalue <= level)
    assert rate <= level
    assert plain > level
