"""Data already in memory: tensors and numpy arrays become a `Dataset`."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.dataset import SPLITS, Dataset
from ppl_vae.data.validation import check_rows

Array: TypeAlias = Tensor | np.ndarray
Columns: TypeAlias = Array | Mapping[str, Array]


def from_arrays(
    train: Columns,
    *,
    validation: Columns | None = None,
    test: Columns | None = None,
    name: str = "arrays",
    image_shape: tuple[int, int, int] | None = None,
    classes: tuple[str, ...] | None = None,
    unit: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """A data set from arrays with one row a datum.

    If neither `validation` nor `test` is given, the rows of `train` are split by
    `numpy.random.RandomState(seed).permutation(rows)`: train comes first, then validation, then
    test, with a tenth each for the last two (rounded down, at least one row). If one of them is
    given, nothing is split; `as_dataset({"train": x})` keeps all rows for training.

    Args:
        train: the array `x`, or site name -> array, such as {"x": x, "y": y}. Booleans, integers or
            real floats; labels `y` of any integer type become int64. Arrays that are not split here
            are not copied: do not change them afterwards.
        validation, test: the same columns.
        name: what to call the data set.
        image_shape: (channels, height, width) if the rows are images; then `x` may also have that
            shape, or (height, width) if there is one channel, and is stored flat.
        classes: names of the labels.
        unit: what `x` is divided by when used. It is never guessed: grey bytes need 255.
        seed: of the split.

    Raises:
        TypeError: something is not an array, or its dtype (complex, object, text) is no number.
        ValueError: too few rows to split, and whatever `Dataset` refuses.
    """
    splits: dict[str, Columns] = {"train": train}
    if validation is not None:
        splits["validation"] = validation
    if test is not None:
        splits["test"] = test
    if len(splits) == 1:
        splits = dict(_shuffled_split(_columns(train, "train"), seed))
    return from_splits(splits, name=name, image_shape=image_shape, classes=classes, unit=unit)


def from_splits(
    splits: Mapping[str, Columns],
    *,
    name: str = "arrays",
    image_shape: tuple[int, int, int] | None = None,
    classes: tuple[str, ...] | None = None,
    unit: float = 1.0,
) -> Dataset:
    """`from_arrays` for data that are split already; "train" may be the only split."""
    columns = {split: _columns(value, split, image_shape) for split, value in splits.items()}
    return Dataset(name, columns, image_shape, classes, unit)


def as_dataset(data: Any, *, seed: int = 0) -> Dataset:
    """Whatever holds data, as a `Dataset`; one that is a `Dataset` comes back unchanged.

    Args:
        data: a `Dataset`; an array `x` or a mapping site name -> array, both split as `from_arrays`
            says; or a mapping of splits ("train", "validation", "test") to either, taken as split.
        seed: of the split.

    Raises:
        TypeError: `data` is something else.
        ValueError: split and site names are mixed, and whatever `from_arrays` refuses.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str):
        raise TypeError(f"got the name {data!r}: load_data({data!r}) reads a data set by name")
    if isinstance(data, Mapping):
        columns: Mapping[str, Any] = data
        named = [key for key in columns if key in SPLITS]
        if named and len(named) < len(columns):
            raise ValueError(
                f"the keys {list(columns)} mix splits {named} with other names: "
                'expected {"x": ..., "y": ...} or {"train": ..., "test": ...}'
            )
        if named:
            return from_splits(columns)
        return from_arrays(columns, seed=seed)
    return from_arrays(data, seed=seed)


def to_tensor(value: Any, where: str) -> Tensor:
    """A tensor that shares the array's memory where torch can read it as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{where} is a masked array: fill the masked values in first")
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{where} must be a torch tensor or a numpy array, not {type(value).__name__}; "
            "numpy.asarray(...) makes one (toarray() of a sparse matrix)"
        )
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise TypeError(f"{where} has dtype {value.dtype}: expected booleans, integers or floats")
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:
        # torch computes with hardly any unsigned type but bytes.
        if value.size and value.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{where} has values above 2**63 - 1, more than int64 holds")
        value = value.astype(np.int32 if value.dtype.itemsize == 2 else np.int64)
    # torch takes neither foreign byte order, nor negative strides, nor read-only memory.
    value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _columns(
    value: Columns, split: str, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Tensor]:
    named = value if isinstance(value, Mapping) else {"x": value}
    columns = {name: to_tensor(array, f"{split}[{name!r}]") for name, array in named.items()}
    if "y" in columns and not (columns["y"].is_floating_point() or columns["y"].is_complex()):
        columns["y"] = columns["y"].to(torch.int64)
    if image_shape is not None and "x" in columns:
        event = tuple(columns["x"].shape[1:])
        if event == tuple(image_shape) or (image_shape[0] == 1 and event == tuple(image_shape[1:])):
            columns["x"] = columns["x"].reshape(-1, math.prod(image_shape))
    return columns


def _shuffled_split(columns: dict[str, Tensor], seed: int) -> dict[str, dict[str, Tensor]]:
    for name, value in columns.items():
        if value.ndim == 0:
            raise ValueError(f"{name!r} is a single number: expected one row a datum, rows first")
    rows = check_rows(columns, "train")
    if rows < 3:
        raise ValueError(
            f"{rows} rows cannot be split into train, validation and test: give at least 3, "
            'or keep all for training with as_dataset({"train": x})'
        )
    tenth = max(1, rows // 10)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(rows))
    parts = order.split([rows - 2 * tenth, tenth, tenth])
    return {
        split: {name: value[part.to(value.device)] for name, value in columns.items()}
        for split, part in zip(SPLITS, parts, strict=True)
    }
