"""A run that is interrupted, and resumed, leads to the bits of one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

from ppl_vae.data import Dataset
from ppl_vae.evaluation import mean_elbo
from ppl_vae.fitting import Fitted, fit
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.loop import TrainingLoop, weights
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import CyclicalWarmup
from ppl_vae.priors import StandardNormal
from ppl_vae.run import Run

BATCHES = 3  # an epoch: 50 rows by 20, the last batch with 10


@pytest.fixture
def grey() -> Dataset:
    """Images of one latent: light on the left and dark on the right, or the other way round."""
    z = torch.randn(80, 1, generator=torch.Generator().manual_seed(0))
    x = (255 * (z * torch.linspace(-6, 6, 6)).sigmoid()).byte()
    return Dataset("grey", {"train": {"x": x[:50]}, "validation": {"x": x[50:]}}, unit=255)


@pytest.fixture
def bits(grey: Dataset) -> Dataset:
    return grey.binarized("static")


def pair(seed: int = 1) -> tuple[VAE, MeanField]:
    torch.manual_seed(seed)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 16, 6)))
    return model, MeanField(model, MLP(6, 16), torch.zeros(2, 6))


def fitted(data: Dataset, *, other: bool = False, **options: Any) -> Fitted:
    """A pair after a few epochs; ``other``: one that starts from other weights."""
    fixed = {"batch_size": 20, "progress": False, "learning_rate": 1e-2}
    return fit(*pair(99 if other else 1), data, **{"epochs": 4, **fixed, **options})


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = Run.open(one), Run.open(other)
    for mine, expected in (
        (ours.latest(), theirs.latest()),
        (ours.load("best"), theirs.load("best")),
    ):
        assert (mine is None) == (expected is None)
        if mine is not None and expected is not None:
            assert_same_tensors(mine.tensors, expected.tensors)
            assert mine.state | {"seconds": 0} == expected.state | {"seconds": 0}
    assert_same_history(ours.metrics(), theirs.metrics())


def assert_same_history(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for row, expected in zip(one, other, strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C pressed in the n-th step from now on, and nowhere else."""
    take = TrainingLoop.taken
    left = [0]

    def taken(self: TrainingLoop, loss: Any) -> None:
        take(self, loss)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingLoop, "taken", taken)
    return lambda steps: left.__setitem__(0, steps)


def jump(optimizer: torch.optim.Optimizer) -> MultiStepLR:
    """A rate that jumps up after two epochs, so that later ones are worse."""
    return MultiStepLR(optimizer, [2], gamma=100)


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """As "plateau" is, but for its patience of ten epochs."""
    return ReduceLROnPlateau(optimizer, mode="max", patience=1, threshold=0)


WORSE: dict[str, Any] = {"epochs": 9, "schedule": jump, "patience": 4}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"schedule": "cosine"}, id="cosine"),
        pytest.param({"schedule": jump}, id="multistep"),
        pytest.param({"schedule": plateau, "epochs": 9, "learning_rate": 0.3}, id="plateau"),
        pytest.param({"schedule": "plateau"}, id="plateau-waiting"),
        pytest.param(WORSE, id="patience"),
        pytest.param(WORSE | {"warmup": 3}, id="patience-warmup"),
        pytest.param({"average": 2, "schedule": jump}, id="average"),
        pytest.param(WORSE | {"average": 3}, id="patience-average"),
        pytest.param({"warmup": CyclicalWarmup(3, cycles=2)}, id="cyclical"),
        pytest.param({"binarize": "dynamic"}, id="dynamic"),
        pytest.param({"precision": "64-true", "binarize": "dynamic"}, id="float64"),
        pytest.param({"precision": "bf16-mixed"}, id="bfloat16"),
        pytest.param({"optimizer": "adamw", "weight_decay": 0.1}, id="adamw"),
        pytest.param({"optimizer": "adamax"}, id="adamax"),
        pytest.param({"max_grad_norm": 1e-2}, id="clipped"),
        pytest.param({"accumulate": 3}, id="accumulated"),
        pytest.param(
            {"compile": True, "warmup": 2, "schedule": jump, "binarize": "dynamic"}, id="compiled"
        ),
    ],
)
def test_resuming_gives_the_same_bits(
    grey: Dataset,
    tmp_path: Path,
    ctrl_c: Callable[[int], None],
    options: dict[str, Any],
) -> None:
    """Interrupted at the first step, within an epoch and at its last batch, each time resumed."""
    options = {"checkpoint_seconds": 1e9, **options}
    data = grey.binarized(options.pop("binarize", "static"))
    whole = fitted(data, out=tmp_path / "whole", **options)
    best = Run.open(tmp_path / "whole").load("best")
    last = (2 if best is None else best.state["epoch"] + 2) * BATCHES
    assert last < len(whole.history) * BATCHES
    if options.get("schedule") not in (None, "plateau"):
        assert len({row["learning_rate"] for row in whole.history}) > 1, "the schedule took effect"

    done = 0
    for step in (1, BATCHES + 2, last):
        ctrl_c(step - done)
        with pytest.raises(KeyboardInterrupt):
            fitted(data, out=tmp_path / "part", resume=done > 0, other=done > 0, **options)
        done = step
        stopped = Run.open(tmp_path / "part")
        assert stopped.record["status"] == "interrupted"
        assert (checkpoint := stopped.latest()) is not None
        assert checkpoint.step == step
    resumed = fitted(data, out=tmp_path / "part", resume=True, other=True, **options)

    assert_same_run(tmp_path / "part", tmp_path / "whole")
    assert_same_history(resumed.history, whole.history)
    assert_same_tensors(weights(resumed.model, resumed.guide), weights(whole.model, whole.guide))


def test_best_weights_are_not_those_of_the_warm_up(bits: Dataset, tmp_path: Path) -> None:
    """Though only epochs of the warm-up are good."""
    result = fitted(bits, out=tmp_path / "run", warmup=4, **WORSE)
    assert result.run is not None
    elbos = {row["epoch"]: row["validation_elbo"] for row in result.history}
    later = {epoch: elbo for epoch, elbo in elbos.items() if epoch >= 4}
    best = max(later, key=later.__getitem__)
    assert max(elbos.values()) > later[best], "an epoch of the warm-up was better"
    checkpoint = result.run.load("best")
    assert checkpoint is not None
    assert checkpoint.state == {"epoch": best, "elbo": later[best]}
    rows = result.data.split("validation")
    assert mean_elbo(result.model, result.guide, rows, seed=0).elbo.item() == later[best]


def test_gradients_are_clipped(bits: Dataset) -> None:
    """Adam's step shrinks when the gradient does not stand out from its epsilon, 1e-8."""
    plain, loose, tight = (fitted(bits, max_grad_norm=n).history for n in (None, 1e9, 1e-9))
    assert_same_history(loose, plain)
    gains = [h[-1]["validation_elbo"] - h[0]["validation_elbo"] for h in (plain, tight)]
    assert 0 < gains[1] < 0.5 * gains[0]


def test_a_finished_run_can_be_trained_further(bits: Dataset, tmp_path: Path) -> None:
    fitted(bits, epochs=4, out=tmp_path / "whole")
    fitted(bits, epochs=2, out=tmp_path / "part")
    fitted(bits, epochs=4, out=tmp_path / "part", resume=True, other=True)
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_resuming_falls_back_past_a_damaged_checkpoint(bits: Dataset, tmp_path: Path) -> None:
    fitted(bits, epochs=4, out=tmp_path / "whole")
    fitted(bits, epochs=2, out=tmp_path / "part", checkpoint_seconds=0.0)
    *_, newest = sorted((tmp_path / "part" / "checkpoints").glob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-7])
    with pytest.warns(RuntimeWarning, match=f"{newest.name}.*falling back to"):
        fitted(bits, epochs=4, out=tmp_path / "part", resume=True, other=True)
    assert_same_run(tmp_path / "part", tmp_path / "whole")
