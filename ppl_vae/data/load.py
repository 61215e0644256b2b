"""`load_data`: one door to the known data sets and to the user's own files."""

import os
from pathlib import Path

from ppl_vae.data.dataset import Binarization, Dataset
from ppl_vae.data.files import read_path
from ppl_vae.data.sources import DataNotFoundError, data_home, known_names, read_known
from ppl_vae.data.stand_ins import take_stand_in
from ppl_vae.names import nearest


def load_data(
    name_or_path: str | Path,
    *,
    binarize: Binarization = "none",
    seed: int = 0,
    labels: bool = True,
    image_shape: tuple[int, int, int] | None = None,
    unit: float | None = None,
) -> Dataset:
    """Reads a known data set by name, or the user's own from a path.

    Known names are `known_names()`; their files are looked for in `data_home()`. A known name wins
    over a file of that name: write "./mnist" for the file. What files may hold is said in
    `ppl_vae.data.files`.

    Args:
        name_or_path: "mnist"; or a .npy file, a .npz file or a folder of images.
        binarize: "static" or "dynamic" to draw bits from grey values (see `Dataset.binarized`).
        seed: of the binarization, and of the split of a file that comes without splits. The splits
            of known data sets are fixed.
        labels: keep the column `y`.
        image_shape, unit: for the user's own files, as in `from_arrays`.

    Raises:
        DataNotFoundError: the files are not there and could not be downloaded.
        FileNotFoundError: the path does not exist.
        TypeError, ValueError: the name is unknown (the message has the nearest one), the files do
            not hold what they should, or the values cannot be binarized.
    """
    name = name_or_path if isinstance(name_or_path, str) else None
    if name is not None and name in known_names():
        if image_shape is not None or unit is not None:
            raise ValueError(f"{name} has its own image_shape and unit: leave them out")
        dataset = _known(name)
    else:
        path = Path(name_or_path).expanduser()
        if name is not None and not path.exists() and not _looks_like_path(name):
            hint = nearest(name, known_names())
            raise ValueError(f"unknown data set {name!r}; {hint} (or give a path)")
        dataset = read_path(path, seed=seed, image_shape=image_shape, unit=unit)
    if not labels:
        dataset = dataset.without_labels()
    return dataset if binarize == "none" else dataset.binarized(binarize, seed)


def _known(name: str) -> Dataset:
    try:
        return read_known(name, data_home())
    except DataNotFoundError as error:
        if (found := take_stand_in(name, str(error))) is None:
            raise
        return found


def _looks_like_path(name: str) -> bool:
    return os.sep in name or name.startswith((".", "~")) or Path(name).suffix != ""
