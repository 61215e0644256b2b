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

from ppl_vae.data import validation

Binarization = Literal["none", "static", "dynamic"]

SPLITS = ("train", "validation", "test")


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

    @property
    def labeled(self) -> Tensor | None:
        """The numbers of the rows whose label is given; None where no label is withheld."""
        y = self.stored.get("y")
        if y is None or not (y == validation.WITHHELD).any():
            return None
        return (y != validation.WITHHELD).nonzero().squeeze(1).cpu()

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
        return self.ready(self.gather(indices), device, dtype)

    def gather(self, indices: Tensor | slice) -> dict[str, Tensor]:
        """Rows as they are stored, in copies, where they are stored: column -> (B, ...)."""
        if isinstance(indices, slice):
            # A view would let a model write into the data set.
            return {name: stored[indices].clone() for name, stored in self.stored.items()}
        return {name: stored[indices.to(stored.device)] for name, stored in self.stored.items()}

    def ready(
        self,
        gathered: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Rows as a model takes them, from rows as they are stored: see `batch`."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return {name: self._ready(name, value, device, dtype) for name, value in gathered.items()}

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
        self, name: str, value: Tensor, device: torch.device | str | None, dtype: torch.dtype
    ) -> Tensor:
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
            is one, holds int64 labels (N,), in "train" -1 for a label that is withheld. All splits
            have the same columns, row shapes, dtypes.
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
        if self.binarization not in get_args(Binarization):
            raise ValueError(
                f"binarization must be one of {get_args(Binarization)}, not {self.binarization!r}"
            )
        if "train" not in self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(
                f"splits must be 'train' and perhaps 'validation' and 'test', "
                f"not {list(self.splits)}"
            )
        # The dictionaries are ours; whoever made the originals may go on changing theirs.
        splits = {
            split: {
                column: validation.checked(value, f"{split}[{column!r}]")
                for column, value in self.splits[split].items()
            }
            for split in SPLITS
            if split in self.splits
        }
        object.__setattr__(self, "splits", splits)
        object.__setattr__(self, "unit", float(self.unit))
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        train = splits["train"]
        for split, columns in splits.items():
            validation.check_rows(columns, split)
            validation.check_like_train(columns, train, split)
            if "y" in columns:
                where, withheld = f"{split}['y']", split == "train"
                validation.check_labels(columns["y"], where, self.classes, withheld=withheld)
        if self.classes is not None and "y" not in train:
            raise ValueError("classes are given but there is no column 'y' of labels")
        if self.image_shape is not None:
            object.__setattr__(self, "image_shape", tuple(map(int, self.image_shape)))
            validation.check_image_shape(self.image_shape, train.get("x"))
        if self.binarization != "none":
            validation.check_binarization(splits, self.unit, self.binarization)

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

    def labeled(self, count: int, seed: int = 0) -> "Dataset":
        """The same data set with the labels of all but `count` training rows withheld.

        The labels that are kept are drawn at random, as many of each class, or one more of some
        where the classes do not divide `count`. The others are gone: the data set that is returned
        does not hold them. Validation and test keep theirs, which training does not read. The draws
        come from numpy's RandomState, whose stream does not change between versions.

        Raises:
            ValueError: there are no labels, some are withheld already, `count` is less than the
                number of classes, or there are too few rows of a class.
        """
        y = self.splits["train"].get("y")
        if y is None or self.split("train").labeled is not None:
            what = "no labels" if y is None else "withheld labels already"
            raise ValueError(f"{self.name} has {what}: take the data set as it was loaded")
        labels = y.cpu().numpy()
        classes = len(self.classes) if self.classes is not None else int(labels.max()) + 1
        if not classes <= count:
            raise ValueError(
                f"labeled({count}): {self.name} has {classes} classes; expected at least a label "
                "of each"
            )
        stream = np.random.RandomState(seed)
        wanted = np.full(classes, count // classes)
        wanted[stream.permutation(classes)[: count % classes]] += 1
        kept = np.full_like(labels, validation.WITHHELD)
        for label, number in enumerate(wanted):
            rows = stream.permutation(np.flatnonzero(labels == label))
            if len(rows) < number:
                raise ValueError(
                    f"labeled({count}): {self.name} has {len(rows)} training rows of class "
                    f"{label}, and {number} are asked for: take fewer labels"
                )
            kept[rows[:number]] = label
        train = {**self.splits["train"], "y": torch.from_numpy(kept).to(y.device)}
        return replace(self, splits={**self.splits, "train": train})

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
        for split, columns in self.splits.items():
            validation.check_probabilities(columns["x"], self.unit, f"{split}['x']")
        if self.binarization != "none" or all(
            validation.first_grey(columns["x"], self.unit) is None
            for columns in self.splits.values()
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
            **({} if (known := self.split("train").labeled) is None else {"labeled": len(known)}),
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


def _draw(
    x: Tensor, unit: float, stream: np.random.RandomState, one: float, dtype: torch.dtype
) -> Tensor:
    """Bits of Bernoulli(x / unit) in the shape of x, stored as 0 and `one`."""
    drawn = torch.empty_like(x, dtype=dtype)
    for start, part in validation.in_parts(x):
        probability = part.cpu().to(torch.float64).numpy() / unit
        bits = torch.from_numpy(stream.random_sample(probability.shape) < probability)
        drawn[start : start + len(part)] = (bits * one).to(dtype)
    return drawn
