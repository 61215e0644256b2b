"""Stand-ins for known data sets whose files are not at hand.

Recipes read their data to learn shapes. Who has a trained model, and not the data, builds it on
rows of the right shapes, whose values mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ppl_vae.data.dataset import Dataset

_STANDING_IN: ContextVar[tuple[Mapping[str, Dataset], dict[str, str]]] = ContextVar(
    "stand-ins for data sets", default=({}, {})
)

_MOST_ROWS = {"train": 5000, "validation": 500, "test": 500}
"""Rows of a stand-in: enough to draw labels and pseudo-inputs from, and small."""


@contextmanager
def standing_in(datasets: Mapping[str, Dataset]) -> Iterator[dict[str, str]]:
    """Within it, `load_data` gives these data sets in place of known ones whose files are missing.

    Files that are there are read; nothing is downloaded in place of those that are not.

    Args:
        datasets: by the names that `load_data` knows; as it would read them, before any
            binarization.

    Yields:
        what was missing: name -> where its files were looked for; filled as names are asked for.
    """
    missing: dict[str, str] = {}
    token = _STANDING_IN.set((datasets, missing))
    try:
        yield missing
    finally:
        _STANDING_IN.reset(token)


def has_stand_in(name: str) -> bool:
    """Whether something stands in for a known data set."""
    return name in _STANDING_IN.get()[0]


def take_stand_in(name: str, why: str) -> Dataset | None:
    """What stands in for a known data set, if anything does; notes why it was needed."""
    datasets, missing = _STANDING_IN.get()
    if name in datasets:
        missing[name] = why
    return datasets.get(name)


def stand_in(description: Mapping[str, Any]) -> Dataset:
    """A data set of noise that `Dataset.describe` would describe so, but for fewer rows.

    `x` is uniform between 0 and the unit, in whole numbers where those are stored; labels go round
    all classes; other columns are zeros.

    Args:
        description: what `Dataset.describe` gave.
    """
    stream = torch.Generator().manual_seed(0)
    unit, classes = description["unit"], description["classes"]

    def column(name: str, rows: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        if name == "x" and dtype.is_floating_point:
            return torch.rand(rows, *shape, generator=stream).to(dtype) * unit
        if name == "x":
            return torch.randint(int(unit) + 1, (rows, *shape), generator=stream, dtype=dtype)
        if name == "y":
            return torch.arange(rows) % (classes or 1)
        return torch.zeros(rows, *shape, dtype=dtype)

    splits = {
        split: {
            name: column(
                name, min(rows, _MOST_ROWS[split]), of["shape"], getattr(torch, of["dtype"])
            )
            for name, of in description["columns"].items()
        }
        for split, rows in description["rows"].items()
    }
    shape = description["image_shape"]
    return Dataset(
        description["name"],
        splits,
        image_shape=None if shape is None else (shape[0], shape[1], shape[2]),
        classes=None if classes is None else tuple(map(str, range(classes))),
        unit=unit,
        binarization=description["binarization"],
    )
