"""Rendered sprites: images whose factors are known, made on the spot instead of read from a file.

In the manner of dSprites (Matthey et al. 2017), but smaller, and with factors that the image
always determines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ppl_vae.data.arrays import from_arrays
from ppl_vae.data.dataset import Dataset

SHAPES = ("square", "ellipse", "heart")
FACTORS = ("shape", "scale", "orientation", "across", "down")
"""Names of the columns of ``factors``."""

_SMALLEST = 0.6  # scale of the smallest sprites; of the largest it is 1
_SUPERSAMPLED = 8  # points across a pixel at which a shape is evaluated
# Of the curve (x^2 + y^2 - 1)^3 = x^2 y^3: height of its centroid, and its largest radius there.
_HEART_CENTER, _HEART_RADIUS = 0.29350, 1.28925


def sprites(size: int = 32, *, seed: int = 0, **classes: int) -> Dataset:
    """Every combination of the factors of a sprite, in a random order, split.

    Columns: ``x``, bits ``(N, size * size)``; ``y``, the shape; ``factors``, the class numbers
    ``(N, 5)`` that :data:`FACTORS` names. :func:`render_sprites` says what they mean.

    Args:
        size: height and width of an image, in pixels.
        seed: of the order, which ``numpy.random.RandomState`` draws; train comes first, then
            validation, then test, with a tenth each, rounded down, for the last two.
        classes: ``scales``, ``orientations``, ``positions``, as :func:`render_sprites` takes them.

    Raises:
        ValueError: whatever :func:`render_sprites` refuses.
    """
    x, factors = render_sprites(size, **classes)
    return from_arrays(
        {"x": x, "y": factors[:, 0], "factors": factors},
        name="sprites" if size == 32 else f"sprites{size}",
        image_shape=(1, size, size),
        classes=SHAPES,
        seed=seed,
    )


def render_sprites(
    size: int = 32, *, scales: int = 4, orientations: int = 10, positions: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a square, an ellipse and a heart in every scale, orientation and position.

    A pixel is 1 where the shape covers at least half of it, so that a Bernoulli is a likelihood.

    - The largest sprites fill a circle of a quarter of ``size`` in radius, the smallest one of 0.6
      of that; scales between are evenly spaced.
    - Orientation k is ``k / orientations`` of a quarter turn. In dSprites sprites turn all the way
      round, where a square has four orientations that look the same, and an ellipse two: no code
      could tell them apart. Less than a quarter turn leaves none.
    - Positions are whole pixels apart, evenly, and their middle is the image's. A sprite turns
      about its centroid. The first class is left, or up.

    Args:
        size: height and width of an image, in pixels.
        scales, orientations, positions: number of classes of each; positions of both across and
            down.

    Returns:
        Images ``(N, size * size)`` of uint8 bits and factors ``(N, 5)`` of uint8 class numbers, N =
        ``3 * scales * orientations * positions**2``, in lexicographic order of the factors.

    Raises:
        ValueError: a number of classes below 1 or above 256; more positions than there are pixels
            to move by; two sprites that are the same pixels, since ``size`` is too small for so
            many scales and orientations.
    """
    counts = {"scales": scales, "orientations": orientations, "positions": positions}
    for name, count in counts.items():
        if not 1 <= count <= 256:
            raise ValueError(f"{name}={count}: expected 1 to 256 classes")
    box = size // 2
    room = size - box
    if size < 2 or positions > room + 1:
        raise ValueError(
            f"positions={positions}: a sprite can stand in at most {max(room, 0) + 1} places in "
            f"an image of size={size}; take fewer positions or a larger size"
        )
    shapes = _draw(box, scales, orientations)
    _check_distinct(shapes, size)
    step = room // max(positions - 1, 1)
    first = (room - step * (positions - 1)) // 2
    images = np.zeros((*shapes.shape[:3], positions, positions, size, size), np.uint8)
    for across, down in np.ndindex(positions, positions):
        top, left = first + step * down, first + step * across
        images[:, :, :, across, down, top : top + box, left : left + box] = shapes
    factors = np.indices(images.shape[:5], np.uint8).reshape(5, -1).T
    return images.reshape(-1, size * size), factors


def _draw(box: int, scales: int, orientations: int) -> np.ndarray:
    """Sprites in the middle of a box of pixels: ``(3, scales, orientations, box, box)`` bits."""
    fine = _SUPERSAMPLED
    points = (np.arange(box * fine) + 0.5) / (box * fine) * 2 - 1
    x, y = np.meshgrid(points, -points)  # y upwards
    sprites = np.empty((len(_INSIDE), scales, orientations, box, box), np.uint8)
    for k, scale in enumerate(np.linspace(1, _SMALLEST, scales)[::-1]):
        for o in range(orientations):
            turn = np.exp(-0.5j * np.pi * o / orientations) / scale
            turned = turn * (x + 1j * y)
            for s, inside in enumerate(_INSIDE):
                covered = inside(turned.real, turned.imag).reshape(box, fine, box, fine)
                sprites[s, k, o] = covered.mean((1, 3)) >= 0.5
    return sprites


def _check_distinct(shapes: np.ndarray, size: int) -> None:
    """Refuse sprites of different factors that are the same pixels, wherever in the image."""
    seen: dict[tuple[bytes, int], tuple[int, ...]] = {}
    for factors in np.ndindex(shapes.shape[:3]):
        rows, columns = (np.flatnonzero(shapes[factors].any(axis)) for axis in (1, 0))
        if not len(rows):
            raise ValueError(f"size={size}: too small, the smallest sprites have no pixels")
        pixels = shapes[factors][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        other = seen.setdefault((pixels.tobytes(), len(rows)), factors)
        if other != factors:
            one, two = (
                f"{SHAPES[s]} of scale {k}, orientation {o}" for s, k, o in (other, factors)
            )
            raise ValueError(
                f"size={size}: the {one} and the {two} are the same pixels; take fewer scales or "
                "orientations, or a larger size"
            )


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 0.5**0.5


def _ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Twice as wide as high."""
    return x**2 + 4 * y**2 <= 1


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x * _HEART_RADIUS, y * _HEART_RADIUS + _HEART_CENTER
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


_INSIDE: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (_square, _ellipse, _heart)
"""Whether points lie in each of ``SHAPES``, of radius 1 around their centroid."""
