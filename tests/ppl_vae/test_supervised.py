"""The baseline of semi-supervised learning: a classifier on the rows with labels alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppl_vae import supervised
from ppl_vae.calibration import LabelScores
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized
from ppl_vae.nn import MLP
from ppl_vae.recipes import Experiment, build
from ppl_vae.supervised import EVERY, PATIENCE, Classifier, fit_supervised

CENTERS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]])


def clouds(labels: int | None = 30, guide: nn.Module | None = None) -> Experiment:
    stream = torch.Generator().manual_seed(1)
    splits: dict[str, Any] = {}
    for name, rows in (("train", 300), ("validation", 150), ("test", 600)):
        y = torch.arange(rows) % 3
        splits[name] = {"x": CENTERS[y] + torch.randn(rows, 2, generator=stream), "y": y}
    data = Dataset("clouds", splits)
    torch.manual_seed(0)
    guide = guide or Factorized(y=(Labels(nn.Linear(2, 3)), ["x"]))
    model: Any = nn.Module()  # is not run
    return Experiment(model, guide, data if labels is None else data.labeled(labels))


def log_loss(net: nn.Module, data: Dataset, split: str) -> float:
    rows = data.split(split).batch(slice(None))
    with torch.no_grad():
        return F.cross_entropy(net(rows["x"]), rows["y"]).item()


def test_it_is_trained_by_the_rule() -> None:
    made = clouds()
    before = copy.deepcopy(made.guide.state_dict())
    state = torch.get_rng_state()
    found = fit_supervised(made, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in made.guide.state_dict().items())
    assert found.steps == found.best_step + EVERY * PATIENCE
    # The same steps by hand: all 30 rows are a batch, in an order that does not matter.
    net = copy.deepcopy(made.guide.conditionals["y"].net)  # pyright: ignore
    known = made.data.split("train").labeled
    assert known is not None
    rows = made.data.split("train").batch(known)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses: list[float] = []
    for step in range(found.steps):
        optimizer.zero_grad()
        F.cross_entropy(net(rows["x"]), rows["y"]).backward()
        optimizer.step()
        if step + 1 == found.best_step:
            assert torch.allclose(found.net.net.weight, net.weight, atol=1e-4)  # pyright: ignore
        if (step + 1) % EVERY == 0:
            losses.append(log_loss(net, made.data, "validation"))
    best = min(losses)
    assert log_loss(found.net, made.data, "validation") == pytest.approx(best, abs=1e-5)
    test = made.data.split("test").batch(slice(None))
    scores = LabelScores.of(found.net(test["x"]).softmax(1), test["y"])
    assert found.scores.log_loss == pytest.approx(scores.log_loss, rel=1e-5)
    assert found.scores.accuracy == scores.accuracy > 0.8


def test_all_labels_are_taken_where_none_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "MOST", 600)
    few, all_known = (fit_supervised(clouds(labels)).scores.log_loss for labels in (3, None))
    assert all_known < few


def test_other_latents_are_zeros(labeled_recipes: Path) -> None:
    net = MLP(2 + 2, 5, 3)
    guide = Factorized(
        a=(Normal(nn.Linear(2, 4)), ["x"]), y=(Labels(net, estimator="enumerate"), ["a", "x"])
    )
    alone = Classifier(clouds(guide=guide))
    x = torch.randn(7, 2)
    assert torch.equal(alone(x), net(torch.cat([torch.zeros(7, 2), x], 1)))
    assert alone.net is not net
    made = build(f"{labeled_recipes}:bits", {}, seed=3)
    x = made.data.split("test").batch(slice(5))["x"]
    assert torch.equal(Classifier(made)(x), made.guide.conditionals["y"].net(x))  # pyright: ignore


def test_it_stops_at_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "MOST", 40)
    assert fit_supervised(clouds()).steps == 40


def test_what_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Factorized has no net for q\(y \| x\)"):
        fit_supervised(clouds(guide=Factorized(z=(Normal(nn.Linear(2, 2)), ["x"]))))
    made = clouds(None)
    made.data = made.data.without_labels()
    with pytest.raises(ValueError, match="clouds has no column 'y'"):
        fit_supervised(made)
    made = clouds()
    made.data = Dataset("clouds", {k: v for k, v in made.data.splits.items() if k != "validation"})
    with pytest.raises(ValueError, match="no split 'validation'"):
        fit_supervised(made)
