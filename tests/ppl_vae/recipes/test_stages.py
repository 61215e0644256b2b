"""Recipes in two stages: what is fitted before, and what goes on from there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae.fitting import Fitted
from ppl_vae.loop import TrainingLoop, weights
from ppl_vae.recipes import build, load, resume, run_recipe
from ppl_vae.run import Run

RECIPE = '''
import dataclasses

import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import load_data
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Binomial
from ppl_vae.models.stacked import M1M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import SemiSupervised
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment


def stacked(*, hidden: int = 8) -> Experiment:
    """M1+M2 of the digits, M1 fixed."""
    data = load_data("digits")
    q_z1 = Normal(MLP(64, hidden, 2 * 3))
    likelihood = Binomial(MLP(3, hidden, 64), total_count=16)
    first = Experiment(
        VAE(StandardNormal(3), likelihood),
        Factorized(z=(q_z1, ["x"])),
        data.without_labels(),
        {"epochs": 1, "batch_size": 400, "learning_rate": 1e-2},
    )
    guide = Factorized(
        z1=(q_z1, ["x"]),
        y=(Labels(MLP(3, hidden, 10), estimator="enumerate"), ["z1"]),
        z2=(Normal(MLP(3 + 10, hidden, 2 * 2)), ["z1", "y"]),
    )
    model = M1M2(StandardNormal(2), Normal(MLP(10 + 2, hidden, 2 * 3)), likelihood, 10)

    def begin() -> None:
        for part in (q_z1, likelihood):
            part.requires_grad_(False)

    fit = {"epochs": 1, "batch_size": 400, "labeled_batch": 20, "objective": SemiSupervised(1.0)}
    return Experiment(model, guide, data.labeled(40), fit, first, begin)


def on_features() -> Experiment:
    """A VAE of the means of another one's latent."""
    first = stacked().before
    q, data = first.guide.conditionals["z"], first.data

    def begin():
        with torch.no_grad():
            splits = {k: {"x": q(c["x"].float()).mean} for k, c in data.splits.items()}
        return dataclasses.replace(data, splits=splits, image_shape=None)

    model = VAE(StandardNormal(2), Normal(MLP(2, 4, 2 * 3)))
    guide = Factorized(z=(Normal(MLP(3, 4, 2 * 2)), ["x"]))
    return Experiment(model, guide, data, {"epochs": 1, "batch_size": 400}, first, begin)
'''

OPTIONS: dict[str, Any] = {"progress": False, "compile": False, "checkpoint_seconds": 1e9}
SHARED = ("conditionals.z1", "likelihood")  # what M1 hands over


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "two_stages.py"
    file.write_text(RECIPE)
    return f"{file}:stacked"


def held(fitted: Fitted) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in weights(fitted.model, fitted.guide).items()}


def handed_over(fitted: Fitted) -> dict[str, torch.Tensor]:
    found = {n: t for n, t in held(fitted).items() if any(part in n for part in SHARED)}
    assert len(found) == 8  # two nets of two layers
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_are_fitted_and_the_second_begins_where_the_first_ends(
    recipe: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fitted = run_recipe(recipe, out=out, **OPTIONS)
    first, second = Run.open(out / "before"), Run.open(out)
    assert (first.record["status"], second.record["status"]) == ("finished", "finished")
    assert (first.record["model"], second.record["model"]) == ("VAE", "M1M2")
    assert second.record["recipe"] == recipe
    assert "recipe" not in first.record
    # What is fixed is what the first stage learned; the rest has moved.
    begun = build(recipe, {}, seed=0)
    learned = first.latest()
    assert learned is not None
    # A VAE's q(z | x) is M1M2's q(z1 | x).
    found = {n.replace("z1", "z"): t for n, t in handed_over(fitted).items()}
    fresh = weights(begun.model, begun.guide)
    for name, tensor in found.items():
        assert torch.equal(tensor, learned.tensors[name]), name
        assert not torch.equal(tensor, fresh[name.replace(".z.", ".z1.")]), "the first has learned"
    others = {n: t for n, t in held(fitted).items() if n not in handed_over(fitted)}
    assert {n for n, t in others.items() if torch.equal(t, fresh[n])} == {"model.log_prior"}
    fixed = [p for n, p in fitted.guide.named_parameters() if "z1" in n]
    assert fixed
    assert all(not p.requires_grad and p.grad is None for p in fixed)


def test_it_is_loaded_and_gone_on_with_without_the_stage_before(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    fitted = run_recipe(recipe, out=out, **OPTIONS)
    for file in sorted((out / "before").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (out / "before").rmdir()
    assert_same(held(load(out)), held(fitted))
    assert_same(held(resume(out, progress=False, compile=False)), held(fitted))
    assert not (out / "before").exists()


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C pressed in the n-th step from now on, of whatever stage."""
    take, left = TrainingLoop.taken, [0]

    def taken(self: TrainingLoop, loss: Any) -> None:
        take(self, loss)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingLoop, "taken", taken)
    return lambda steps: left.__setitem__(0, steps)


def test_resuming_gives_the_same_bits(
    recipe: str, tmp_path: Path, ctrl_c: Callable[[int], None]
) -> None:
    """Interrupted in the second stage; the first one is not fitted again."""
    steps = len(run_recipe(recipe, out=tmp_path / "whole", **OPTIONS).history)
    assert steps == 1
    whole = load(tmp_path / "whole")
    first = Run.open(tmp_path / "whole" / "before").record["epochs_done"]
    assert first == 1
    of_first = -(-len(whole.data.split("train")) // 400)
    ctrl_c(of_first + 2)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "part", **OPTIONS)
    assert Run.open(tmp_path / "part").record["status"] == "interrupted"
    assert Run.open(tmp_path / "part" / "before").record["status"] == "finished"
    assert_same(held(resume(tmp_path / "part", progress=False, compile=False)), held(whole))


def test_a_first_stage_that_was_interrupted_goes_on(
    recipe: str, tmp_path: Path, ctrl_c: Callable[[int], None]
) -> None:
    whole = run_recipe(recipe, out=tmp_path / "whole", **OPTIONS)
    ctrl_c(2)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "part", **OPTIONS)
    assert Run.open(tmp_path / "part" / "before").record["status"] == "interrupted"
    assert not (tmp_path / "part" / "run.json").exists()
    # The second has not begun, so that there is no run of it to resume: it is run again.
    assert_same(held(run_recipe(recipe, out=tmp_path / "part", **OPTIONS)), held(whole))


def test_more_epochs_are_of_the_second_stage(recipe: str, tmp_path: Path) -> None:
    whole = run_recipe(recipe, out=tmp_path / "whole", epochs=2, **OPTIONS)
    run_recipe(recipe, out=tmp_path / "part", **OPTIONS)
    more = resume(tmp_path / "part", epochs=2, progress=False, compile=False)
    assert len(more.history) == 2
    assert_same(held(more), held(whole))
    assert Run.open(tmp_path / "part" / "before").record["epochs_done"] == 1


def test_replicas_have_a_first_stage_each(recipe: str, tmp_path: Path) -> None:
    fitted = run_recipe(recipe, out=tmp_path / "runs", seeds=2, **OPTIONS)
    assert len(fitted.replicas) == 2
    parts = [handed_over(replica) for replica in fitted.replicas]
    assert not all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    for number, replica in enumerate(fitted.replicas):
        before = Run.open(tmp_path / "runs" / "before" / f"seed-{number}").latest()
        assert before is not None
        for name, tensor in handed_over(replica).items():
            assert torch.equal(tensor, before.tensors[name.replace(".z1.", ".z.")])
    again = resume(tmp_path / "runs", epochs=2, progress=False, compile=False)
    assert len(again.replicas) == 2
    assert_same(handed_over(again.replicas[1]), parts[1])


def test_nothing_is_kept_without_a_folder(recipe: str) -> None:
    fitted = run_recipe(recipe, **OPTIONS)
    assert fitted.run is None
    assert all(not p.requires_grad for n, p in fitted.guide.named_parameters() if "z1" in n)


def test_a_stage_can_be_fitted_to_what_the_one_before_makes_of_the_data(
    recipe: str, tmp_path: Path
) -> None:
    features = recipe.replace(":stacked", ":on_features")
    fitted = run_recipe(features, out=tmp_path / "run", **OPTIONS)
    assert fitted.data.split("train").batch(slice(0, 2))["x"].shape == (2, 3)
    assert Run.open(tmp_path / "run").record["data"]["columns"]["x"]["shape"] == [3]
    with pytest.raises(ValueError, match="makes data of its own for each seed"):
        run_recipe(features, seeds=2, **OPTIONS)
