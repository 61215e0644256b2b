"""The type of every data set: splits of named columns, stored small, made into floats by batch.

A grey image stays one byte a pixel until its batch is gathered. The columns have the names of the
sites that observe them: `x` is what is modeled, `y` the label, any other name is the user's.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Binarization = Literal["none", "static", "dynamic"]

SPLITS = ("train", "validation", "test")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_STORABLE = (torch.bool, *_INTEGERS, *_FLOATS)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one split, handed out in batches.

    Attributes:
        stored: column -> tensor with one row a datum, as stored (bytes stay bytes).
        unit: what the stored `x` is divided by.
        dynamic: `x / unit` is a probability, and every batch draws its bits anew.
    """

    stored: Mapping[str, Tensor] = field(repr=False)
    unit: float = 1.0
    dynamic: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.stored)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows, stored on `device`, so that no batch has to travel."""
        return replace(self, stored={name: value.to(device) for name, value in self.stored.items()})

    def batch(
        self,
        indices: Tensor | slice,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Gathers rows and makes them ready for a model.

        Args:
            indices: (B,) int64 row numbers, or a slice.
            device: where the batch goes; where the rows are stored, if None. Stored values travel
                before they become floats.
            dtype: floating type of the batch; `torch.get_default_dtype()` if None.

        Returns:
            column -> (B, ...) tensor that shares no memory with the stored rows. `y` is int64,
            every other column is of `dtype`; `x` is divided by the unit. With dynamic binarization
            `x` is drawn from Bernoulli(x / unit), in float32 so that the bits do not depend on
            `dtype`, with torch's global generator of the device: a saved random state covers it.
            The call can be traced by `make_fx`.

        Raises:
            TypeError: `indices` is neither an int64 vector nor a slice, or `dtype` is not floating.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"a batch's dtype must be a floating type, not {dtype}: labels are int64 anyway"
            )
        if isinstance(indices, Tensor):
            if indices.dtype != torch.int64 or indices.ndim != 1:
                raise TypeError(
                    f"indices must be an int64 vector, not {indices.dtype} of shape "
                    f"{tuple(indices.shape)}; for a mask give mask.nonzero().squeeze(1)"
                )
        elif not isinstance(indices, slice):
            raise TypeError(
                f"indices must be an int64 tensor or a slice, not {type(indices).__name__}; "
                "torch.as_tensor(indices) makes one"
            )
        return {name: self._ready(name, indices, device, dtype) for name in self.stored}

    def batches(
        self,
        size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Every row once, in order, `size` at a time; the last batch may be smaller.

        Raises:
            ValueError: `size` is less than 1.
        """
        if size < 1:
            raise ValueError(f"a batch has at least 1 row, not {size}")
        starts = range(0, len(self), size)
        return (self.batch(slice(start, start + size), device, dtype) for start in starts)

    def _ready(
        self,
        name: str,
        indices: Tensor | slice,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Tensor:
        stored = self.stored[name]
        if isinstance(indices, slice):
            value = stored[indices].clone()  # a view would let a model write into the data set
        else:
            value = stored[indices.to(stored.device)]
        if device is not None:
            value = value.to(device)
        if name == "y":
            return value.to(torch.int64)
        if name != "x":
            return value.to(dtype)
        if self.dynamic:
            return torch.bernoulli(value.to(torch.float32) / self.unit).to(dtype)
        return value.to(dtype) / self.unit


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named, immutable data set with its splits.

    Attributes:
        name: what it is called in reports.
        splits: "train" and perhaps "validation" and "test", each column -> tensor, rows first.
            `x`, where there is one, is (N, D) for images and (N, ...) otherwise; `y`, where there
            is one, holds int64 labels (N,). All splits have the same columns, row shapes, dtypes.
        image_shape: (channels, height, width) in which a row of `x` is drawn, None if not an image.
        classes: the names of the labels 0, 1, ...; None if unnamed.
        unit: what a stored value of `x` is divided by when used: 255 for grey bytes; 1 for counts,
            bits and floats.
        binarization: "none" if `x` stands as it came; "static" if its bits were drawn once;
            "dynamic" if the training rows are drawn anew at each batch (Salakhutdinov & Murray,
            2008). A set of natural bits, such as silhouettes, has "none".

    Raises:
        TypeError: a column is not a dense tensor of booleans, integers or real floats; labels are
            not int64.
        ValueError: a split is unknown, empty or unlike the others; a column has rows in another
            number; a value is NaN or infinite; a label is out of range; `image_shape` does not fit;
            values contradict `binarization`. The message names the split, the column and the row.
    """

    name: str
    splits: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    image_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] | None = field(default=None, repr=False)
    unit: float = 1.0
    binarization: Binarization = "none"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.unit) and self.unit > 0):
            raise ValueError(f"unit must be a positive number, not {self.unit}")
        object.__setattr__(self, "unit", float(self.unit))
        if self.binarization not in get_args(Binarization):
            raise ValueError(
                f"binarization must be one of {get_args(Binarization)}, not {self.binarization!r}"
            )
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown or "train" not in self.splits:
            raise ValueError(
                f"splits must be 'train' and perhaps 'validation' and 'test', "
                f"not {list(self.splits)}"
            )
        splits = {
            split: {column: _checked(value, split, column) for column, value in columns.items()}
            for split, columns in ((s, self.splits[s]) for s in SPLITS if s in self.splits)
        }
        # The dictionaries are ours; whoever made the originals may go on changing theirs.
        object.__setattr__(self, "splits", splits)
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        for split, columns in splits.items():
            check_rows(columns, split)
            self._check_like_train(split)
            if "y" in columns:
                self._check_labels(split)
        self._check_image_shape()
        if self.classes is not None and "y" not in splits["train"]:
            raise ValueError("classes are given but there is no column 'y' of labels")
        self._check_binarization()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.splits["train"])

    def split(self, name: str) -> Rows:
        """The rows of one split.

        Raises:
            ValueError: there is no such split; the message names those there are.
        """
        if name not in self.splits:
            raise ValueError(f"{self.name} has no split {name!r}, only {list(self.splits)}")
        dynamic = self.binarization == "dynamic" and name == "train"
        return Rows(self.splits[name], unit=self.unit, dynamic=dynamic)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set, stored on `device`."""
        return replace(self, splits={s: self.split(s).to(device).stored for s in self.splits})

    def without_labels(self) -> "Dataset":
        """The same data set without the column `y` and the class names."""
        splits = {
            split: {column: value for column, value in columns.items() if column != "y"}
            for split, columns in self.splits.items()
        }
        return replace(self, splits=splits, classes=None)

    def binarized(self, how: Literal["static", "dynamic"], seed: int = 0) -> "Dataset":
        """Grey values in [0, 1] (after division by the unit) become draws of Bernoulli(value).

        "static" draws every split once (Larochelle & Murray, 2011) and stores uint8 0 and 1, unit
        1. "dynamic" keeps the grey training rows, whose bits each batch draws anew; validation and
        test are drawn once, so that evaluation can be repeated, and stay in the stored dtype as 0
        and `unit`. With one seed both give the same validation and test bits. The draws come from
        numpy's RandomState, whose stream does not change between versions, one stream a split.

        Raises:
            ValueError: the values are not in [0, 1], or are binary already; `how` or `seed` is
                unknown.
        """
        if how not in ("static", "dynamic"):
            raise ValueError(f"binarization must be 'static' or 'dynamic', not {how!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2**32 - 1, not {seed}")
        if "x" not in self.columns:
            raise ValueError(f"{self.name} has no column 'x' to binarize, only {self.columns}")
        self._check_probabilities(list(self.splits))
        if self.binarization != "none" or all(
            _first_row(s["x"], self._is_grey) is None for s in self.splits.values()
        ):
            raise ValueError(f"{self.name} is binary already: use it as it is")
        dtype = torch.uint8 if how == "static" else self.splits["train"]["x"].dtype
        one = 1.0 if how == "static" else self.unit
        if how == "dynamic" and torch.tensor(self.unit).to(dtype).item() != self.unit:
            raise ValueError(
                f"{dtype} cannot hold the unit {self.unit}, the value of a bit that is 1: "
                "store x as float64, or scale it to a unit of 1"
            )
        splits: dict[str, dict[str, Tensor]] = {}
        for split, columns in self.splits.items():
            splits[split] = dict(columns)
            if how == "static" or split != "train":
                stream = np.random.RandomState([seed, SPLITS.index(split)])
                splits[split]["x"] = _draw(columns["x"], self.unit, stream, one, dtype)
        return replace(self, splits=splits, unit=one, binarization=how)

    def describe(self) -> dict[str, Any]:
        """What the data set is, in JSON types: name, rows a split, columns, unit, binarization."""
        return {
            "name": self.name,
            "rows": {split: len(self.split(split)) for split in self.splits},
            "columns": {
                column: {"shape": list(value.shape[1:]), "dtype": str(value.dtype)[6:]}
                for column, value in self.splits["train"].items()
            },
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "classes": None if self.classes is None else len(self.classes),
            "unit": self.unit,
            "binarization": self.binarization,
        }

    def fingerprint(self) -> dict[str, Any]:
        """`describe()` and "sha256" over all that is stored, to notice that data changed.

        The digest covers every split's and column's name, dtype, shape and bytes. It depends
        neither on the data set's name nor on the order of the columns.
        """
        digest = hashlib.sha256()
        for split, columns in self.splits.items():
            for column, value in sorted(columns.items()):
                digest.update(f"{split}/{column}:{value.dtype}{tuple(value.shape)};".encode())
                # Seen as bytes, because numpy knows no bfloat16.
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        return {**self.describe(), "sha256": digest.hexdigest()}

    def _is_grey(self, part: Tensor) -> Tensor:
        return (part != 0) & (part != self.unit)

    def _check_like_train(self, split: str) -> None:
        train, other = self.splits["train"], self.splits[split]
        if set(train) != set(other):
            raise ValueError(
                f"{split} has columns {sorted(other)} but train has {sorted(train)}: "
                "add or drop the difference"
            )
        for column, value in other.items():
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

    def _check_labels(self, split: str) -> None:
        y = self.splits[split]["y"]
        if y.ndim != 1:
            raise ValueError(
                f"{split}['y'] must be a vector of labels, not of shape {tuple(y.shape)}; "
                "for one-hot rows give y.argmax(1), for other covariates name the column otherwise"
            )
        if y.dtype != torch.int64:
            raise TypeError(
                f"{split}['y'] must hold int64 labels, not {y.dtype}: convert it with "
                ".to(torch.int64), or name the column otherwise if it is not a label"
            )
        top = None if self.classes is None else len(self.classes)
        wrong = (y < 0) if top is None else (y < 0) | (y >= top)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            bounds = "0 or more" if top is None else f"0 .. {top - 1}, as there are {top} classes"
            raise ValueError(
                f"{split}['y'] has label {int(y[row])} in row {row}: expected {bounds}"
            )

    def _check_image_shape(self) -> None:
        if self.image_shape is None:
            return
        shape = tuple(int(size) for size in self.image_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"image_shape must be (channels, height, width), not {shape}")
        object.__setattr__(self, "image_shape", shape)
        x = self.splits["train"].get("x")
        if x is None or tuple(x.shape[1:]) != (math.prod(shape),):
            found = "missing" if x is None else f"of shape {tuple(x.shape)}"
            raise ValueError(
                f"image_shape {shape} needs flat rows x of {math.prod(shape)} values, "
                f"but x is {found}"
            )

    def _check_binarization(self) -> None:
        if self.binarization == "none":
            return
        if "x" not in self.columns:
            raise ValueError(f"binarization is {self.binarization!r} but there is no column 'x'")
        if self.binarization == "dynamic":
            self._check_probabilities(["train"])
        for split, columns in self.splits.items():
            if self.binarization == "dynamic" and split == "train":
                continue
            row = _first_row(columns["x"], self._is_grey)
            if row is not None:
                raise ValueError(
                    f"binarization is {self.binarization!r}, so {split}['x'] must hold only 0 and "
                    f'{self.unit:g}, but row {row} does not: leave it "none" and call binarized()'
                )

    def _check_probabilities(self, splits: list[str]) -> None:
        for split in splits:
            x = self.splits[split]["x"]
            row = _first_row(x, lambda part: (part < 0) | (part > self.unit))
            if row is not None:
                low, high = (v / self.unit for v in (x[row].min().item(), x[row].max().item()))
                raise ValueError(
                    f"binarizing needs values in [0, 1] after division by the unit {self.unit:g}, "
                    f"but row {row} of {split}['x'] spans {low:g} .. {high:g}; if these are grey "
                    "levels, give their largest as the unit (255 for bytes), for instance with "
                    "dataclasses.replace(dataset, unit=255.0)"
                )


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


def _checked(value: Tensor, split: str, column: str) -> Tensor:
    where = f"{split}[{column!r}]"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where} must be a tensor, not {type(value).__name__}; from_arrays() converts arrays"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{where} must be dense, not {value.layout}: call to_dense()")
    if value.dtype not in _STORABLE:
        raise TypeError(
            f"{where} is {value.dtype}: expected booleans, integers (at most 64 bits, signed if "
            "above 8) or real floats; for complex values store the parts in two columns"
        )
    if value.ndim == 0:
        raise ValueError(f"{where} is a single number: expected one row a datum, rows first")
    if value.shape[1:].numel() == 0:
        raise ValueError(f"the rows of {where} hold no values: its shape is {tuple(value.shape)}")
    if value.dtype in _FLOATS:
        row = _first_row(value, lambda part: ~torch.isfinite(part))
        if row is not None:
            raise ValueError(
                f"{where} has NaN or infinity, first in row {row}: remove such rows or fill them in"
            )
    return value.detach()


def _parts(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Runs of rows of some megabytes, with the number of their first row.

    A whole data set is never looked at, or made float, in one piece.
    """
    size = max(1, 2**20 // max(1, value.shape[1:].numel()))
    for start in range(0, len(value), size):
        yield start, value[start : start + size]


def _first_row(value: Tensor, is_wrong: Any) -> int | None:
    for start, part in _parts(value):
        rows = is_wrong(part).reshape(len(part), -1).any(1)
        if rows.any():
            return start + int(rows.nonzero()[0])
    return None


def _draw(
    x: Tensor, unit: float, stream: np.random.RandomState, one: float, dtype: torch.dtype
) -> Tensor:
    """Bits of Bernoulli(x / unit) in the shape of x, stored as 0 and `one`."""
    drawn = torch.empty_like(x, dtype=dtype)
    for start, part in _parts(x):
        probability = part.cpu().to(torch.float64).numpy() / unit
        bits = torch.from_numpy(stream.random_sample(probability.shape) < probability)
        drawn[start : start + len(part)] = (bits * one).to(dtype)
    return drawn
