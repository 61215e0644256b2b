"""Experiments: every combination, each once, and a table over seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from ppl_vae import experiments, supervised
from ppl_vae.experiments import combinations, markdown, plot, semi_supervised
from ppl_vae.recipes import build, run_recipe
from ppl_vae.supervised import fit_supervised

QUICK: dict[str, Any] = {"samples": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def short_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "MOST", 50)


def records(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "records").iterdir()}


def _unaligned(page: str) -> str:
    """A page without the blanks that align its tables."""
    return re.sub(" +", " ", page)


def test_every_combination_is_run_and_averaged(labeled_recipes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = semi_supervised(
        out,
        models=[f"{labeled_recipes}:bits"],
        estimators=["enumerate", "straight-through"],
        labels=[6, 12],
        seeds=2,
        epochs=1,
        **QUICK,
    )
    found = records(out)
    kinds = ["bits-supervised", "bits-enumerate", "bits-straight-through"]
    assert set(found) == {f"{k}-{n}-{seed}" for k in kinds for n in (6, 12) for seed in (0, 1)}
    rows = {(r["model"], r["estimator"], r["labels"]): r for r in table["rows"]}
    assert len(rows) == 6
    for (model, estimator, labels), row in rows.items():
        own = [found[f"{model}-{estimator}-{labels}-{seed}"] for seed in (0, 1)]
        accuracy = [one["figures"]["labels"]["classifier"]["accuracy"] for one in own]
        assert row["seeds"] == 2
        mean, error = row["mean"], row["standard_error"]
        assert mean["labels"]["classifier"]["accuracy"] == pytest.approx(statistics.fmean(accuracy))
        expected = statistics.stdev(accuracy) / math.sqrt(2)
        assert error["labels"]["classifier"]["accuracy"] == pytest.approx(expected)
        assert ("nll" in mean) == (estimator != "supervised")
        assert [one["seed"] for one in row["each"]] == [0, 1]
    one = found["bits-enumerate-6-1"]
    assert one["evaluation"]["rows"] == 60
    assert one["steps"] == 4  # 84 rows without a label, 24 a batch
    assert one["figures"]["ms_a_step"] == pytest.approx(1000 * one["figures"]["seconds"] / 4)
    assert {"hardware", "versions", "threads", "load", "date"} <= one.keys()
    run = json.loads((out / "runs" / "bits-enumerate-6-1" / "run.json").read_text())
    assert run["arguments"] == {"labels": 6, "label_seed": 1, "estimator": "enumerate"}
    assert run["seed"] == 1

    assert json.loads((out / "table.json").read_text()) == table
    text = (out / "table.md").read_text()
    assert text == markdown(table)
    mean, error = (
        row["labels"]["classifier"]["accuracy"]
        for row in (rows["bits", "enumerate", 6][k] for k in ("mean", "standard_error"))
    )
    assert (
        f"| bits | enumerate | 6 | 2 | {100 * (1 - mean):.2f} ± {100 * error:.2f} |"
        in _unaligned(text)
    )
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    lines = plot(table).axes[0].containers
    assert [one.get_label() for one in lines] == [
        "bits, supervised",
        "bits, enumerate",
        "bits, straight-through",
    ]


def test_the_baseline_is_that_of_the_recipe(labeled_recipes: Path, tmp_path: Path) -> None:
    recipe, out = f"{labeled_recipes}:bits", tmp_path / "out"
    semi_supervised(out, models=[recipe], estimators=[], labels=[9], seeds=2, **QUICK)
    for seed in (0, 1):
        made = build(recipe, {"labels": 9, "label_seed": seed}, seed)
        expected = fit_supervised(made, seed=seed)
        one = records(out)[f"bits-supervised-9-{seed}"]
        assert one["figures"]["labels"]["classifier"]["log_loss"] == expected.scores.log_loss
        assert one["best_step"] == expected.best_step


def test_what_is_finished_is_not_done_again(
    labeled_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"models": [f"{labeled_recipes}:bits"], "epochs": 1, **QUICK}
    first = semi_supervised(tmp_path / "out", seeds=1, **settings)
    said: list[str] = []
    more = semi_supervised(tmp_path / "out", seeds=2, say=said.append, **settings)
    assert said == ["3 of 4: bits-supervised-6-1", "4 of 4: bits-enumerate-6-1"]
    assert [row["each"][0] for row in more["rows"]] == [row["each"][0] for row in first["rows"]]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was run again")

    monkeypatch.setattr(experiments, "_run", refuse)
    assert semi_supervised(tmp_path / "out", seeds=2, **settings) == more


def test_a_run_that_was_interrupted_goes_on(labeled_recipes: Path, tmp_path: Path) -> None:
    recipe = f"{labeled_recipes}:bits"
    settings: dict[str, Any] = {"models": [recipe], "seeds": 1, "epochs": 2, **QUICK}
    whole = semi_supervised(tmp_path / "whole", **settings)
    part = tmp_path / "part"
    semi_supervised(part, **{**settings, "estimators": []})  # the baseline alone
    arguments = {"labels": 6, "label_seed": 0, "estimator": "enumerate"}
    folder = part / "runs" / "bits-enumerate-6-0"
    run_recipe(recipe, arguments, out=folder, epochs=1, progress=False, device="cpu")
    table = semi_supervised(part, **settings)
    one, other = (t["rows"][1]["each"][0] for t in (whole, table))
    assert one["figures"]["nll"] == other["figures"]["nll"]
    assert (one["epochs_done"], other["epochs_done"]) == (2, 2)


def test_a_failed_run_is_told_and_the_others_go_on(
    labeled_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = experiments._fit

    def sometimes(case: Any, *args: Any, **options: Any) -> Any:
        if case.seed == 1:
            raise FloatingPointError("epoch 1, batch 2: the loss is nan")
        return fit(case, *args, **options)

    monkeypatch.setattr(experiments, "_fit", sometimes)
    settings: dict[str, Any] = {"models": [f"{labeled_recipes}:bits"], "epochs": 1, **QUICK}
    table = semi_supervised(tmp_path / "out", seeds=2, **settings)
    row = table["rows"][1]
    assert (row["seeds"], row["failed"]) == (1, 1)
    assert row["each"][1]["failed"] == "epoch 1, batch 2: the loss is nan"
    assert row["standard_error"]["nll"] is None
    assert "| bits | enumerate | 6 | 1 (1 failed) |" in _unaligned(markdown(table))
    assert "1: failed |" in _unaligned(markdown(table))


def test_recipes_are_found_by_their_data() -> None:
    cases = list(combinations("digits", None, ["enumerate", "score"], None, 1))
    assert [case.name for case in cases if case.model == "m2"] == [
        "m2-supervised-50-0",
        "m2-enumerate-50-0",
        "m2-score-50-0",
    ]
    assert {case.recipe for case in cases if case.model == "m2"} == {"m2-digits-50"}
    named = list(combinations("digits", ["m2-digits-50"], ["score"], [70], 1))
    assert [case.name for case in named] == [
        "m2-digits-50-supervised-70-0",
        "m2-digits-50-score-70-0",
    ]


def test_a_recipe_without_a_choice_has_its_own_estimator(labeled_recipes: Path) -> None:
    recipe = f"{labeled_recipes}:by_score"
    baseline, own = combinations("digits", [recipe], ["enumerate", "relaxed"], None, 1)
    assert (baseline.name, own.name) == ("by_score-supervised-3-0", "by_score-score-3-0")
    assert own.arguments() == {"labels": 3, "label_seed": 0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"models": ["m3"]}, "no semi-supervised model 'm3' of digits, only m2"),
        ({"models": ["vae-digits"]}, "'vae-digits' has no arguments labels and label_seed"),
        ({"models": ["{file}:without_labels"]}, "has no arguments labels and label_seed"),
        ({"models": ["{file}:bits", "{file}:bits"]}, "two models are called 'bits'"),
        ({"estimators": ["enumerated"]}, "estimator 'enumerated': expected some of enumerate"),
        ({"seeds": 0}, "seeds=0: expected at least 1"),
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"labels": [2]}, r"labeled\(2\)"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    labeled_recipes: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    settings = {"models": ["{file}:bits"], **QUICK, **change}
    settings["models"] = [name.format(file=labeled_recipes) for name in settings["models"]]
    with pytest.raises(ValueError, match=sentence):
        semi_supervised(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_another_experiment_in_the_folder_is_left_alone(
    labeled_recipes: Path, tmp_path: Path
) -> None:
    models = [f"{labeled_recipes}:bits"]
    out = tmp_path / "out"
    semi_supervised(out, models=models, estimators=[], seeds=1, epochs=1, **QUICK)
    with pytest.raises(ValueError, match="was begun with epochs=1, not 2"):
        semi_supervised(out, models=models, estimators=[], seeds=1, epochs=2, **QUICK)
    path = out / "records" / "bits-supervised-6-0.json"
    path.write_text(path.read_text().replace(":bits", ":other"))
    with pytest.raises(ValueError, match="is of recipe"):
        semi_supervised(out, models=models, estimators=[], seeds=1, epochs=1, **QUICK)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="already holds other files"):
        semi_supervised(tmp_path / "full", models=models, seeds=1, **QUICK)
