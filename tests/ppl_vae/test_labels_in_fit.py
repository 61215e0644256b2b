"""Fits to rows of which few have labels: what they read, and that no way of running matters."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import ppl_vae.fitting
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset
from ppl_vae.discrete import Labels
from ppl_vae.evaluation import evaluate, mean_elbo
from ppl_vae.fitting import Fitted, fit
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.loop import TrainingLoop, weights
from ppl_vae.model import GenerativeModel
from ppl_vae.models._labels import LabeledModel
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.objectives import Beta, MutualInformation, SemiSupervised, VirtualAdversarial
from ppl_vae.priors import StandardNormal
from ppl_vae.run import Run
from ppl_vae.sites import PairError
from ppl_vae.svi import NonFiniteLoss
from ppl_vae.workers import Alone

K, D, TRAIN, KNOWN = 3, 9, 60, 8


class Naive(LabeledModel):
    """A label, and x given it alone: no draw, so that two fits differ in rounding only."""

    def __init__(self) -> None:
        super().__init__(K)
        self.likelihood = Bernoulli(nn.Linear(K, D))

    def tell(self, y: Tensor, x: Tensor | None) -> Tensor:
        return pyro.sample("x", self.likelihood(y), obs=x)


def digits(train: int = TRAIN, known: int = KNOWN, seed: int = 0, whole: bool = False) -> Dataset:
    """Each class lights a third of the pixels."""
    stream = torch.Generator().manual_seed(seed)
    splits = {}
    for split, rows in {"train": train, "validation": 20, "test": 30}.items():
        y = torch.arange(rows) % K
        light = 0.1 + 0.7 * torch.eye(K)[y].repeat_interleave(D // K, 1)
        splits[split] = {"x": torch.bernoulli(light, generator=stream).to(torch.uint8), "y": y}
    data = Dataset("digits", splits)
    return data if whole else data.labeled(known)


def naive(seed: int = 1) -> tuple[GenerativeModel, Factorized]:
    torch.manual_seed(seed)
    q_y = Labels(nn.Linear(D, K), estimator="enumerate")
    return Naive(), Factorized(y=(q_y, ["x"]))


def m2(seed: int = 1, **settings: Any) -> tuple[GenerativeModel, Factorized]:
    torch.manual_seed(seed)
    model = M2(StandardNormal(2), Bernoulli(MLP(K + 2, 8, D)), K)
    head = Labels(nn.Linear(D, K), **({"estimator": "enumerate"} | settings))
    sites: dict[str, Any] = {
        "y": (head, ["x"]),
        "z": (Normal(nn.Linear(D + K, 4)), ["x", "y"]),
    }
    return model, Factorized(**sites)


PLAIN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 14,
    "labeled_batch": 4,
    "learning_rate": 1e-2,
    "progress": False,
    "compile": False,
    "precision": "64-true",
}


def penalized() -> SemiSupervised:
    penalties = [VirtualAdversarial(0.5, rise=1.0), MutualInformation(0.3)]
    return SemiSupervised(0.5, penalties=penalties)


def fitted(make: Any, data: Dataset, seed: int = 1, **options: Any) -> Fitted:
    return fit(*make(seed), data, **(PLAIN | options))


def held(result: Fitted) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in weights(result.model, result.guide).items()}


def assert_same_bits(one: Fitted, other: Fitted) -> None:
    ours, theirs = held(one), held(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for row, expected in zip(one.history, other.history, strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


# What is read


def test_labels_that_are_withheld_decide_nothing():
    """Those of training are gone; those of validation and test are not looked at."""
    data = digits()
    expected = fitted(m2, data, objective=penalized())
    known = data.split("train").labeled
    assert known is not None
    whole = digits(whole=True)
    y = torch.full((TRAIN,), -1)
    y[known] = whole.splits["train"]["y"][known]
    splits = {
        "train": {"x": whole.splits["train"]["x"], "y": y},
        "validation": {
            "x": whole.splits["validation"]["x"],
            "y": whole.splits["validation"]["y"].roll(1),
        },
        "test": {"x": whole.splits["test"]["x"], "y": torch.zeros(30, dtype=torch.int64)},
    }
    found = fitted(m2, Dataset("digits", splits), objective=penalized(), patience=5)
    assert found.history[0]["validation_elbo"] == expected.history[0]["validation_elbo"]
    found = fitted(m2, Dataset("digits", splits), objective=penalized())
    assert_same_bits(found, expected)
    # Those that are given do decide.
    y[known] = (y[known] + 1) % K
    other = fitted(m2, Dataset("digits", splits), objective=penalized())
    assert not torch.equal(
        held(other)["guide.conditionals.y.net.weight"],
        held(found)["guide.conditionals.y.net.weight"],
    )


def test_the_validation_elbo_is_that_of_x_alone():
    result = fitted(m2, digits())
    rows = result.data.split("validation")
    alone = mean_elbo(result.model, result.guide, rows, seed=0, withheld=["y"])
    assert result.history[-1]["validation_elbo"] == float(alone.elbo)
    both = mean_elbo(result.model, result.guide, rows, seed=0)
    assert float(both.elbo) != float(alone.elbo)
    found = evaluate(result.model, result.guide, result.data, samples=3)
    assert found.labels is not None
    assert set(found.labels) == {"classifier", "importance"}


def test_few_labels_name_the_classes():
    """Six labels of 300 rows: clusters that x shows are found, and named."""
    data = digits(300, 6, seed=3)
    result = fitted(
        m2,
        data,
        epochs=40,
        batch_size=56,
        labeled_batch=6,
        objective=SemiSupervised(0.5),
        precision="32-true",
    )
    found = evaluate(result.model, result.guide, result.data, samples=20)
    assert found.labels is not None
    # By Bayes' rule with the true probabilities 97 of 100 rows are told.
    for scores in found.labels.values():
        assert scores.accuracy > 0.85


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "score"},
        {"estimator": "score", "baseline": "both"},
        {"estimator": "relaxed"},
        {"estimator": "straight-through"},
    ],
    ids=lambda s: "-".join(s.values()),
)
def test_labels_that_are_drawn_are_learned_too(settings):
    """Validation sums over them, so that its figures compare with those of a sum in training."""
    data = digits(120, 12)
    options = {"objective": SemiSupervised(0.5), "epochs": 10, "learning_rate": 3e-2}
    drawn = fit(*m2(**settings), data, **(PLAIN | options))
    summed = fitted(m2, data, **options)
    gains = [
        r.history[-1]["validation_elbo"] - r.history[0]["validation_elbo"] for r in (drawn, summed)
    ]
    # The score function alone is noisy: it has come less than half as far.
    assert gains[0] > 0.3 * gains[1] > 0
    found = evaluate(drawn.model, drawn.guide, data, samples=10)
    assert found.labels is not None
    assert found.labels["classifier"].accuracy > 0.7


def test_an_objective_serves_another_pair_by_the_estimator_that_fits_it():
    def drawn(seed):
        return m2(seed, estimator="score", baseline="average")

    data, used = digits(), SemiSupervised(1.0)
    fitted(m2, data, objective=used)
    assert_same_bits(
        fitted(drawn, data, objective=used), fitted(drawn, data, objective=SemiSupervised(1.0))
    )


def test_a_loss_that_is_not_finite_stops_the_fit():
    with pytest.raises(NonFiniteLoss, match="the loss is"):
        fitted(naive, digits(), objective=SemiSupervised(0.5), learning_rate=1e307, epochs=4)


# How it is run


def test_without_an_objective_it_is_the_bound_of_both_kinds_of_rows():
    data = digits()
    expected = fitted(m2, data, objective=SemiSupervised(0.0))
    assert_same_bits(fitted(m2, data), expected)
    beta = fitted(m2, data, objective=SemiSupervised(0.0, objective=Beta(4.0)))
    assert_same_bits(fitted(m2, data, objective=Beta(4.0)), beta)


def test_with_all_labels_it_is_the_bound_of_x_and_y():
    data = digits(whole=True)
    options = {"labeled_batch": None}
    assert_same_bits(
        fitted(m2, data, objective=SemiSupervised(0.0), **options), fitted(m2, data, **options)
    )


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_leads_to_the_same(parts):
    options: dict[str, Any] = {"objective": SemiSupervised(0.5), "warmup": 1}
    whole, part = (fitted(naive, digits(), accumulate=n, **options) for n in (1, parts))
    torch.testing.assert_close(held(part), held(whole))
    assert part.history[-1]["elbo"] == pytest.approx(whole.history[-1]["elbo"])


EVEN: dict[str, Any] = {"batch_size": 17, "labeled_batch": 4, "warmup": 1}  # 4 batches alike


@pytest.mark.slow
def test_compiled_it_leads_to_the_same():
    eager, compiled = (
        fitted(m2, digits(), objective=penalized(), compile=c, **EVEN) for c in (False, True)
    )
    torch.testing.assert_close(held(compiled), held(eager), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_replicas_are_runs_of_their_own(tmp_path: Path):
    """Without draws, each leads where a run alone does."""
    options = EVEN | {"objective": SemiSupervised(0.5)}
    pairs = [naive(seed) for seed in (1, 2)]
    models, guides = ([pair[i] for pair in pairs] for i in (0, 1))
    replicas = fit(
        models,
        guides,
        digits(),
        seeds=2,
        out=tmp_path / "runs",
        **(PLAIN | options | {"compile": True}),
    ).replicas
    for number, replica in enumerate(replicas):
        alone = fit(*naive(number + 1), digits(), seed=number, **(PLAIN | options))
        torch.testing.assert_close(held(replica), held(alone))
        assert replica.history[-1]["validation_elbo"] == pytest.approx(
            alone.history[-1]["validation_elbo"]
        )
        assert Run.open(tmp_path / "runs" / f"seed-{number}").record["fit"]["labeled_batch"] == 4


BATCHES = 6  # an epoch: 52 rows without labels by 10


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"objective": penalized, "warmup": 2, "patience": 3}, id="penalized"),
        pytest.param({"accumulate": 2, "optimizer": "adamax"}, id="parts"),
    ],
)
def test_resuming_gives_the_same_bits(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Interrupted within an epoch, and at its last batch."""

    def run(out: str, **more: Any) -> Fitted:
        own = {k: v() if callable(v) else v for k, v in options.items()}
        return fitted(
            m2, digits(), out=tmp_path / out, epochs=3, checkpoint_seconds=1e9, **own, **more
        )

    whole = run("whole")
    take, left = TrainingLoop.taken, [0]

    def taken(self: TrainingLoop, loss: Any) -> None:
        take(self, loss)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingLoop, "taken", taken)
    done = 0
    for step in (2, BATCHES, 2 * BATCHES + 3):
        left[0] = step - done
        with pytest.raises(KeyboardInterrupt):
            run("part", resume=done > 0, seed=1 if done == 0 else 9)  # weights are loaded
        done = step
    assert_same_bits(run("part", resume=True), whole)


def test_another_share_of_labels_would_be_another_run(tmp_path: Path):
    fitted(m2, digits(), out=tmp_path / "run")
    with pytest.raises(ValueError, match="begun with labeled_batch=4: going on with labeled_batch"):
        fitted(m2, digits(), out=tmp_path / "run", resume=True, labeled_batch=5)
    with pytest.raises(ValueError, match="was fitted to other data"):
        fitted(m2, digits(known=9), out=tmp_path / "run", resume=True)


# What is refused


def test_several_workers_are_refused(monkeypatch: pytest.MonkeyPatch):
    class Two(Alone):
        count = 2

    monkeypatch.setattr(ppl_vae.fitting, "Alone", Two)
    with pytest.raises(ValueError, match="2 workers: rows with and without labels need one device"):
        fitted(m2, digits())
    monkeypatch.undo()
    fitted(m2, digits(), epochs=1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_the_model_has_no_class_for_are_refused(split):
    splits = {name: dict(columns) for name, columns in digits().splits.items()}
    y = splits[split]["y"].clone()
    y[int((y >= 0).nonzero()[-1])] = K
    splits[split]["y"] = y
    with pytest.raises(PairError, match=rf"{split}\['y'\] has label 3 in row \d+, and M2 has 3 cl"):
        fitted(m2, Dataset("digits", splits))


def test_a_class_without_a_label_is_refused():
    splits = {name: dict(columns) for name, columns in digits().splits.items()}
    y = splits["train"]["y"].clone()
    y[y == 1] = -1
    splits["train"]["y"] = y
    with pytest.raises(ValueError, match="class 1 has no row with a label"):
        fitted(m2, Dataset("digits", splits))


def test_a_guide_without_a_classifier_is_refused():
    model, guide = m2()
    z_alone = Factorized(z=(guide.conditionals["z"], ["x", "y"]))
    with pytest.raises((PairError, ValueError), match="'y'"):
        fit(model, z_alone, digits(), **PLAIN)
