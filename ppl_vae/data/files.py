"""The user's own files: arrays in .npy and .npz, folders of images.

- `.npy`: the array `x`, rows first; split by seed as `from_arrays` says.
- `.npz`: either `x` and perhaps `y`, split by seed; or `train` and perhaps `validation` and `test`,
  with `train_labels`, `validation_labels`, `test_labels` or none of them.
- a folder of images: files of one size, grey (1 channel) or color (3), are rows; sub-folders are
  classes, in the order of their names; or sub-folders named train, validation and test are splits,
  each laid out that way. Without such sub-folders the rows are split by seed. Unit 255.

Nothing is ever unpickled.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ppl_vae.data.arrays import from_arrays, from_splits
from ppl_vae.data.dataset import SPLITS, Dataset

_IMAGE_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


def read_path(
    path: Path,
    *,
    seed: int = 0,
    image_shape: tuple[int, int, int] | None = None,
    unit: float | None = None,
) -> Dataset:
    """Reads a .npy or .npz file or a folder of images; the data set has the file's name.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is of another kind, holds objects, or is laid out otherwise.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    if path.is_dir():
        if image_shape is not None:
            raise ValueError(f"{path} is a folder of images: their shape is read from the files")
        return _read_image_folder(path, seed, 255.0 if unit is None else unit)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"cannot read {path}: expected a .npy or .npz file or a folder of images")
    arrays = load_arrays(path)
    unit = 1.0 if unit is None else unit
    if set(arrays) in ({"x"}, {"x", "y"}):
        return from_arrays(arrays, name=path.name, image_shape=image_shape, unit=unit, seed=seed)
    return from_splits(
        _named_splits(path, arrays), name=path.name, image_shape=image_shape, unit=unit
    )


def load_arrays(path: Path, keys: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file (all, or those `keys` it has), or of a .npy file as "x".

    Raises:
        ValueError: the file is damaged, or an array holds Python objects. Those would have to be
            unpickled, and a pickle can run any code.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"x": loaded}
            with loaded:
                return {key: loaded[key] for key in loaded.files if keys is None or key in keys}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"cannot read {path} ({error}). Python objects are never loaded, as they need pickle, "
            "which can run code: save plain numbers with numpy.save or numpy.savez"
        ) from error


def _named_splits(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    allowed = {*SPLITS, *(f"{split}_labels" for split in SPLITS)}
    if "train" not in arrays or not set(arrays) <= allowed:
        raise ValueError(
            f"{path} holds {sorted(arrays)}: expected x and perhaps y, or train, validation, test "
            "and perhaps train_labels, validation_labels, test_labels"
        )
    splits: dict[str, dict[str, np.ndarray]] = {}
    for split in SPLITS:
        if split in arrays:
            splits[split] = {"x": arrays[split]}
            if f"{split}_labels" in arrays:
                splits[split]["y"] = arrays[f"{split}_labels"]
        elif f"{split}_labels" in arrays:
            raise ValueError(f"{path} holds {split}_labels but not {split}")
    return splits


def _read_image_folder(path: Path, seed: int, unit: float) -> Dataset:
    folders = [folder.name for folder in _children(path, folders=True)]
    if any(name in SPLITS for name in folders):
        odd = [name for name in folders if name not in SPLITS]
        if odd or "train" not in folders or _image_files(path):
            raise ValueError(
                f"{path} has splits, so it must hold a folder train, perhaps validation and test, "
                f"and nothing else; found {', '.join(odd) or 'loose images or no train'}"
            )
        roots = {name: path / name for name in folders}
    else:
        roots = {"train": path}
    found = {split: _labeled_files(root) for split, root in roots.items()}
    classes = sorted({name for files in found.values() for _, name in files if name is not None})
    loose = any(name is None for files in found.values() for _, name in files)
    if classes and loose:
        raise ValueError(
            f"{path} has images both in class folders ({classes[0]}, ...) and outside of any: "
            "put every image into a class folder, or none"
        )
    reference = next(iter(found.values()))[0][0]
    channels, height, width = _read_image(reference).shape
    shape = (channels, height, width)
    splits: dict[str, dict[str, np.ndarray]] = {}
    for split, files in found.items():
        x = np.empty((len(files), int(np.prod(shape))), np.uint8)
        for row, (file, _) in enumerate(files):
            image = _read_image(file)
            if image.shape != shape:
                raise ValueError(
                    f"all images must have one size: {file} is (channels, height, width) = "
                    f"{image.shape}, but {reference} is {shape}"
                )
            x[row] = image.reshape(-1)
        splits[split] = {"x": x}
        if classes:
            splits[split]["y"] = np.array([classes.index(name) for _, name in files if name])
    name, names = path.resolve().name, tuple(classes) or None
    if roots["train"] == path:
        return from_arrays(
            splits["train"], name=name, image_shape=shape, classes=names, unit=unit, seed=seed
        )
    return from_splits(splits, name=name, image_shape=shape, classes=names, unit=unit)


def _children(folder: Path, folders: bool) -> list[Path]:
    """What lies in a folder, in order of name, without hidden entries."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.is_dir() == folders]


def _image_files(folder: Path) -> list[Path]:
    return [f for f in _children(folder, folders=False) if f.suffix.lower() in _IMAGE_SUFFIXES]


def _labeled_files(root: Path) -> list[tuple[Path, str | None]]:
    """The images of one split, each with its class; None for those outside a class folder."""
    files: list[tuple[Path, str | None]] = [(file, None) for file in _image_files(root)]
    for folder in _children(root, folders=True):
        images = _image_files(folder)
        if not images or _children(folder, folders=True):
            raise ValueError(
                f"the class folder {folder} must hold images ({', '.join(_IMAGE_SUFFIXES)}) "
                "and no further folders"
            )
        files += [(image, folder.name) for image in images]
    if not files:
        raise ValueError(f"no images ({', '.join(_IMAGE_SUFFIXES)}) in {root} or folders in it")
    return files


def _read_image(file: Path) -> np.ndarray:
    """(channels, height, width) bytes: one channel if the file is grey, else three."""
    try:
        with Image.open(file) as image:
            if image.mode in ("1", "L"):
                return np.asarray(image.convert("L"))[None]
            if image.mode in ("P", "RGB") and "transparency" not in image.info:
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            mode = image.mode
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error
    raise ValueError(
        f"{file} has pixels of mode {mode}, perhaps with transparency: "
        "convert it to 8-bit grey or RGB without an alpha channel"
    )
