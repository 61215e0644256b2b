"""Schedules of the learning rate: what a fit does with them, and after an interruption."""

from __future__ import annotations

import pytest
import torch

from ppl_vae.recipes import load, resume, run_recipe
from ppl_vae.schedules import HoldThenDecay

RECIPE = '''
from ppl_vae.recipes import Experiment
from ppl_vae.recipes.vae import vae_digits
from ppl_vae.schedules import HoldThenDecay


def cooled() -> Experiment:
    """A learning rate that falls at the end."""
    made = vae_digits(latents=2, hidden=8)
    made.fit = {"epochs": 5, "batch_size": 200, "schedule": HoldThenDecay(2, 3)}
    return made
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(RECIPE)
    return f"{path}:cooled"


OPTIONS = {"device": "cpu", "progress": False, "compile": False}


def test_the_rate_is_held_and_falls(recipe):
    history = run_recipe(recipe, **OPTIONS).history
    rates = [row["learning_rate"] / 1e-3 for row in history]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25])


def test_it_goes_on_where_it_was(recipe, tmp_path):
    whole = run_recipe(recipe, out=tmp_path / "whole", **OPTIONS)
    run_recipe(recipe, out=tmp_path / "parts", epochs=3, **OPTIONS)
    parts = resume(tmp_path / "parts", epochs=5, **OPTIONS)
    assert [row["learning_rate"] for row in parts.history] == [
        row["learning_rate"] for row in whole.history
    ]
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
    told = load(tmp_path / "parts").run.record["fit"]["schedule"]
    assert told == "HoldThenDecay(hold=2, decay=3)"


def test_without_decay_the_rate_is_held():
    assert [HoldThenDecay(3, 0).factor(epoch) for epoch in range(4)] == [1, 1, 1, 0]
    assert [HoldThenDecay(0, 1).factor(epoch) for epoch in range(2)] == [0.5, 0]


def test_negative_epochs_are_refused():
    with pytest.raises(ValueError, match=r"HoldThenDecay\(hold=-1, decay=2\): expected epochs"):
        HoldThenDecay(-1, 2)


def test_epochs_without_a_learning_rate_are_refused(recipe):
    with pytest.raises(ValueError, match="epochs=6: the learning rate of HoldThenDecay"):
        run_recipe(recipe, epochs=6, **OPTIONS)
