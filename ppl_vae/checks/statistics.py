"""Statistics of a data set, and the p-values that say how unusual they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

Statistic = Callable[[Tensor], Tensor | float]
"""A number of a data set ``(rows, D)``, in float64."""

_COLUMNS = 100  # that are compared pair by pair
_ROWS = 200  # whose nearest neighbors are looked for
_NEIGHBORS = 2000  # among which
_RARE = 1e-3  # fraction of entries


def zeros(x: Tensor) -> Tensor:
    """Fraction of entries that are exactly 0: sparsity; below one in a thousand it counts as 0."""
    return _unless_rare((x == 0).double().mean())


def whole_numbers(x: Tensor) -> Tensor:
    """Fraction of entries that are whole numbers: counts are, and draws of a density are not.

    Below one in a thousand it counts as 0.
    """
    return _unless_rare((x == x.round()).double().mean())


def _unless_rare(fraction: Tensor) -> Tensor:
    # A draw of a density is a whole number once in some million, by rounding. One replicate with
    # one of them would deviate by more than any other statistic can, and hide what these show.
    return torch.where(fraction < _RARE, 0.0, fraction)


def neighbor_correlation(x: Tensor) -> Tensor:
    """Mean absolute correlation, over rows, of each column with the next one: dependence.

    Pairs with a column that does not vary are left out; nan where none is left.
    """
    centered = x - x.mean(0)
    scale = centered.square().mean(0).sqrt()
    covariance = (centered[:, 1:] * centered[:, :-1]).mean(0)
    product = scale[1:] * scale[:-1]
    return (covariance / product)[product > 0].abs().mean()


def pairwise_correlation(x: Tensor) -> Tensor:
    """Mean absolute correlation, over rows, of every two of at most 100 columns.

    The columns are evenly spaced among those there are; pairs with one that does not vary are left
    out; nan where none is left.
    """
    some = x[:, torch.linspace(0, x.shape[1] - 1, min(_COLUMNS, x.shape[1])).long()]
    some = some[:, some.std(0) > 0]
    correlation = torch.corrcoef(some.T) if some.shape[1] > 1 else x.new_empty((0, 0))
    above = torch.ones_like(correlation, dtype=torch.bool).triu(1)
    return correlation[above].abs().mean()


STATISTICS: Mapping[str, Statistic] = {
    "mean": torch.mean,
    "standard deviation": torch.std,
    "mean deviation of a column": lambda x: x.std(0).mean(),
    "fraction of zeros": zeros,
    "fraction of whole numbers": whole_numbers,
    "smallest entry": torch.min,
    "largest entry": torch.max,
}
"""What is compared of every observable. The fractions have no unit, the others that of x."""

OF_ROWS: Mapping[str, Statistic] = {
    "spread of row totals": lambda x: x.sum(1).std(),
    "smallest row total": lambda x: x.sum(1).min(),
    "largest row total": lambda x: x.sum(1).max(),
    "neighbor correlation": neighbor_correlation,
    "pairwise correlation": pairwise_correlation,
}
"""What is compared too where a row has several entries. Totals are sums over a row, in the unit of
x; correlations have none."""


def frequencies(classes: int) -> dict[str, Statistic]:
    """The share of the rows that each class of one-hot labels has."""

    def of(k: int) -> Statistic:
        return lambda x: x[:, k].mean()

    return {f"frequency of class {k}": of(k) for k in range(classes)}


def distance_to(train: Tensor) -> Statistic:
    """Mean Euclidean distance of a data set's first 200 rows from their nearest of ``train``.

    A model that has learned its training rows by heart emits rows too close to them.

    Args:
        train: ``(rows, D)``, in random order: the first 2000 are taken.
    """
    train = train[:_NEIGHBORS].reshape(min(len(train), _NEIGHBORS), -1).float()
    return lambda x: torch.cdist(x[:_ROWS].float(), train.to(x.device)).amin(1).mean()


def told_apart(real: Tensor, simulated: Tensor, seed: int) -> Statistic:
    """Mean log-odds that a classifier gives a data set's rows of being real.

    The classifier, a net with one hidden layer, learns to tell real rows from simulated ones; what
    it then says of other rows is a statistic like any other, chosen to find what differs (compare
    Lopez-Paz & Oquab 2017, arXiv:1610.06545).

    Args:
        real, simulated: ``(rows, D)``; none of the rows that are compared may be among them.
        seed: of the classifier.
    """
    x = np.concatenate([rows.reshape(len(rows), -1).cpu().numpy() for rows in (real, simulated)])
    y = np.repeat([1, 0], [len(real), len(simulated)])
    net = MLPClassifier(
        (64,), learning_rate_init=0.01, early_stopping=True, max_iter=50, random_state=seed
    )
    classifier: Any = make_pipeline(StandardScaler(), net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is to find much, not all
        classifier.fit(x, y)

    def log_odds(x: Tensor) -> float:
        p = classifier.predict_proba(x.cpu().numpy())[:, 1].clip(1e-6, 1 - 1e-6)
        return float(np.log(p / (1 - p)).mean())

    return log_odds


def compute(statistics: Mapping[str, Statistic], x: Tensor, where: str) -> list[float]:
    """Each statistic of a data set ``(rows, event)``.

    Raises:
        ValueError: a statistic is not one number; it says which, and of what data.
    """
    flat = x.reshape(len(x), -1).double()
    values: list[float] = []
    for name, statistic in statistics.items():
        value = statistic(flat)
        try:
            values.append(float(value))
        except (TypeError, ValueError, RuntimeError):
            shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"statistic {name!r} of {where} is {shown}; expected one number"
            ) from None
    return values


def p_value(observed: float, replicated: np.ndarray) -> tuple[float, float]:
    """Two-sided p-value, valid for any number of replicates, and its Monte Carlo standard error.

    The error says by how much p would vary between seeds; the +1 correction already keeps the
    error rate of the test below its level.
    """
    n = len(replicated)
    low = (1 + int((replicated <= observed).sum())) / (n + 1)
    high = (1 + int((replicated >= observed).sum())) / (n + 1)
    one_sided = min(low, high)
    return min(1.0, 2 * one_sided), 2 * math.sqrt(one_sided * (1 - one_sided) / n)


def max_adjusted(observed: np.ndarray, replicated: np.ndarray) -> np.ndarray:
    """p-values of several statistics together, by the law of the largest deviation among them.

    A statistic's deviation is its distance from the mean in standard deviations, both over the data
    and all replicates alike; its p-value is the share of replicates in which *any* statistic
    deviates as much, ``(1 + count) / (1 + R)`` (Westfall & Young 1993, "Resampling-based multiple
    testing", single-step maxT). It is exact where the data are exchangeable with the replicates,
    however the statistics depend on each other; and it can be as small as ``1 / (1 + R)``, however
    many they are.

    Args:
        observed: ``(K,)``.
        replicated: ``(R, K)``.

    Returns:
        ``(K,)``; a statistic that never varies, or is somewhere not finite, has 1, and the others
        do not feel it.
    """
    every = np.concatenate([observed[None], replicated])
    every = np.where(np.isfinite(every).all(0), every, 0.0)
    scale = every.std(0)
    varies = scale > 1e-12 * np.abs(every).max(0, initial=0.0)
    deviation = np.abs(every - every.mean(0)) / np.where(varies, scale, 1.0) * varies
    largest = deviation[1:].max(1)
    # Rounding must not part what is equal.
    as_large = largest[:, None] >= deviation[0] * (1 - 1e-9)
    return np.where(varies, (1 + as_large.sum(0)) / (1 + len(replicated)), 1.0)


def check_level(level: float) -> None:
    """Refuse what is no error rate.

    Raises:
        ValueError: it says what was expected.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected an error rate between 0 and 1, such as 0.05")


def check_replicates(what: str, count: int, level: float, *, tests: int = 1) -> None:
    """Refuse so few replicates that ``tests`` times the smallest p, ``1 / (1 + count)``, is above
    the level: the check could then never fail a model.

    Raises:
        ValueError: it says how many are needed.
    """
    if count < (needed := math.ceil(tests / level) - 1):
        raise ValueError(
            f"{what}={count}: at level {level:g} even the worst model would pass; expected at "
            f"least {needed}"
        )


def mean_below(values: np.ndarray, bound: float) -> float:
    """p-value of "the mean is ``bound`` at least", one-sided, for values that may be skewed.

    Student's t of a monotone transform that takes off the skewness (Hall 1992, "On the removal of
    skewness by transformation", J. R. Stat. Soc. B 54, 221-228): with ``S = (mean - bound) / sd``
    and skewness g, of n values,

        t = sqrt(n) (S + g S^2 / 3 + g^2 S^3 / 27 + g / (6 n)).

    The plain t would find the mean of a few large values among many small ones too small, too
    often: where one in ten of 100 values is not 0, in 2.5 % of all cases instead of 0.5 %.

    Args:
        values: ``(n,)``, at least two.
    """
    n, mean = len(values), float(values.mean())
    # Rounding is no spread.
    if (sd := float(values.std(ddof=1))) <= 1e-12 * abs(mean):
        return 0.0 if mean < bound else 1.0
    s, g = (mean - bound) / sd, float(((values - mean) ** 3).mean()) / sd**3
    t = math.sqrt(n) * (s + g * s**2 / 3 + g**2 * s**3 / 27 + g / (6 * n))
    return float(student.cdf(t, n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (1979), in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
