"""Reproductions: scores against closed forms, records, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae.data import as_dataset, load_data
from ppl_vae.data.arrays import from_splits
from ppl_vae.evaluation import evaluate
from ppl_vae.fitting import Fitted
from ppl_vae.guide import Factorized
from ppl_vae.models.ppca import PPCA
from ppl_vae.recipes import load
from ppl_vae.reproduction import record as record_module
from ppl_vae.reproduction import scoring
from ppl_vae.reproduction.published import Published
from ppl_vae.reproduction.record import (
    Reproduction,
    as_json,
    reproduce,
    verdict,
)
from ppl_vae.reproduction.scoring import leaks, score

TINY = Published(
    "tiny",
    "vae-digits",
    90.0,
    {"hidden": 16, "latents": 4},
    samples=20,
    paper={"epochs": 2, "learning_rate": 1e-3, "batch_size": 200, "warmup": 0},
)


@pytest.fixture
def known(monkeypatch):
    """Instead of what was published, a figure that is made in a second."""
    figures = {"tiny": TINY}
    monkeypatch.setattr(record_module, "published", lambda: figures)
    monkeypatch.setattr(record_module, "find_published", lambda name: figures[name])
    return figures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run and the record of the figure."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "find_published", lambda name: TINY)
        [record] = reproduce(["tiny"], out=out, protocol="paper", device="cpu")
    return out, record


class Posterior(nn.Module):
    """That of a PPCA, exact but for a factor of its scale."""

    def __init__(self, model, factor=1.0):
        super().__init__()
        self.posterior, self.factor = model.posterior, factor

    def forward(self, x):
        q = self.posterior(x)
        return dist.MultivariateNormal(q.mean, scale_tril=self.factor * q.scale_tril)


def test_scores_of_the_exact_posterior_are_the_evidence(float64):
    model = PPCA(2, 5, scale=0.7)
    x = model.simulate(40)["x"]
    guide = Factorized(z=(Posterior(model), ["x"]))
    scores = score(Fitted(model, guide, as_dataset({"train": x, "test": x})), samples=30)
    evidence = model.evidence(x).detach().numpy()
    np.testing.assert_allclose(scores["log_evidence"], evidence, rtol=1e-10)
    np.testing.assert_allclose(scores["elbo"], evidence, rtol=1e-10)
    np.testing.assert_allclose(scores["effective_samples"], 30, rtol=1e-10)
    k = scores["pareto_k"]
    assert (k[:: scoring.TAILS] == -math.inf).all()
    assert np.isnan(np.delete(k, np.s_[:: scoring.TAILS])).all()


def test_scores_are_those_of_an_evaluation(float64, monkeypatch):
    """Other draws of the same guide, in another piece of code, in parts."""
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 7)
    model = PPCA(2, 5, scale=0.7)
    x = model.simulate(40)["x"]
    guide = Factorized(z=(Posterior(model, 1.3), ["x"]))  # wider: weights are bounded
    fitted = Fitted(model, guide, as_dataset({"train": x, "test": x}))
    scores = score(fitted, samples=4000)
    found = evaluate(fitted.model, fitted.guide, fitted.data, samples=4000, seed=5)
    assert -scores["log_evidence"].mean() == pytest.approx(found.nll, abs=0.005)
    assert scores["elbo"].mean() == pytest.approx(found.elbo, abs=0.01)
    evidence = model.evidence(x).mean().item()
    assert scores["log_evidence"].mean() == pytest.approx(evidence, abs=0.005)
    assert scores["elbo"].mean() < evidence - 0.05
    some = score(fitted, samples=4000, rows=list(range(7)))
    np.testing.assert_array_equal(some["elbo"], scores["elbo"][:7])


def test_what_is_scored_is_not_scored_again(made, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 120)
    fitted = load(made[0] / "runs" / "tiny-paper" / "seed-0")
    told: list[str] = []
    first = score(fitted, tmp_path, samples=10, say=told.append)
    assert [text.partition(":")[0] for text in told] == [
        "120 of 300 test rows",
        "240 of 300 test rows",
        "300 of 300 test rows",
    ]
    parts = sorted(tmp_path.rglob("*.npz"))
    assert len(parts) == 3
    parts[1].unlink()
    told.clear()
    again = score(fitted, tmp_path, samples=10, say=told.append)
    assert len(told) == 1
    assert (again["seconds"] > 0).all()
    for name in ("elbo", "log_evidence", "pareto_k", "effective_samples"):
        np.testing.assert_array_equal(first[name], again[name])
    # Other rows and other draws have scores of their own,
    assert len(score(fitted, tmp_path, samples=10, rows=[3, 4])["elbo"]) == 2
    assert (score(fitted, tmp_path, samples=10, seed=7)["elbo"] != first["elbo"]).all()
    told.clear()
    # and so have other weights.
    with torch.no_grad():
        next(fitted.guide.parameters()).add_(0.01)
    other = score(fitted, tmp_path, samples=10, say=told.append)
    assert len(told) == 3
    assert (other["elbo"] != first["elbo"]).all()


def test_a_record_says_what_was_run(made):
    out, record = made
    path = out / "records" / "tiny-paper-seed-0.json"
    assert json.loads(path.read_text()) == record
    assert record["published"] == {"value": 90.0, "error": None, "measure": "nll"}
    assert record["recipe"] == "vae-digits"
    assert record["arguments"] == {"hidden": 16, "latents": 4}
    assert (record["fit"]["epochs"], record["fit"]["batch_size"]) == (2, 200)
    assert record["curve"]["epoch"] == [1, 2]
    assert record["data"]["sha256"] == load_data("digits").fingerprint()["sha256"]
    assert record["verdict"] == "worse"
    assert record["leaks"]["test_rows_also_in"] == {"train": 0, "validation": 0}
    fitted = load(out / "runs" / "tiny-paper" / "seed-0")
    found = evaluate(fitted.model, fitted.guide, fitted.data, samples=20)
    figures = record["figures"]
    assert figures["nll"] == pytest.approx(found.nll, abs=0.5)
    assert figures["nll_se"] == pytest.approx(found.nll_se, rel=0.05)
    assert figures["negative_elbo"] == pytest.approx(-found.elbo, abs=0.5)
    assert figures["rows"] == 300
    assert figures["seconds"] > 0


def test_what_is_recorded_is_not_done_again(made, known):
    out, record = made
    path = out / "records" / "tiny-paper-seed-0.json"
    before = path.stat().st_mtime_ns
    told: list[str] = []
    assert reproduce(["tiny"], out=out, protocol="paper", say=told.append) == [record]
    assert path.stat().st_mtime_ns == before
    assert told == []


def test_after_a_stop_it_comes_to_the_same_figures(made, known, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record_module, "made_record", stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce(["tiny"], out=tmp_path, protocol="paper", device="cpu")
    assert not list(tmp_path.rglob("records/*"))
    told: list[str] = []
    [record] = reproduce(["tiny"], out=tmp_path, protocol="paper", device="cpu", say=told.append)
    assert not any("fitting" in text for text in told)
    for name, figure in made[1]["figures"].items():
        assert name == "seconds" or record["figures"][name] == figure


def test_a_budget_stops_a_fit_and_loses_nothing(known, tmp_path):
    known["tiny"] = dataclasses.replace(
        TINY, paper={**TINY.paper, "epochs": 4000, "compile": False}
    )
    told: list[str] = []
    options = {"out": tmp_path, "protocol": "paper", "device": "cpu", "say": told.append}
    assert reproduce(["tiny"], budget=3 / 60, **options) == []
    assert told[-1].startswith("the budget of")
    folder = tmp_path / "runs" / "tiny-paper" / "seed-0"
    stopped = json.loads((folder / "run.json").read_text())
    assert stopped["status"] == "interrupted"
    assert 0 < stopped["epochs_done"] < 4000
    assert reproduce(["tiny"], budget=3 / 60, **options) == []
    assert any("going on" in text for text in told)
    later = json.loads((folder / "run.json").read_text())
    assert later["epochs_done"] > stopped["epochs_done"]
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("ours", "error", "figure", "expected"),
    [
        (88.2, 0.0, Published("a", "r", 88.0), "reached"),
        (87.8, 0.0, Published("a", "r", 88.0), "reached"),
        (88.4, 0.0, Published("a", "r", 88.0), "worse"),
        (87.6, 0.0, Published("a", "r", 88.0), "better"),
        (88.4, 0.3, Published("a", "r", 88.0), "reached"),
        (12.9, 0.1, Published("a", "r", 12.0, error=0.5, measure="error"), "reached"),
        (12.9, 0.1, Published("a", "r", 12.0, error=0.1, measure="error"), "worse"),
        (1.0, 0.1, Published("a", "r", None), "none published"),
        (math.inf, 0.1, Published("a", "r", 88.0), "not finite"),
        (None, 0.1, Published("a", "r", None), "not finite"),
    ],
)
def test_a_verdict_allows_for_what_chance_does(ours, error, figure, expected):
    assert verdict(ours, figure, error) == expected


def test_leaks_are_found():
    rows = torch.randint(0, 2, (30, 12), dtype=torch.uint8)
    rows[:, :5] = torch.arange(30).unsqueeze(1) >> torch.arange(5) & 1  # all different
    train, validation, test = rows[:20], rows[20:25], rows[25:].clone()
    clean = leaks(as_dataset({"train": train, "validation": validation, "test": test}))
    assert clean["test_rows_also_in"] == {"train": 0, "validation": 0}
    assert (clean["values"], clean["whole"]) == ([0.0, 1.0], True)
    test[0], test[1], test[2] = train[3], train[4], validation[1]
    found = leaks(as_dataset({"train": train, "validation": validation, "test": test}))
    assert found["test_rows_also_in"] == {"train": 2, "validation": 1}
    grey = leaks(as_dataset({"train": train / 2, "test": test / 2}))
    assert (grey["values"], grey["whole"]) == ([0.0, 0.5], False)


def test_bad_arguments_are_refused(known, tmp_path):
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        reproduce(["tiny"], out=tmp_path, seeds=0)
    with pytest.raises(ValueError, match=r"budget=-1: expected minutes"):
        reproduce(["tiny"], out=tmp_path, budget=-1)
    known["tiny"] = dataclasses.replace(TINY, paper=None)
    with pytest.raises(ValueError, match="tiny has no paper's optimization"):
        reproduce(["tiny"], out=tmp_path, protocol="paper")


def test_missing_data_leave_a_gap_unless_asked_for(known, tmp_path, monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "nowhere"))
    known["other"] = Published("other", "vae-static-mnist", 88.56)
    del known["tiny"]
    told: list[str] = []
    assert reproduce(out=tmp_path, device="cpu", say=told.append) == []
    assert told[-1].startswith("other: passed over")
    with pytest.raises(FileNotFoundError, match="binarized_mnist"):
        reproduce(["other"], out=tmp_path, device="cpu")


def test_a_figure_that_fails_does_not_keep_others_from_theirs(known, tmp_path):
    bad = dataclasses.replace(TINY, name="bad", paper={**TINY.paper, "batch_size": -1})
    tiny = known.pop("tiny")
    known.update(bad=bad, tiny=tiny)
    told: list[str] = []
    options = {"out": tmp_path, "protocol": "paper", "device": "cpu", "say": told.append}
    [record] = reproduce(**options)
    assert record["name"] == "tiny"
    assert any(text.startswith("bad: passed over, batch_size=-1") for text in told)
    with pytest.raises(ValueError, match="batch_size=-1"):
        reproduce(["bad"], **options)


def test_runs_of_other_data_are_refused(made, known, tmp_path):
    fitted = load(made[0] / "runs" / "tiny-paper" / "seed-0")
    splits = {name: dict(columns) for name, columns in fitted.data.splits.items()}
    splits["test"] = {name: column[1:] for name, column in splits["test"].items()}
    fitted.data = from_splits(splits, name="digits", image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match="was fitted to other data than digits is now"):
        record_module.made_record(Reproduction(TINY, "paper", 0), fitted, device="cpu")


def test_seeds_are_fitted_at_once_where_none_is_begun(known, tmp_path, monkeypatch):
    """As on CUDA; what is begun alone goes on alone."""
    calls: list[tuple[str, int, int | None]] = []

    def noted(recipe, arguments, *, out, seed, seeds=None, **_):
        calls.append((Path(out).name, seed, seeds))

    monkeypatch.setattr(record_module, "torch_device", lambda device: "cuda")
    monkeypatch.setattr(record_module, "run_recipe", noted)
    monkeypatch.setattr(record_module, "_recorded", lambda one, *_, **__: {"seed": one.seed})
    options = {"out": tmp_path, "protocol": "paper", "seeds": 3}
    assert [one["seed"] for one in reproduce(["tiny"], **options)] == [0, 1, 2]
    assert calls == [("tiny-paper", 0, 3)]
    calls.clear()
    path = Reproduction(TINY, "paper", 1).path(tmp_path)
    path.parent.mkdir()
    path.write_text("{}")
    reproduce(["tiny"], **options)
    assert calls == [("seed-0", 0, None), ("seed-2", 2, None)]


def test_each_seed_draws_its_own_labels():
    m2 = Published("m2", "m2-mnist-100", 11.97, {"labels": 600}, measure="error")
    assert Reproduction(m2, "recipe", 3).arguments() == {"labels": 600, "label_seed": 3}
    assert Reproduction(TINY, "recipe", 3).arguments() == TINY.arguments


def test_json_has_a_list_of_numbers_on_a_line():
    value = {"curve": {"a": [1, 2.5, None]}, "names": ["x [1, 2]", "y"], "none": [], "b": math.nan}
    text = as_json(value).decode()
    assert "[1, 2.5, null]" in text
    assert json.loads(text) == {**value, "b": None}


def test_seeds_have_folders_and_records_of_their_own(tmp_path):
    one, other = (Reproduction(TINY, "recipe", seed) for seed in (0, 1))
    assert one.folder(tmp_path) == tmp_path / "runs" / "tiny" / "seed-0"
    assert other.path(tmp_path) == tmp_path / "records" / "tiny-seed-1.json"
    paper = Reproduction(TINY, "paper", 0)
    assert paper.folder(tmp_path) != one.folder(tmp_path)
    assert paper.options()["epochs"] == 2
    assert one.options() == {}
