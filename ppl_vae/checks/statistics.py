"""Statistics of a data set, and the p-values that say how unusual they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Statistic = Callable[[Tensor], Tensor | float]
"""A number of a data set ``(rows, D)``, in float64."""


def zeros(x: Tensor) -> Tensor:
    """Fraction of entries that are exactly 0: sparsity."""
    return (x == 0).double().mean()


def neighbor_correlation(x: Tensor) -> Tensor:
    """Mean absolute correlation, over rows, of each column with the next one: dependence.

    Pairs with a column that does not vary are left out; nan where none is left.
    """
    centered = x - x.mean(0)
    scale = centered.square().mean(0).sqrt()
    covariance = (centered[:, 1:] * centered[:, :-1]).mean(0)
    product = scale[1:] * scale[:-1]
    return (covariance / product)[product > 0].abs().mean()


STATISTICS: Mapping[str, Statistic] = {
    "mean": torch.mean,
    "standard deviation": torch.std,
    "fraction of zeros": zeros,
    "spread of row totals": lambda x: x.sum(1).std(),
    "smallest row total": lambda x: x.sum(1).min(),
    "largest row total": lambda x: x.sum(1).max(),
    "neighbor correlation": neighbor_correlation,
}
"""What is compared by default. Totals are sums over a row; the fraction and the correlation have
no unit, the others that of x."""


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


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (1979), in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
