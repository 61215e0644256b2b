"""Warm-ups rise to 1 and stay."""

from __future__ import annotations

import pytest

from ppl_vae.objectives import CyclicalWarmup, LinearWarmup


def test_warmups_rise_from_0_to_1_and_stay():
    linear = LinearWarmup(8)
    assert [linear(e) for e in (0, 2, 4.5, 8, 8.1, 100)] == [0, 0.25, 0.5625, 1, 1, 1]
    assert linear.ends == 8
    assert LinearWarmup(0)(0) == 1
    cyclic = CyclicalWarmup(epochs=20, cycles=4, rising=0.8)
    assert cyclic.ends == 20
    within = [0.0, 0.25, 0.5, 0.75, 1.0]
    for cycle in range(4):
        rising = [cyclic(5 * cycle + 4 * w) for w in within]
        assert rising == pytest.approx(within)
        assert cyclic(5 * cycle + 4.9) == 1
    assert [cyclic(e) for e in (20, 20.5, 22, 1000)] == [1, 1, 1, 1]
    epochs = [k / 4 for k in range(60)]
    assert [cyclic(e + 5) for e in epochs if e + 5 < 20] == [cyclic(e) for e in epochs if e < 15]


@pytest.mark.parametrize("schedule", [LinearWarmup(7), CyclicalWarmup(7, cycles=3)])
def test_from_its_end_a_schedule_stays_at_1(schedule):
    assert schedule(0) == 0
    assert all(schedule(schedule.ends + k / 10) == 1 for k in range(100))
    assert all(0 <= schedule(k / 10) <= 1 for k in range(100))
