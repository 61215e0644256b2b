"""What a data set's columns must be; an error names the split, the column and the row."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked(value: Tensor, where: str) -> Tensor:
    """The column, without gradient.

    Raises:
        TypeError: it is not a dense tensor of booleans, integers or real floats.
        ValueError: it has no rows to count, rows without values, or a value that is not finite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where} must be a tensor, not {type(value).__name__}; from_arrays() converts arrays"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{where} must be dense, not {value.layout}: call to_dense()")
    if value.dtype not in (torch.bool, *_INTEGERS, *_FLOATS):
        raise TypeError(
            f"{where} is {value.dtype}: expected booleans, integers (at most 64 bits, signed if "
            "above 8) or real floats; for complex values store the parts in two columns"
        )
    if value.ndim == 0:
        raise ValueError(f"{where} is a single number: expected one row a datum, rows first")
    if value.shape[1:].numel() == 0:
        raise ValueError(f"the rows of {where} hold no values: its shape is {tuple(value.shape)}")
    if value.dtype in _FLOATS:
        row = first_row(value, lambda part: ~torch.isfinite(part))
        if row is not None:
            raise ValueError(
                f"{where} has NaN or infinity, first in row {row}: remove such rows or fill them in"
            )
    return value.detach()


def check_rows(columns: Mapping[str, Tensor], where: str) -> int:
    """How many rows all the columns have.

    Raises:
        ValueError: there are no columns or no rows, or the columns' numbers differ.
    """
    rows = {column: len(value) for column, value in columns.items()}
    if not rows:
        raise ValueError(f"{where} has no columns: expected at least 'x'")
    if len(set(rows.values())) > 1:
        raise ValueError(f"the columns of {where} must have one row a datum, but have {rows} rows")
    count = next(iter(rows.values()))
    if count == 0:
        raise ValueError(f"{where} is empty: a split needs at least one row, or must be left out")
    return count


def check_like_train(
    columns: Mapping[str, Tensor], train: Mapping[str, Tensor], split: str
) -> None:
    """Refuse a split whose columns, row shapes or dtypes differ from those of train."""
    if set(train) != set(columns):
        raise ValueError(
            f"{split} has columns {sorted(columns)} but train has {sorted(train)}: "
            "add or drop the difference"
        )
    for column, value in columns.items():
        if value.shape[1:] != train[column].shape[1:]:
            raise ValueError(
                f"a row of {split}[{column!r}] has shape {tuple(value.shape[1:])} but one of "
                f"train[{column!r}] has {tuple(train[column].shape[1:])}"
            )
        if value.dtype != train[column].dtype:
            raise TypeError(
                f"{split}[{column!r}] is {value.dtype} but train[{column!r}] is "
                f"{train[column].dtype}: convert one of them"
            )


WITHHELD = -1
"""Stands for a label that is not given, as in scikit-learn's semi-supervised learners."""


def check_labels(
    y: Tensor, where: str, classes: Sequence[str] | None, *, withheld: bool = False
) -> None:
    """Refuse what is not a vector of int64 labels, from 0 to the number of classes less 1.

    Args:
        withheld: whether labels may be :data:`WITHHELD`, though not all of them.
    """
    if y.ndim != 1:
        raise ValueError(
            f"{where} must be a vector of labels, not of shape {tuple(y.shape)}; "
            "for one-hot rows give y.argmax(1), for other covariates name the column otherwise"
        )
    if y.dtype != torch.int64:
        raise TypeError(
            f"{where} must hold int64 labels, not {y.dtype}: convert it with "
            ".to(torch.int64), or name the column otherwise if it is not a label"
        )
    wrong = y < (WITHHELD if withheld else 0)
    if withheld and (y == WITHHELD).all():
        raise ValueError(
            f"{where} has no label at all: drop the column, with Dataset.without_labels()"
        )
    bounds = "0 or more"
    if classes is not None:
        wrong |= y >= len(classes)
        bounds = f"0 .. {len(classes) - 1}, as there are {len(classes)} classes"
    if wrong.any():
        row = int(wrong.nonzero()[0])
        also = f", or {WITHHELD} for a label that is withheld" if withheld else ""
        raise ValueError(f"{where} has label {int(y[row])} in row {row}: expected {bounds}{also}")


def check_image_shape(shape: tuple[int, ...], x: Tensor | None) -> None:
    """Refuse an image shape that does not fit flat rows x."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), not {shape}")
    if x is None or x.shape[1:] != (math.prod(shape),):
        found = "missing" if x is None else f"of shape {tuple(x.shape)}"
        raise ValueError(
            f"image_shape {shape} needs flat rows x of {math.prod(shape)} values, but x is {found}"
        )


def check_binarization(
    splits: Mapping[str, Mapping[str, Tensor]], unit: float, binarization: str
) -> None:
    """Refuse x that is not bits, or in the training rows of dynamic binarization probabilities."""
    for split, columns in splits.items():
        if "x" not in columns:
            raise ValueError(f"binarization is {binarization!r} but there is no column 'x'")
        where = f"{split}['x']"
        if binarization == "dynamic" and split == "train":
            check_probabilities(columns["x"], unit, where)
        elif (row := first_grey(columns["x"], unit)) is not None:
            raise ValueError(
                f"binarization is {binarization!r}, so {where} must hold only 0 and "
                f'{unit:g}, but row {row} does not: leave it "none" and call binarized()'
            )


def check_probabilities(x: Tensor, unit: float, where: str) -> None:
    """Refuse values outside [0, unit]."""
    row = first_row(x, lambda part: (part < 0) | (part > unit))
    if row is not None:
        low, high = x[row].min().item() / unit, x[row].max().item() / unit
        raise ValueError(
            f"binarizing needs values in [0, 1] after division by the unit {unit:g}, "
            f"but row {row} of {where} spans {low:g} .. {high:g}; if these are grey "
            "levels, give their largest as the unit (255 for bytes), for instance with "
            "dataclasses.replace(dataset, unit=255.0)"
        )


def first_grey(x: Tensor, unit: float) -> int | None:
    """The first row with a value that is neither 0 nor the unit, if there is one."""
    return first_row(x, lambda part: (part != 0) & (part != unit))


def first_row(value: Tensor, is_wrong: Callable[[Tensor], Tensor]) -> int | None:
    """The first row with an entry that is wrong, if there is one."""
    for start, part in in_parts(value):
        rows = is_wrong(part).reshape(len(part), -1).any(1)
        if rows.any():
            return start + int(rows.nonzero()[0])
    return None


def in_parts(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Runs of rows of some megabytes, with the number of their first row.

    A whole data set is never looked at, or made float, in one piece.
    """
    size = max(1, 2**20 // value.shape[1:].numel())
    for start in range(0, len(value), size):
        yield start, value[start : start + size]
