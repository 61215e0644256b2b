"""Many seeds at once: each replica is a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ppl_vae.replicas
from ppl_vae.checkpoints import Checkpoints
from ppl_vae.fitting import Fitted, fit
from ppl_vae.graphs import Untraceable
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.loop import weights
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.run import Run
from ppl_vae.svi import NonFiniteLoss

SEEDS = 3


@pytest.fixture
def data() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = PPCA(2, 5, scale=0.5).simulate(250)["x"]
    return {"train": x[:200], "validation": x[200:]}


def pair(seed: int) -> tuple[PPCA, MeanField]:
    torch.manual_seed(seed)
    model = PPCA(2, 5)
    return model, MeanField(model, MLP(5, 8), torch.zeros(2, 5))


def fitted(data: Any, **options: Any) -> Fitted:
    pairs = [pair(seed) for seed in range(SEEDS)]
    models, guides = ([p[i] for p in pairs] for i in (0, 1))
    defaults = {"epochs": 3, "batch_size": 100, "progress": False, "compile": True, "seeds": SEEDS}
    return fit(models, guides, data, **(defaults | options))


def held(result: Fitted) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in weights(result.model, result.guide).items()}


def test_replicas_are_runs_of_their_own(data: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights, metrics, folders; a last batch that is smaller; annealing; a schedule."""
    options = {"batch_size": 80, "warmup": 2, "schedule": "cosine", "learning_rate": 1e-2}
    result = fitted(data, out=tmp_path / "runs", **options)
    assert len(result.replicas) == SEEDS
    assert result.replicas[0] is result
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["seed-0", "seed-1", "seed-2"]
    finals = []
    for seed, replica in enumerate(result.replicas):
        assert replica.run is not None
        run = Run.open(tmp_path / "runs" / f"seed-{seed}")
        assert run.record["seed"] == seed
        assert run.record["status"] == "finished"
        assert run.record["compiled_batches"] == [80, 40]
        assert run.metrics() == replica.history
        assert [row["epoch"] for row in replica.history] == [1, 2, 3]
        assert replica.history[-1]["validation_elbo"] > replica.history[0]["validation_elbo"]
        rates = [row["learning_rate"] for row in replica.history]
        assert rates == sorted(rates, reverse=True)
        checkpoint = run.latest()
        assert checkpoint is not None
        for name, tensor in held(replica).items():
            assert torch.equal(checkpoint.tensors[name], tensor), name
        finals.append(replica.history[-1]["elbo"])
    assert len(set(finals)) == SEEDS


def test_a_pair_is_copied_for_each_seed(data: dict[str, Tensor]) -> None:
    model, guide = pair(0)
    before = {k: v.clone() for k, v in weights(model, guide).items()}
    result = fit(model, guide, data, seeds=2, epochs=1, progress=False, compile=False)
    assert all(torch.equal(before[k], v) for k, v in weights(model, guide).items())
    first, second = map(held, result.replicas)
    assert any(not torch.equal(first[name], second[name]) for name in first), "noise differs"
    with pytest.raises(ValueError, match=r"1 models and 1 guides for seeds=2"):
        fit([model], [guide], data, seeds=2)


def test_eager_replicas_equal_compiled_ones_in_distribution(data: dict[str, Tensor]) -> None:
    """A mean-field fit of PPCA ends near its optimum, whose ELBO is known; both ways do, and the
    replicas' spread is that of noise."""
    ends = {}
    for compile in (True, False):
        options = {"epochs": 60, "learning_rate": 2e-2, "batch_size": 80, "precision": "64-true"}
        result = fitted(data, compile=compile, **options)
        ends[compile] = torch.tensor([r.history[-1]["validation_elbo"] for r in result.replicas])
    torch.testing.assert_close(ends[True].mean(), ends[False].mean(), atol=0.15, rtol=0)


@pytest.mark.slow
def test_an_interrupted_fit_of_seeds_goes_on_to_the_same_bits(
    data: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while checkpoints were written: the first replica has one more than the others."""
    whole = fitted(data, out=tmp_path / "whole", checkpoint_seconds=0)

    class Killed(BaseException):
        pass

    save, saves = Checkpoints.save, [0]

    def failing(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saves[0] += 1
        if saves[0] == 3 * SEEDS + 1:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", failing)
    with pytest.raises(Killed):
        fitted(data, out=tmp_path / "part", checkpoint_seconds=0)
    monkeypatch.undo()
    steps = [Run.open(tmp_path / "part" / f"seed-{s}").steps()[0] for s in range(SEEDS)]
    assert steps[0] > steps[1] == steps[2]
    resumed = fitted(data, out=tmp_path / "part", checkpoint_seconds=0, resume=True)
    for one, other in zip(resumed.replicas, whole.replicas, strict=True):
        mine, expected = held(one), held(other)
        assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_replicas_that_stop_early_keep_their_best_weights(data: dict[str, Tensor]) -> None:
    result = fitted(data, epochs=30, patience=2, learning_rate=0.1)
    lengths = [len(replica.history) for replica in result.replicas]
    assert min(lengths) < 30
    for replica in result.replicas:
        assert replica.run is None
        elbos = [row["validation_elbo"] for row in replica.history]
        assert len(elbos) - 1 - elbos.index(max(elbos)) <= 2


def test_without_a_joint_program_replicas_are_trained_one_by_one(
    data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise Untraceable("no rule for aten.thing")

    monkeypatch.setattr(ppl_vae.replicas, "vectorize", refuse)
    with pytest.warns(RuntimeWarning, match="replicas are trained one by one.*aten.thing"):
        result = fitted(data, batch_size=100)
    assert all(len(replica.history) == 3 for replica in result.replicas)


@pytest.mark.filterwarnings("ignore:Encountered")
def test_a_replica_whose_loss_is_not_finite_stops_all(data: dict[str, Tensor]) -> None:
    spoiled = {**data, "train": data["train"].clone()}
    spoiled["train"][3, 1] = 1e30
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, batch \d: the loss is (inf|nan)"):
        fitted(spoiled, compile=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds=0: expected a whole number of at least 1, or None"),
        ({"devices": 2}, "seeds=3: expected None with several devices"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(
    data: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(data, **options)
