"""The known data sets: where their files lie, how they are read, how they are split.

All files are looked for under `data_home()`. What torchvision can download is downloaded there when
missing; the rest has to be put there, and the error says where.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ppl_vae.data.arrays import from_splits
from ppl_vae.data.dataset import Dataset
from ppl_vae.data.files import load_arrays
from ppl_vae.data.formats import (
    OMNIGLOT_CHARACTERS,
    idx_path,
    read_amat,
    read_idx,
    read_mat,
    read_omniglot_arrays,
    read_omniglot_folder,
    require_keys,
    upright,
)
from ppl_vae.data.sprites import sprites
from ppl_vae.data.stand_ins import has_stand_in

_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_DIGITS = tuple("0123456789")


class DataNotFoundError(FileNotFoundError):
    """A known data set's file is missing and could not be downloaded."""


def data_home() -> Path:
    """The folder of data sets: $PPL_VAE_DATA, else ppl_vae in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("PPL_VAE_DATA")
    if home:
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard says to ignore a relative path.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "ppl_vae"


def known_names() -> tuple[str, ...]:
    """The names that `load_data` knows."""
    return tuple(_READERS)


def read_known(name: str, home: Path) -> Dataset:
    """Reads the known data set `name` from the folder `home`."""
    return _READERS[name](home)


def _digits(home: Path) -> Dataset:
    """Handwritten digits, 8x8 counts 0 .. 16 of ink (Alpaydin & Kaynak, 1998), from scikit-learn.

    RandomState(0) shuffles the 1,797 rows; 1,197 / 300 / 300. Needs no file.
    """
    from sklearn.datasets import load_digits

    x, y = (np.asarray(column) for column in load_digits(return_X_y=True))
    splits = _permuted({"x": x.astype(np.uint8), "y": y}, (1197, 300, 300))
    return from_splits(splits, name="digits", image_shape=(1, 8, 8), classes=_DIGITS)


def _mnist(home: Path) -> Dataset:
    """Handwritten digits, 28x28 grey bytes (LeCun et al., 1998).

    The last 10,000 rows of the training file are for validation: 50,000 / 10,000 / 10,000.
    """
    return _idx_images(home, "mnist", "MNIST", _DIGITS)


def _fashion_mnist(home: Path) -> Dataset:
    """Articles of clothing, 28x28 grey bytes (Xiao et al., 2017), split as MNIST is."""
    return _idx_images(home, "fashion_mnist", "FashionMNIST", _FASHION)


def _static_mnist(home: Path) -> Dataset:
    """MNIST binarized once for all (Larochelle & Murray, 2011), 50,000 / 10,000 / 10,000.

    Either bit-packed in one .npz, with labels that are no part of the original, or the three
    original text files, without labels. The rows of the test set stand sorted by class.
    """
    folder = home / "binarized_mnist"
    packed = folder / "binarized_mnist.npz"
    keys = {"train": "train", "validation": "valid", "test": "test"}
    splits = {}
    if packed.exists():
        arrays = load_arrays(packed)
        require_keys(packed, arrays, tuple(keys.values()))
        for split, key in keys.items():
            splits[split] = {"x": np.unpackbits(arrays[key], axis=1)}
            if f"{key}_labels" in arrays:
                splits[split]["y"] = arrays[f"{key}_labels"]
    else:
        texts = {s: folder / f"binarized_mnist_{key}.amat" for s, key in keys.items()}
        if not all(path.exists() for path in texts.values()):
            raise _missing("static_mnist", packed, "or the three binarized_mnist_*.amat beside it")
        splits = {split: {"x": read_amat(path)} for split, path in texts.items()}
    classes = _DIGITS if "y" in splits["train"] else None
    dataset = from_splits(splits, name="static_mnist", image_shape=(1, 28, 28), classes=classes)
    return replace(dataset, binarization="static")


def _omniglot(home: Path) -> Dataset:
    """Characters of 50 alphabets (Lake et al., 2015), 28x28 grey bytes, ink bright.

    Each pixel is the mean of a 3.75 x 3.75 square of the original 105x105 bits, rounded. The
    background set is train and, of drawers 19 and 20, validation: 17,352 / 1,928; the evaluation
    set, of other alphabets, is test: 13,180. `y` is the character's number in the official files
    less one, 0 .. 1622; classes are "alphabet/character". Not the images of the IWAE and VampPrior
    papers: for those see omniglot_iwae.
    """
    shared = home / "omniglot" / "omniglot_28x28_area.npz"
    folders = [home / "omniglot-py" / name for name in OMNIGLOT_CHARACTERS]
    if shared.exists():
        parts, names = read_omniglot_arrays(shared)
    else:
        if not all(folder.is_dir() for folder in folders):
            _download(
                "omniglot",
                "Omniglot",
                home,
                [shared, *folders],
                [{"background": True}, {"background": False}],
            )
        read = [read_omniglot_folder(folder) for folder in folders]
        parts = [(images, character, drawer) for images, character, drawer, _ in read]
        names = {number: name for *_, some in read for number, name in some.items()}
    (images, character, drawer), (test_images, test_character, _) = parts
    kept = drawer < 19
    splits = {
        "train": {"x": images[kept], "y": character[kept] - 1},
        "validation": {"x": images[~kept], "y": character[~kept] - 1},
        "test": {"x": test_images, "y": test_character - 1},
    }
    return from_splits(
        splits,
        name="omniglot",
        image_shape=(1, 28, 28),
        classes=tuple(names[number] for number in sorted(names)),
        unit=255.0,
    )


def _omniglot_iwae(home: Path) -> Dataset:
    """The OMNIGLOT file of Burda et al. (2016), 28x28 grey, as used for published likelihoods.

    The last 1,345 training columns are validation: 23,000 / 1,345 / 8,070. `y` is the alphabet's
    number. Pixels are float32 in [0, 1], or bytes (unit 255) where that is exact.
    """
    path = home / "omniglot" / "chardata.mat"
    if not path.exists():
        raise _missing(
            "omniglot_iwae", path, "the file datasets/OMNIGLOT of github.com/yburda/iwae"
        )
    mat = read_mat(path, ("data", "testdata", "target", "testtarget"))
    if any(
        (mat[key] != 0).sum(0).min() != 1 or (mat[key] != 0).sum(0).max() != 1
        for key in ("target", "testtarget")
    ):
        raise ValueError(f"{path}: expected one-hot columns in target and testtarget")
    train, test = (
        {"x": upright(mat[x].T.astype(np.float32)), "y": mat[y].argmax(0)}
        for x, y in (("data", "target"), ("testdata", "testtarget"))
    )
    as_bytes = [np.rint(part["x"] * 255) for part in (train, test)]
    exact = all(
        np.array_equal(grey / np.float32(255), part["x"]) and grey.min() >= 0 and grey.max() <= 255
        for grey, part in zip(as_bytes, (train, test), strict=True)
    )
    if exact:
        train["x"], test["x"] = (grey.astype(np.uint8) for grey in as_bytes)
    if len(train["x"]) <= 1345:
        raise ValueError(f"{path}: expected more than 1345 columns in data, not {len(train['x'])}")
    splits = {
        "train": {name: value[:-1345] for name, value in train.items()},
        "validation": {name: value[-1345:] for name, value in train.items()},
        "test": test,
    }
    unit = 255.0 if exact else 1.0
    return from_splits(splits, name="omniglot_iwae", image_shape=(1, 28, 28), unit=unit)


def _caltech_silhouettes(home: Path) -> Dataset:
    """Caltech-101 outlines, 28x28 bits, object 1 (Marlin et al., 2010), 4,100 / 2,264 / 2,307."""
    path = home / "caltech101_silhouettes" / "caltech101_silhouettes_28_split1.mat"
    keys = {"train": "train", "validation": "val", "test": "test"}
    fields = [f"{key}_{kind}" for key in keys.values() for kind in ("data", "labels")]
    if not path.exists():
        raise _missing("caltech_silhouettes", path, "the file of Marlin et al.")
    mat = read_mat(path, (*fields, "classnames"))
    splits = {
        split: {
            # The file has the object as 0, and stores columns first.
            "x": 1 - upright(mat[f"{key}_data"]),
            "y": mat[f"{key}_labels"].reshape(-1).astype(np.int64) - 1,
        }
        for split, key in keys.items()
    }
    classes = tuple(str(name.item()) for name in mat["classnames"].reshape(-1))
    return from_splits(splits, name="caltech_silhouettes", image_shape=(1, 28, 28), classes=classes)


def _frey_faces(home: Path) -> Dataset:
    """Frames of one face, 28x20 grey bytes (Roweis & Saul, 2000).

    RandomState(0) shuffles the 1,965 rows; 1,565 / 200 / 200. Published splits were shuffled
    without a known seed. Frames are neighbors in time, so any shuffled split leaks: test rows have
    near copies in train, and likelihoods say little about new faces.
    """
    path = home / "freyfaces" / "freyfaces.npy"
    if not path.exists():
        raise _missing("frey_faces", path, "an array (1965, 560) of bytes")
    x = load_arrays(path)["x"]
    if x.shape != (1965, 560) or x.dtype != np.uint8:
        raise ValueError(f"{path}: expected (1965, 560) bytes, not {x.shape} of {x.dtype}")
    splits = _permuted({"x": x}, (1565, 200, 200))
    return from_splits(splits, name="frey_faces", image_shape=(1, 28, 20), unit=255.0)


def _dsprites(home: Path) -> Dataset:
    """Every combination of five factors of a 64x64 binary sprite (Matthey et al., 2017).

    RandomState(0) shuffles the rows; validation and test get a tenth each, rounded down. `y` is
    the shape; the column `factors` holds all six class numbers: color, shape, scale, orientation,
    position across and down. Needs about 6 GB of memory while reading, 3 GB afterwards.
    """
    path = home / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    if not path.exists():
        raise _missing("dsprites", path, "the file of github.com/deepmind/dsprites-dataset")
    keys = ("imgs", "latents_classes")
    # The file's metadata is a pickle; only what is asked for by name is read.
    arrays = load_arrays(path, keys)
    require_keys(path, arrays, keys)
    factors = arrays["latents_classes"]
    if factors.ndim != 2 or factors.shape[1] != 6 or arrays["imgs"].ndim != 3:
        raise ValueError(f"{path}: expected imgs (N, 64, 64) and latents_classes (N, 6)")
    rows, height, width = arrays["imgs"].shape
    columns = {
        "x": arrays["imgs"].reshape(rows, -1),
        "y": factors[:, 1],
        "factors": factors.astype(np.uint8),
    }
    tenth = rows // 10
    splits = _permuted(columns, (rows - 2 * tenth, tenth, tenth))
    return from_splits(
        splits,
        name="dsprites",
        image_shape=(1, height, width),
        classes=("square", "ellipse", "heart"),
    )


_READERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "static_mnist": _static_mnist,
    "omniglot": _omniglot,
    "omniglot_iwae": _omniglot_iwae,
    "caltech_silhouettes": _caltech_silhouettes,
    "frey_faces": _frey_faces,
    "dsprites": _dsprites,
    "sprites": lambda home: sprites(32),
    "sprites64": lambda home: sprites(64),
}

_IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx_images(home: Path, name: str, folder: str, classes: tuple[str, ...]) -> Dataset:
    raw = home / folder / "raw"
    stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in _IDX_KINDS]
    missing = [raw / f"{stem}[.gz]" for stem in stems if idx_path(raw, stem) is None]
    if missing:
        _download(name, folder, home, missing, [{"train": True}])
    arrays = []
    for stem in stems:
        path = idx_path(raw, stem)
        if path is None:
            raise _missing(name, raw / f"{stem}.gz", "which torchvision did not leave there")
        arrays.append(read_idx(path, 3 if "images" in stem else 1))
    x, y, test_x, test_y = arrays
    if len(x) <= 10_000 or len(x) != len(y):
        raise ValueError(
            f"{raw}: expected as many training labels as images, and more than the 10000 that are "
            f"set apart for validation; found {len(x)} images and {len(y)} labels"
        )
    splits = {
        "train": {"x": x[:-10_000], "y": y[:-10_000]},
        "validation": {"x": x[-10_000:], "y": y[-10_000:]},
        "test": {"x": test_x, "y": test_y},
    }
    shape = (1, *x.shape[1:])
    return from_splits(splits, name=name, image_shape=shape, classes=classes, unit=255.0)


def _permuted(
    columns: dict[str, np.ndarray], sizes: tuple[int, int, int]
) -> dict[str, dict[str, np.ndarray]]:
    rows = len(columns["x"])
    order = np.random.RandomState(0).permutation(rows)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return {
        split: {name: value[part] for name, value in columns.items()}
        for split, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def _download(
    name: str,
    torchvision_class: str,
    home: Path,
    looked_for: list[Path],
    options: list[dict[str, bool]],
) -> None:
    """Has torchvision download a data set into `home`, one call for each of `options`."""
    sought = ", ".join(map(str, looked_for))
    advice = f"Put the files there, or set PPL_VAE_DATA to a folder that has them (now: {home})"
    if has_stand_in(name):
        raise DataNotFoundError(f"{name}: looked for {sought}. {advice}")
    # Imported here alone: with a torch of another build, importing torchvision fails.
    try:
        from torchvision import datasets
    except Exception as error:
        raise DataNotFoundError(
            f"{name}: looked for {sought}. To download it, torchvision is needed, but importing it "
            f"failed ({error}): install the torchvision that goes with this torch. {advice}"
        ) from error
    try:
        for option in options:
            getattr(datasets, torchvision_class)(home, download=True, **option)
    # Network, disk, checksum, archive: whatever it was, the same three things help.
    except Exception as error:
        raise DataNotFoundError(
            f"{name}: looked for {sought}; downloading through torchvision failed ({error}). "
            f"{advice}"
        ) from error


def _missing(name: str, path: Path, what: str) -> DataNotFoundError:
    return DataNotFoundError(
        f"{name}: there is no {path} ({what}), and nothing to download it from. Put it there, or "
        "set the environment variable PPL_VAE_DATA to the folder that has "
        f"{path.parent.name}/{path.name}"
    )
