"""Are ranks uniform on 0, ..., L? Tests, coverage, bands."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

_DEGREES = 4


class Smooth(NamedTuple):
    """Neyman's smooth test of uniform ranks.

    Attributes:
        p: p-value.
        components: ``(4,)``, each about a standard normal if ranks are uniform. The first is above
            0 where ranks are high, the second where they lie at both ends.
    """

    p: float
    components: np.ndarray


def smooth_test(ranks: np.ndarray, draws: int) -> Smooth:
    """Tests whether ranks ``(rows,)`` among so many draws are independent and uniform.

    The statistic is the sum of squares of the sums of four polynomials, orthonormal on 0, ..., L,
    over the root of the number of rows: chi-squared with four degrees of freedom by the central
    limit theorem (Neyman 1937, "Smooth test for goodness of fit"). The first sees shifts, the
    second widths, the others skewness and tails; its tail needs no simulation.

    Raises:
        ValueError: fewer draws than four.
    """
    components = polynomials(draws)[:, ranks].sum(1) / math.sqrt(len(ranks))
    p = float(scipy.stats.chi2.sf(components @ components, _DEGREES))
    return Smooth(p, components)


def polynomials(draws: int) -> np.ndarray:
    """Those of degrees 1 to 4, ``(4, 1 + draws)``: mean 0 and products of mean 1 or 0 under the
    uniform law on 0, ..., ``draws``.

    Raises:
        ValueError: fewer draws than four.
    """
    if draws < _DEGREES:
        raise ValueError(f"draws={draws}: expected at least {_DEGREES}")
    u = np.linspace(-1, 1, 1 + draws)
    q, r = np.linalg.qr(np.vander(u, 1 + _DEGREES, increasing=True))
    # The sign of the leading coefficient is made positive.
    return (q * np.sign(np.diag(r)) * math.sqrt(1 + draws)).T[1:]


def coverage(
    ranks: np.ndarray, draws: int, nominal: np.ndarray | float, *, highest: bool = False
) -> np.ndarray:
    """How often the truth lies in the central interval of each nominal probability.

    Where an interval's end splits a rank, its share counts, so that uniform ranks have exactly the
    nominal coverage in expectation.

    Args:
        ranks: ``(rows, ...)``.
        nominal: ``(K,)`` or a number.
        highest: take the interval of the highest ranks instead: of a density's ranks, that is the
            region of highest density.

    Returns:
        ``(K, ...)`` or ``(...)``.
    """
    at_least = np.atleast_1d(nominal)[:, None]
    low, high = (1 - at_least, 1.0) if highest else ((1 - at_least) / 2, (1 + at_least) / 2)
    edges = np.linspace(0, 1, draws + 2)
    overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    share = np.clip(overlap * (draws + 1), 0, 1)  # of each rank's cell, (K, 1 + draws)
    found = share[:, ranks].mean(1)
    return found if np.ndim(nominal) else found[0]


def band(
    rows: int, draws: int, probability: float, *, replicates: int = 4000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the empirical distribution function at ranks 0, ..., L - 1, which
    uniform ranks of so many rows keep at all of them together with this probability.

    The simultaneous bands of Säilynoja et al. 2022 (arXiv:2103.10522), by simulation.
    """
    from arviz_stats.ecdf_utils import get_pointwise_confidence_band

    points = np.arange(1, draws + 1) / (draws + 1)
    stream = np.random.default_rng(seed)
    counts = stream.multinomial(rows, np.full(draws + 1, 1 / (draws + 1)), size=replicates)
    below = counts.cumsum(1)[:, :-1]
    low = scipy.stats.binom.cdf(below, rows, points)
    high = scipy.stats.binom.sf(below - 1, rows, points)
    gamma = np.quantile(2 * np.minimum(low, high).min(1), 1 - probability)
    lower, upper = get_pointwise_confidence_band(1 - gamma, rows, points)
    return lower, upper


def ecdf(ranks: np.ndarray, draws: int) -> np.ndarray:
    """Share of rows whose rank is at most 0, ..., L - 1: ``(draws, ...)`` of ranks
    ``(rows, ...)``."""
    return np.stack([(ranks <= r).mean(0) for r in range(draws)])
