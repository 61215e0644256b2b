"""Training images moved at random: how they move, and that a fit trains on moved rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from ppl_vae.augmentation import Shifts
from ppl_vae.data import Dataset
from ppl_vae.fitting import Fitted, fit
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.loop import weights
from ppl_vae.models.conditional import ConditionalVAE
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.run import Run

SHAPE = (1, 4, 5)
HALF = torch.tensor(0.5)


def images(rows: int, *shape: int) -> Tensor:
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(1)).round()


@pytest.fixture
def data() -> Dataset:
    x = images(120, *SHAPE).reshape(120, -1).to(torch.uint8)
    return Dataset("bits", {"train": {"x": x[:80]}, "validation": {"x": x[80:]}}, image_shape=SHAPE)


def zeros(data: Dataset) -> Dataset:
    x = torch.zeros_like(data.splits["train"]["x"])
    return replace(data, splits={**data.splits, "train": {"x": x}})


def vae(seed: int = 1) -> tuple[VAE, MeanField]:
    torch.manual_seed(seed)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 8, 20)))
    return model, MeanField(model, MLP(20, 8), torch.zeros(2, 20))


def fitted(data: Any, pair: tuple[Any, Any] | None = None, **options: Any) -> Fitted:
    fixed = {"epochs": 3, "batch_size": 40, "learning_rate": 1e-2, "progress": False}
    return fit(*(pair or vae()), data, **{**fixed, "compile": False, **options})


def final(result: Fitted) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights(result.model, result.guide).items()}


def assert_same(one: Fitted, other: Fitted, **tolerance: float) -> None:
    for name, tensor in final(one).items():
        torch.testing.assert_close(tensor, final(other)[name], **(tolerance or _EXACT))


_EXACT = {"rtol": 0.0, "atol": 0.0}


def differ(one: Fitted, other: Fitted) -> bool:
    return any((tensor != final(other)[name]).any() for name, tensor in final(one).items())


def test_one_pixel_goes_where_the_law_says() -> None:
    """Along an axis of the middle pixel: stays with 1/2, else 1 or 2 either way, all alike."""
    rows = 20_000
    pixel = torch.zeros(rows, 1, 5, 7)
    pixel[:, :, 2, 3] = 1.0
    torch.manual_seed(0)
    moved = Shifts(2)(pixel, HALF)
    assert (moved.sum((1, 2, 3)) == 1).all()  # never lost here, never doubled
    law = torch.tensor([0.125, 0.125, 0.5, 0.125, 0.125], dtype=torch.float64)
    expected = law[:, None] * law
    seen = moved.sum((0, 1))
    assert seen[:, [0, -1]].sum() == 0  # farther than two pixels
    assert chisquare(seen[:, 1:-1].flatten(), rows * expected.flatten()).pvalue > 1e-3


def test_a_move_loses_what_leaves_and_lets_zeros_in() -> None:
    """Each moved image is one of the nine that padding and cutting make of it, in all channels."""
    before = images(200, 3, 4, 6)
    torch.manual_seed(0)
    after = Shifts(1)(before, HALF)
    padded = torch.nn.functional.pad(before, (1, 1, 1, 1))
    cuts = [padded[:, :, i : i + 4, j : j + 6] for i in range(3) for j in range(3)]
    is_cut = torch.stack([(after == cut).all(3).all(2).all(1) for cut in cuts])
    assert is_cut.any(0).all()
    assert (is_cut.sum(1) > 0).all()  # and each of the nine occurs


def test_no_share_no_move() -> None:
    before = images(50, *SHAPE)
    assert (Shifts(3)(before, torch.tensor(0.0)) == before).all()
    moved = Shifts(1, share=1.0)(before, torch.tensor(1.0))
    assert (moved != before).flatten(1).any(1).all()


def test_shifts_end() -> None:
    assert [Shifts(share=0.3, epochs=2).at(epoch) for epoch in (0, 1.99, 2, 9)] == [0.3, 0.3, 0, 0]
    assert Shifts(share=0.3).at(1e6) == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": 0}, "pixels=0.*at least 1"),
        ({"pixels": 1.5}, "pixels=1.5.*whole number"),
        ({"share": 1.1}, "share=1.1.*from 0 to 1"),
        ({"share": float("nan")}, "share=nan.*from 0 to 1"),
        ({"epochs": -1}, "epochs=-1.*at least 0"),
    ],
)
def test_wrong_shifts_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shifts(**arguments)


@dataclass(frozen=True)
class Blank:
    """Leaves nothing of the images."""

    epochs: float = math.inf

    def at(self, epoch: float) -> float:
        return float(epoch < self.epochs)

    def __call__(self, images: Tensor, share: Tensor) -> Tensor:
        assert images.shape[1:] == SHAPE
        return images * (1 - share)


def test_a_fit_trains_on_changed_rows_and_validates_by_the_rows_themselves(data: Dataset) -> None:
    blank = fitted(data, augment=Blank(), epochs=30)
    of_zeros = fitted(zeros(data), epochs=30)
    assert_same(blank, of_zeros)
    for name in ("elbo", "validation_elbo"):
        assert blank.history[-1][name] == of_zeros.history[-1][name]
    assert blank.history[-1]["validation_elbo"] < blank.history[-1]["elbo"] - 5
    first, second = (row["elbo"] for row in fitted(data, augment=Blank(epochs=1)).history[:2])
    assert first == of_zeros.history[0]["elbo"]
    assert second < of_zeros.history[1]["elbo"]


def test_the_data_stay_as_they_are(data: Dataset) -> None:
    before = data.splits["train"]["x"].clone()
    fitted(data, augment=Shifts())
    assert (data.splits["train"]["x"] == before).all()


def test_compiled_shifts_are_the_eager_ones_and_end_in_time(data: Dataset) -> None:
    """Of the same noise. A compiled step follows the share, which is 0 after two epochs."""
    ending: dict[str, Any] = {"pixels": 2, "share": 0.7, "epochs": 2}
    eager = fitted(data, augment=Shifts(**ending), epochs=4)
    compiled = fitted(data, augment=Shifts(**ending), epochs=4, compile=True)
    assert_same(eager, compiled, rtol=1e-4, atol=1e-5)
    assert differ(eager, fitted(data, augment=Shifts(2, 0.7), epochs=4))


def test_a_resumed_fit_moves_on_to_the_same_bits(data: Dataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"augment": Shifts(epochs=3), "learning_rate": 1e-2}
    whole = fitted(data, epochs=4, **options)
    fitted(data, epochs=2, out=tmp_path / "run", **options)
    assert Run.open(tmp_path / "run").record["fit"]["augment"] == (
        "Shifts(pixels=1, share=0.5, epochs=3)"
    )
    resumed = fitted(data, epochs=4, out=tmp_path / "run", resume=True, **options)
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match="begun with augment=Shifts"):
        fitted(data, epochs=5, out=tmp_path / "run", resume=True)


def test_replicas_train_on_changed_rows(data: Dataset) -> None:
    """Compiled as one program."""

    def replicas(trained_on: Dataset, **options: Any) -> list[Fitted]:
        models, guides = zip(vae(1), vae(2), strict=True)
        pair = list(models), list(guides)
        return fitted(trained_on, pair, seeds=2, compile=True, **options).replicas

    for blank, of_zeros in zip(replicas(data, augment=Blank()), replicas(zeros(data)), strict=True):
        assert_same(blank, of_zeros)


def test_what_is_no_augmentation_is_refused(data: Dataset) -> None:
    with pytest.raises(ValueError, match="augment='shifts': expected an augmentation, such as"):
        fitted(data, augment="shifts")


def test_data_that_are_no_images_are_refused(data: Dataset) -> None:
    with pytest.raises(ValueError, match="augment: expected images in column x; bits has none"):
        fitted(replace(data, image_shape=None), augment=Shifts())


def test_columns_that_belong_to_x_are_refused(data: Dataset) -> None:
    with_c = {
        name: {**columns, "c": columns["x"][:, :3].float()} for name, columns in data.splits.items()
    }
    model = ConditionalVAE(StandardNormal(2), Bernoulli(MLP(5, 8, 20)))
    with pytest.raises(ValueError, match="augment changes x alone, and ConditionalVAE observes c"):
        fitted(replace(data, splits=with_c), (model, nn.Module()), augment=Shifts())
