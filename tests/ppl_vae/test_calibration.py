"""Scores of predicted probabilities: against scikit-learn, cases by hand, simulated predictors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from ppl_vae.calibration import (
    LabelScores,
    checked,
    expected_calibration_error,
    reliability,
)


def predictor(rows: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels that are drawn from them."""
    stream = np.random.RandomState(seed)
    p = stream.dirichlet(np.full(classes, 0.6), rows)
    labels = (p.cumsum(1) < stream.random_sample((rows, 1))).sum(1).clip(max=classes - 1)
    return torch.from_numpy(p), torch.from_numpy(labels)


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    p, labels = predictor(300, classes)
    found = LabelScores.of(p, labels)
    every = range(classes)
    assert found.log_loss == pytest.approx(sklearn.metrics.log_loss(labels, p, labels=list(every)))
    right = sklearn.metrics.accuracy_score(labels, p.argmax(1))
    assert found.accuracy == pytest.approx(right)
    assert found.accuracy_se == pytest.approx(math.sqrt(right * (1 - right) / 299))
    # Theirs is of one class; over all classes each is counted.
    each = [sklearn.metrics.brier_score_loss(labels == k, p[:, k]) for k in every]
    assert found.brier == pytest.approx(sum(each))
    if classes == 2:
        assert found.brier == pytest.approx(2 * each[1])
    assert found.rows == 300
    assert found.calibration_error == expected_calibration_error(p, labels, bins=15)


def test_scores_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5], [0.9, 0.1, 0.0]])
    found = LabelScores.of(p, torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 0.75
    assert found.accuracy_se == pytest.approx(0.25)
    expected = -(math.log(0.5) + math.log(0.25) + math.log(0.9)) / 4
    assert found.log_loss == pytest.approx(expected, abs=1e-7)
    brier = (0.25 + 2 * 0.0625 + 0.0 + 0.0625 + 0.5625 + 0.25 + 2 * 0.01) / 4
    assert found.brier == pytest.approx(brier, abs=1e-7)


def test_the_extremes() -> None:
    sure = torch.eye(3)[[0, 1]]
    best = LabelScores.of(sure, torch.tensor([0, 1]))
    assert (best.accuracy, best.log_loss, best.brier, best.calibration_error) == (
        1.0,
        0.0,
        0.0,
        0.0,
    )
    worst = LabelScores.of(sure, torch.tensor([2, 2]))
    assert (worst.accuracy, worst.brier, worst.calibration_error) == (0.0, 2.0, 1.0)
    assert worst.log_loss == math.inf
    one = LabelScores.of(sure[:1], torch.tensor([0]))
    assert math.isnan(one.accuracy_se)


def test_reliability_by_hand() -> None:
    p = torch.tensor([[0.6, 0.4], [0.35, 0.65], [0.95, 0.05], [1.0, 0.0], [0.09, 0.91]])
    found = reliability(p.double(), torch.tensor([0, 0, 0, 1, 1]), bins=10)
    assert found.rows.tolist() == [2, 3]
    np.testing.assert_allclose(found.confidence, [0.625, (0.95 + 1 + 0.91) / 3])
    np.testing.assert_allclose(found.accuracy, [0.5, 2 / 3])
    error = (2 * 0.125 + 3 * ((0.95 + 1 + 0.91) / 3 - 2 / 3)) / 5
    assert expected_calibration_error(p, torch.tensor([0, 0, 0, 1, 1]), 10) == pytest.approx(error)


def test_in_one_bin_the_error_is_that_of_the_means() -> None:
    p, labels = predictor(500)
    gap = abs(float(p.max(1).values.mean()) - float((p.argmax(1) == labels).double().mean()))
    assert expected_calibration_error(p, labels, bins=1) == pytest.approx(gap)


def test_the_error_of_right_probabilities_goes_to_0() -> None:
    errors = [expected_calibration_error(*predictor(rows)) for rows in (300, 10_000, 300_000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.003


def test_the_error_of_an_overconfident_predictor_is_known() -> None:
    """It says 0.95, and is right in 70 of 100 rows; and where it says 0.55, it is right."""
    stream = np.random.RandomState(1)
    rows = 200_000
    sure = stream.random_sample(rows) < 0.4
    chance = np.where(sure, 0.7, 0.55)
    said = np.where(sure, 0.95, 0.55)
    p = np.stack([1 - said, said], 1)
    right = stream.random_sample(rows) < chance
    error = expected_calibration_error(torch.from_numpy(p), torch.from_numpy(right.astype(int)))
    assert error == pytest.approx(0.4 * 0.25, abs=0.005)


@pytest.mark.parametrize("power", [2.0, 0.5])
def test_sharpened_or_flattened_probabilities_are_off(power: float) -> None:
    """By as much as confidence is from the true chance of being right."""
    p, labels = predictor(200_000, 3, seed=2)
    q = p**power / (p**power).sum(1, keepdim=True)
    chance, said = p.gather(1, q.argmax(1, keepdim=True)).squeeze(1), q.max(1).values
    # Sharper ones are everywhere too sure, flatter ones nowhere: bins lose nothing.
    expected = float((said - chance).mean().abs())
    assert expected > 0.05
    assert expected_calibration_error(q, labels) == pytest.approx(expected, abs=0.005)


GOOD = torch.tensor([[0.5, 0.5], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        pytest.param(
            torch.tensor([[0.5, 0.5], [0.2, 0.7]]),
            torch.tensor([0, 1]),
            r"row 1 has probabilities that sum to 0\.9, .*a sum of 1",
            id="sum",
        ),
        pytest.param(
            torch.tensor([[1.2, -0.2], [0.2, 0.8]]),
            torch.tensor([0, 1]),
            r"row 0 .* the smallest -0\.2: expected at least 0",
            id="negative",
        ),
        pytest.param(
            torch.tensor([[math.nan, 0.5], [0.2, 0.8]]), torch.tensor([0, 1]), "row 0", id="nan"
        ),
        pytest.param(GOOD.log(), torch.tensor([0, 1]), "row 0 .* sum to -", id="logits"),
        pytest.param(GOOD, torch.tensor([0, 2]), "labels from 0 to 2.* from 0 to 1", id="above"),
        pytest.param(GOOD, torch.tensor([-1, 1]), "labels from -1 to 1", id="withheld"),
        pytest.param(GOOD, GOOD[:, 0], r"torch\.float32: expected int64", id="soft"),
        pytest.param(GOOD, GOOD, r"labels of shape \(2, 2\): expected \(rows, K\)", id="one-hot"),
        pytest.param(GOOD[0], torch.tensor([0]), r"shape \(2,\)", id="vector"),
        pytest.param(GOOD[:0], torch.tensor([]).long(), "at least one row", id="none"),
    ],
)
def test_what_are_no_probabilities_or_labels_is_refused(p: Tensor, labels: Tensor, message: str):
    for score in (LabelScores.of, reliability, expected_calibration_error, checked):
        with pytest.raises(ValueError, match=message):
            score(p, labels)


def test_bins_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reliability\(bins=0\): expected at least 1"):
        expected_calibration_error(GOOD, torch.tensor([0, 1]), bins=0)


def test_probabilities_of_float32_and_with_a_gradient_are_taken() -> None:
    p, labels = predictor(200)
    single = p.float().requires_grad_()
    found, expected = LabelScores.of(single, labels), LabelScores.of(p, labels)
    assert found.log_loss == pytest.approx(expected.log_loss, rel=1e-5)
    assert checked(single, labels)[0].dtype == torch.float64
