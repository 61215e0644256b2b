"""Quadrants of images: given and hidden parts are the image, and can be put together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppl_vae.data import Dataset, load_data
from ppl_vae.data.quadrants import Hidden, quadrants, visible, whole

HIDDEN: list[Hidden] = [1, 2, 3]

# As the tutorial of Pyro parts 28 x 28 images: what is given, in quarters of the image.
GIVEN = {1: [[1, 1], [1, 0]], 2: [[1, 0], [1, 0]], 3: [[0, 0], [1, 0]]}


def images(shape: tuple[int, int, int] = (1, 28, 28), rows: int = 5, unit: float = 1.0) -> Dataset:
    noise = torch.Generator().manual_seed(0)
    pixels = shape[0] * shape[1] * shape[2]
    x = torch.randint(2 if unit == 1 else 256, (rows, pixels), generator=noise, dtype=torch.uint8)
    columns = {"x": x, "y": torch.arange(rows), "weight": torch.rand(rows, 1, generator=noise)}
    return Dataset("images", {"train": columns, "test": columns}, image_shape=shape, unit=unit)


def rows(dataset: Dataset) -> dict[str, Tensor]:
    return dataset.split("test").batch(slice(None))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_given_quadrants(hidden: Hidden) -> None:
    expected = torch.tensor(GIVEN[hidden]).bool()
    given = visible((3, 28, 28), hidden).reshape(3, 2, 14, 2, 14)
    for channel in given:
        assert torch.equal(channel.all(3).all(1), expected)
        assert torch.equal(channel.any(3).any(1), expected)


@pytest.mark.parametrize("unit", [1.0, 255.0])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 4)], ids=["grey", "color"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_both_parts_together_are_the_image(
    hidden: Hidden, shape: tuple[int, int, int], unit: float
) -> None:
    dataset = images(shape, unit=unit)
    parted = rows(quadrants(dataset, hidden))
    x, c, image = parted["x"], parted["c"], rows(dataset)["x"]
    assert x.shape[1] + c.shape[1] == image.shape[1]
    assert torch.equal(whole(x, c, shape, hidden), image)
    assert torch.equal(parted["y"], torch.arange(5))
    assert torch.equal(parted["weight"], rows(dataset)["weight"])
    # Several completions of one image.
    drawn = torch.rand(4, *x.shape)
    completed = whole(drawn, c, shape, hidden)
    assert completed.shape == (4, *image.shape)
    given = visible(shape, hidden)
    assert torch.equal(completed[..., ~given], drawn)
    assert torch.equal(completed[2][:, given], image[:, given])


def test_a_rectangle_can_be_drawn() -> None:
    dataset = images((1, 5, 4))
    assert [quadrants(dataset, h).image_shape for h in HIDDEN] == [(1, 3, 2), (1, 5, 2), None]
    parted = quadrants(dataset, 2)
    image = rows(dataset)["x"].reshape(5, 5, 4)
    assert torch.equal(rows(parted)["x"].reshape(5, 5, 2), image[:, :, 2:])
    assert torch.equal(rows(parted)["c"].reshape(5, 5, 2), image[:, :, :2])


def test_bits_and_counts_stay_what_they_are() -> None:
    digits = load_data("digits")
    counts = quadrants(digits, 1)
    assert rows(counts)["x"].max() == 16
    assert rows(counts)["c"].max() == 16
    bits = quadrants(images(), 1)
    assert bits.splits["train"]["c"].dtype == torch.uint8
    grey = images(unit=255.0)
    static = quadrants(grey.binarized("static"), 3)
    assert static.binarization == "static"
    assert set(rows(static)["c"].unique().tolist()) == {0.0, 1.0}


def test_what_cannot_be_parted_is_refused() -> None:
    dataset = images(unit=255.0)
    with pytest.raises(ValueError, match=r'one draw; take binarize="static"'):
        quadrants(dataset.binarized("dynamic"), 1)
    with pytest.raises(ValueError, match=r"hidden=4: expected 1, 2 or 3 of the four quadrants"):
        quadrants(dataset, 4)  # pyright: ignore[reportArgumentType]
    parted = quadrants(dataset, 1)
    with pytest.raises(ValueError, match=r"has a column 'c' already"):
        quadrants(parted, 1)
    with pytest.raises(ValueError, match=r"no images to part: its image_shape is None"):
        quadrants(quadrants(dataset, 3), 1)
    with pytest.raises(ValueError, match=r"images of 1 x 4 pixels have no quadrants"):
        quadrants(images((1, 1, 4)), 1)
    with pytest.raises(ValueError, match=r"x has 3 pixels and c 3; .* expected 3 and 1"):
        whole(torch.zeros(2, 3), torch.zeros(2, 3), (1, 2, 2), 3)
