"""Images to complete: quadrants that are given as covariates, and the others, which are modeled.

The task of Sohn et al. 2015 ("Learning structured output representation using deep conditional
generative models", section 5.1), with the quadrants of Pyro's tutorial on conditional VAEs:

    hidden=3          hidden=2          hidden=1
    . .               c .               c c
    c .               c .               c .

c is given, and the dots are x. Where a side is odd, the upper and the left part are the smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ppl_vae.data.dataset import Dataset

Hidden = Literal[1, 2, 3]
ImageShape = tuple[int, int, int]


def quadrants(dataset: Dataset, hidden: Hidden) -> Dataset:
    """The data set with its images parted: ``c``, what is given, and ``x``, what is hidden.

    Pixels of each part stand in the order in which they stand in the image: see :func:`whole`. x is
    stored as before, and has the unit of the images; c is what a batch of them would hold, that is,
    divided by the unit. Other columns stay. The ``image_shape`` is that of the hidden part, or None
    where that is no rectangle.

    Args:
        dataset: of images, with bits that are fixed, or none.
        hidden: how many quadrants: 1, the lower right one; 2, the right half; 3, all but the lower
            left one.

    Raises:
        ValueError: another number; no images; bits that each batch draws anew, of which c could not
            be the same draw; a column ``c`` that is there already; images of one pixel across or
            up.
    """
    shape = dataset.image_shape
    if shape is None or "x" not in dataset.columns:
        raise ValueError(f"{dataset.name} has no images to part: its image_shape is {shape}")
    if dataset.binarization == "dynamic":
        raise ValueError(
            f"quadrants of {dataset.name}: its bits are drawn anew at each batch, and both parts "
            'must be of one draw; take binarize="static"'
        )
    if "c" in dataset.columns:
        raise ValueError(f"{dataset.name} has a column 'c' already: rename it")
    given = visible(shape, hidden)
    splits: dict[str, dict[str, Tensor]] = {}
    for split, columns in dataset.splits.items():
        c = columns["x"][:, given]
        if dataset.unit != 1:
            c = c.to(torch.get_default_dtype()) / dataset.unit
        splits[split] = {**columns, "x": columns["x"][:, ~given], "c": c}
    channels, height, width = shape
    right, lower = width - width // 2, height - height // 2
    parts = {1: (channels, lower, right), 2: (channels, height, right), 3: None}
    name = f"{dataset.name}, {hidden} of 4 quadrants hidden"
    return replace(dataset, name=name, splits=splits, image_shape=parts[hidden])


def visible(image_shape: ImageShape, hidden: Hidden) -> Tensor:
    """Which pixels of a flat image are given: bools ``(D,)``.

    Raises:
        ValueError: ``hidden`` is not 1, 2 or 3, or there are fewer than 2 pixels across or up.
    """
    channels, height, width = image_shape
    if hidden not in (1, 2, 3):
        raise ValueError(f"hidden={hidden}: expected 1, 2 or 3 of the four quadrants")
    if min(height, width) < 2:
        raise ValueError(f"images of {height} x {width} pixels have no quadrants")
    given = torch.zeros(channels, height, width, dtype=torch.bool)
    given[:, height // 2 :, : width // 2] = True
    if hidden < 3:
        given[:, :, : width // 2] = True
    if hidden < 2:
        given[:, : height // 2] = True
    return given.flatten()


def whole(x: Tensor, c: Tensor, image_shape: ImageShape, hidden: Hidden) -> Tensor:
    """Images put together again from their parts, for pictures.

    Shapes: ``(..., hidden pixels)`` and ``(..., given pixels)``, of which the leading dims are
    broadcast, to ``(..., D)``.

    Args:
        image_shape: of the whole images.
        hidden: as in :func:`quadrants`.

    Raises:
        ValueError: as :func:`visible`; parts of another size.
    """
    given = visible(image_shape, hidden).to(x.device)
    sizes = int((~given).sum()), int(given.sum())
    if (x.shape[-1], c.shape[-1]) != sizes:
        raise ValueError(
            f"whole: x has {x.shape[-1]} pixels and c {c.shape[-1]}; with {hidden} quadrants of "
            f"{image_shape} hidden, expected {sizes[0]} and {sizes[1]}"
        )
    batch = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
    image = x.new_empty(*batch, sum(sizes))
    image[..., ~given] = x.expand(*batch, -1)
    image[..., given] = c.to(x.dtype).expand(*batch, -1)
    return image
