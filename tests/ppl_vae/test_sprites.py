from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ppl_vae.data import load_data
from ppl_vae.data.sprites import FACTORS, SHAPES, render_sprites, sprites

COUNTS = (3, 4, 10, 8, 8)


def together(data, column):
    return np.concatenate([data.splits[split][column].numpy() for split in data.splits])


@pytest.fixture(scope="module", params=[32, 64])
def grid(request):
    """Images by class numbers: ``(shape, scale, orientation, across, down, height, width)``."""
    x, _ = render_sprites(request.param)
    return x.reshape(*COUNTS, request.param, request.param)


def centers(images):
    """Centers of mass, right and down of the image's middle: ``(..., 2)``."""
    at = np.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    mass = images.sum((-2, -1))
    return np.stack([images.sum(-2) @ at, images.sum(-1) @ at], -1) / mass[..., None]


@pytest.mark.parametrize(("name", "size"), [("sprites", 32), ("sprites64", 64)])
def test_each_combination_appears_once_and_no_two_images_are_alike(name, size, monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", "/nowhere")
    data = load_data(name)
    assert [len(data.splits[s]["x"]) for s in data.splits] == [6144, 768, 768]
    factors, x = together(data, "factors"), together(data, "x")
    found = set(map(tuple, factors.tolist()))
    assert len(found) == len(factors)
    assert found == set(product(*map(range, COUNTS)))
    assert len(np.unique(np.packbits(x, 1), axis=0)) == len(x)
    assert (x.max(), x.dtype, factors.dtype) == (1, np.uint8, np.uint8)
    assert np.array_equal(together(data, "y"), factors[:, 0])
    assert (data.name, data.classes, data.image_shape) == (name, SHAPES, (1, size, size))
    assert (data.unit, data.binarization) == (1.0, "none")
    assert factors.shape[1] == len(FACTORS)


def test_the_seed_gives_the_order():
    one, again, other = (sprites(seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint() == again.fingerprint() == load_data("sprites", seed=7).fingerprint()
    assert not np.array_equal(together(one, "factors"), together(other, "factors"))
    images, factors = render_sprites()
    order = np.random.RandomState(1).permutation(len(images))
    assert np.array_equal(together(other, "x"), images[order])
    assert np.array_equal(together(other, "factors"), factors[order])


def test_a_position_moves_the_same_pixels_by_even_steps_about_the_middle(grid):
    at = centers(grid)
    for axis, coordinate in ((3, 0), (4, 1)):
        steps = np.diff(at[..., coordinate], axis=axis)
        assert np.allclose(steps, grid.shape[-1] / 16)
        assert np.allclose(np.diff(at[..., 1 - coordinate], axis=axis), 0)
    middle = at.mean((3, 4))
    assert abs(middle).max() < 0.4, "every shape turns about its centroid, up to the pixels"


def test_a_scale_makes_larger(grid):
    area = grid.sum((-2, -1)).astype(int)
    assert (np.diff(area, axis=1) > 0).all()
    # The largest fill a circle of a quarter of the image, of which a square is 2 / pi, ...
    circle = np.pi * (grid.shape[-1] / 4) ** 2
    shares = area[:, -1].mean((1, 2, 3)) / circle
    assert shares == pytest.approx([2 / np.pi, 0.5, 2.2009 / np.pi], rel=0.03)
    # ... and the smallest one of 0.6 of that.
    assert area[:, 0].mean((1, 2, 3)) / circle == pytest.approx(0.36 * shares, rel=0.05)


def test_an_orientation_turns_by_its_part_of_a_quarter(grid):
    """By the long axis of an ellipse, from its second moments."""
    ellipses = grid[1, -1, :, 0, 0]
    (x, y) = np.moveaxis(centers(ellipses), -1, 0)[..., None, None]
    at = np.arange(grid.shape[-1]) - (grid.shape[-1] - 1) / 2
    u, v = at - x, at[:, None] - y
    xx, yy, xy = ((ellipses * m).sum((-2, -1)) for m in (u * u, v * v, u * v))
    angle = np.unwrap(0.5 * np.arctan2(-2 * xy, xx - yy), period=np.pi)
    assert np.degrees(angle) == pytest.approx(9 * np.arange(10), abs=4)


def test_the_number_of_classes_is_free():
    images, factors = render_sprites(41, scales=1, orientations=3, positions=1)
    assert images.shape == (9, 41 * 41)
    assert np.array_equal(factors[:, [0, 2]], list(product(range(3), range(3))))
    assert abs(centers(images.reshape(-1, 41, 41))).max() < 1
    assert sprites(48, positions=2, seed=3).describe()["rows"]["train"] == 3 * 4 * 10 * 4 * 8 // 10


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"scales": 0}, r"scales=0: expected 1 to 256"),
        ({"size": 2000, "positions": 257}, r"positions=257: expected 1 to 256"),
        ({"positions": 18}, r"positions=18: a sprite can stand in at most 17 places.*size=32"),
        ({"size": 0}, r"at most 1 places in an image of size=0"),
        ({"size": -8}, r"size=-8"),
        ({"size": 4, "positions": 1}, r"size=4: (the|too small)"),
        ({"orientations": 40}, r"square of scale 0, orientation 2 are the same pixels"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        render_sprites(**arguments)
