from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl_vae.checks.statistics import STATISTICS, holm, p_value


def test_default_statistics_by_hand():
    x = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0], [4.0, 8.0, 5.0]], dtype=torch.float64)
    values = {name: float(statistic(x)) for name, statistic in STATISTICS.items()}
    totals = np.array([6.0, 10.0, 17.0])
    assert values == pytest.approx(
        {
            "mean": x.numpy().mean(),
            "standard deviation": x.numpy().std(ddof=1),
            "fraction of zeros": 1 / 9,
            "spread of row totals": totals.std(ddof=1),
            "smallest row total": 6.0,
            "largest row total": 17.0,
            # The third column does not vary: one pair is left.
            "neighbor correlation": np.corrcoef(x[:, 0], x[:, 1])[0, 1],
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
