"""What the recipes of importance-weighted autoencoders take from the paper."""

from __future__ import annotations

import pytest
import torch

from ppl_vae.recipes.objectives import eight_stages


def test_stage_i_has_three_to_the_i_epochs_at_a_rate_that_falls_to_a_tenth() -> None:
    expected = [1e-3 * 10 ** (-stage / 7) for stage in range(8) for _ in range(3**stage)]
    assert len(expected) == 3280
    assert expected[-1] == pytest.approx(1e-4)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = eight_stages(optimizer)
    rates = []
    for _ in range(3282):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([*expected, 1e-4, 1e-4], rel=1e-12)
