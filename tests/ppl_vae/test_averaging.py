"""Weights averaged over epochs: what they are, and that a fit is validated by them, ends with them,
and comes back with them from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import ppl_vae
from ppl_vae.averaging import WeightAverage, averaged
from ppl_vae.evaluation import mean_elbo
from ppl_vae.fitting import Fitted, fit
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.loop import weights
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

EPOCHS = 6


@pytest.fixture
def data() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = PPCA(2, 5, scale=0.5).simulate(250)["x"]
    return {"train": x[:200], "validation": x[200:]}


def ppca(seed: int = 1) -> tuple[PPCA, MeanField]:
    torch.manual_seed(seed)
    model = PPCA(2, 5)
    return model, MeanField(model, MLP(5, 16), torch.zeros(2, 5))


def fitted(data: Any, pair: tuple[Any, Any] | None = None, **options: Any) -> Fitted:
    fixed = {"epochs": EPOCHS, "batch_size": 40, "learning_rate": 1e-2, "progress": False}
    return fit(*(pair or ppca()), data, **{**fixed, **options})


def held(result: Fitted) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights(result.model, result.guide).items()}


def weights_by_epoch(data: Any, **options: Any) -> list[dict[str, Tensor]]:
    """Of a fit without averages, at the end of each epoch: a scheduler sees that moment."""
    pair = ppca()
    seen: list[dict[str, Tensor]] = []

    class Looking(LambdaLR):
        def step(self, epoch: int | None = None) -> None:
            if self.last_epoch >= 0:  # torch calls it once before the first epoch
                seen.append({name: t.clone() for name, t in weights(*pair).items()})
            super().step(epoch)

    fitted(data, pair, schedule=lambda optimizer: Looking(optimizer, lambda _: 1.0), **options)
    return seen


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [0.0, 4.0, 6.0, 8.0, 2.0, 1.0, 3.0, 5.0, 10.0, 1.0]),
        # By 1 of the way for four epochs, by 1/2 for four more, then by 1/3 or what the window is.
        (2, [0.0, 4.0, 6.0, 8.0, 5.0, 3.0, 3.0, 4.0, 7.0, 4.0]),
        (9, [0.0, 4.0, 6.0, 8.0, 5.0, 3.0, 3.0, 4.0, 6.0, 13 / 3]),
    ],
)
def test_an_epoch_moves_the_mean_by_its_share(window: int, expected: list[float]) -> None:
    model, guide = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
    average = WeightAverage(model, guide, window)
    values = [0.0, 4.0, 6.0, 8.0, 2.0, 1.0, 3.0, 5.0, 10.0, 1.0]
    for value, mean in zip(values, expected, strict=True):
        with torch.no_grad():
            model.weight.fill_(value)
        guide.running_mean = torch.tensor([value])
        average.add()
        with average.in_place():
            assert model.weight.item() == pytest.approx(mean)
            assert guide.running_mean.item() == value, "buffers are the last ones"
        assert model.weight.item() == value
    average.put()
    assert model.weight.item() == pytest.approx(expected[-1])


def test_an_error_within_leaves_the_weights_as_they_were() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, nn.Identity(), 2)
    average.add()
    with torch.no_grad():
        model.weight.fill_(9.0)

    def failing() -> None:
        with average.in_place():
            assert not (model.weight == 9.0).any()
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        failing()
    assert (model.weight == 9.0).all()


def test_a_checkpoints_averages_take_the_place_of_the_others() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    given = {"model.w": one, "model.buffer": one, "mean.model.w": two, "optimizer.0.step": one}
    assert averaged(given) == {"model.w": two, "model.buffer": one, "optimizer.0.step": one}


@pytest.mark.parametrize("compile", [False, True])
def test_a_fit_ends_with_the_mean_of_its_last_epochs(
    data: dict[str, Tensor], compile: bool
) -> None:
    seen = weights_by_epoch(data, compile=compile)
    assert len(seen) == EPOCHS
    result = fitted(data, average=2, compile=compile)
    # Of epoch 4 a quarter, of 5 a quarter, of 6 a half.
    parts = ((3, 0.25), (4, 0.25), (5, 0.5))
    mean = {name: torch.stack([p * seen[i][name] for i, p in parts]).sum(0) for name in seen[0]}
    assert_close(held(result), mean)
    assert (mean["guide.encoder.0.weight"] - seen[-1]["guide.encoder.0.weight"]).abs().max() > 1e-3
    rows = result.data.split("validation")
    elbo = mean_elbo(result.model, result.guide, rows, seed=0).elbo.item()
    assert result.history[-1]["validation_elbo"] == pytest.approx(elbo, abs=1e-5)


def test_steps_do_not_see_the_averages(data: dict[str, Tensor]) -> None:
    plain, one, several = (fitted(data, average=window) for window in (None, 1, 4))
    assert all(torch.equal(t, held(plain)[name]) for name, t in held(one).items())
    for mine, other, same in zip(several.history, plain.history, one.history, strict=True):
        assert mine["elbo"] == other["elbo"]
        assert same | {"seconds": 0} == other | {"seconds": 0}
    assert several.history[-1]["validation_elbo"] != plain.history[-1]["validation_elbo"]


@pytest.mark.parametrize("patience", [None, 50])
def test_a_run_is_loaded_with_its_averages(
    data: dict[str, Tensor], tmp_path: Path, patience: int | None
) -> None:
    result = fitted(data, average=3, patience=patience, out=tmp_path / "run")
    loaded = ppl_vae.load(tmp_path / "run", *ppca(seed=9), data)
    for name, tensor in held(loaded).items():
        assert torch.equal(tensor, held(result)[name])
    plain = fitted(data, patience=patience)
    assert any(not torch.equal(t, held(plain)[name]) for name, t in held(result).items())


def test_the_best_averages_are_kept(data: dict[str, Tensor], tmp_path: Path) -> None:
    """With a learning rate so high that later epochs are worse."""
    options: dict[str, Any] = {"epochs": 40, "learning_rate": 0.3, "batch_size": 10, "patience": 4}
    result = fitted(data, average=2, out=tmp_path / "run", **options)
    validation = [row["validation_elbo"] for row in result.history]
    assert len(validation) == validation.index(max(validation)) + 1 + 4
    rows = result.data.split("validation")
    assert mean_elbo(result.model, result.guide, rows, seed=0).elbo.item() == max(validation)


def test_each_replica_has_its_own_averages(data: dict[str, Tensor]) -> None:
    result = fitted(data, seeds=2, average=EPOCHS, compile=True)
    for replica in result.replicas:
        rows = replica.data.split("validation")
        seed = result.replicas.index(replica)
        elbo = mean_elbo(replica.model, replica.guide, rows, seed=seed).elbo.item()
        assert replica.history[-1]["validation_elbo"] == pytest.approx(elbo, abs=1e-5)
    first, second = map(held, result.replicas)
    assert any(not torch.equal(first[name], second[name]) for name in first)
