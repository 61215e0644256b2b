"""Readers of the file formats in which the known data sets are published."""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from ppl_vae.data.files import load_arrays

# Characters in each folder of the official archives; fewer means that unpacking was cut short.
OMNIGLOT_CHARACTERS = {"images_background": 964, "images_evaluation": 659}


def idx_path(raw: Path, stem: str) -> Path | None:
    """The file of that name, packed or not."""
    # The archive first: it carries a checksum, and an interrupted unpacking leaves it whole.
    return next((p for p in (raw / f"{stem}.gz", raw / stem) if p.exists()), None)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """An array of bytes in LeCun's idx format: 0, 0, type, number of sizes, sizes, values."""
    try:
        data = bytearray(
            gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        )
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, to load it anew") from error
    header = 4 + 4 * dims
    if len(data) < header or data[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(
            f"{path} is no idx file of bytes with {dims} sizes: delete it, to load it anew"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dims, 4))
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: {len(data) - header} values for the sizes {shape}; "
            "delete it, to load it anew"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_amat(path: Path) -> np.ndarray:
    """Rows of 784 characters 0 and 1 apart by blanks, as (N, 784) bytes."""
    text = np.frombuffer(path.read_bytes(), np.uint8)
    ink = text > ord(" ")
    bits = text[ink]
    if bits.size == 0 or bits.size % 784 or (bits >> 1 != ord("0") >> 1).any():
        raise ValueError(f"{path}: expected rows of 784 numbers 0 or 1")
    return (bits - ord("0")).reshape(-1, 784)


def read_mat(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The variables of a MATLAB 5 file, which has to hold `keys`."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        mat = loadmat(path)
    except (MatReadError, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} is no MATLAB 5 file: {error}") from error
    require_keys(path, mat, keys)
    return mat


def require_keys(path: Path, arrays: dict[str, np.ndarray], keys: tuple[str, ...]) -> None:
    """Raises ValueError unless all `keys` are there."""
    absent = [key for key in keys if key not in arrays]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: is it another file of that name?")


def upright(rows: np.ndarray) -> np.ndarray:
    """Images (N, 784) whose pixels were stored column by column, row by row."""
    return rows.reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784)


def read_omniglot_arrays(path: Path) -> tuple[list[tuple[np.ndarray, ...]], dict[int, str]]:
    """(images, character numbers, drawers) of background and evaluation, and character names."""
    arrays = load_arrays(path)
    sides = ("background", "evaluation")
    fields = ("_character", "_drawer", "_alphabet")
    require_keys(path, arrays, ("alphabets", *(s + f for s in sides for f in ("", *fields))))
    parts, names = [], {}
    for side in sides:
        character, drawer, alphabet = (arrays[side + f].astype(np.int64) for f in fields)
        for which in np.unique(alphabet):
            # An alphabet's characters are numbered in a row, as are its folders character01, ...
            numbers = np.unique(character[alphabet == which])
            for rank, number in enumerate(numbers, start=1):
                names[int(number)] = f"{arrays['alphabets'][which]}/character{rank:02d}"
        parts.append((arrays[side], character, drawer))
    return parts, names


def read_omniglot_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """Images (N, 28, 28), character numbers, drawers, and character number -> name."""
    from PIL import Image

    found = [
        (int(match[1]), int(match[2]), path)
        for path in folder.glob("*/*/*.png")
        if (match := re.fullmatch(r"(\d+)_(\d+)\.png", path.name))
    ]
    found.sort(key=lambda item: item[:2])
    names = {number: "/".join(path.parts[-3:-1]) for number, _, path in found}
    expected = OMNIGLOT_CHARACTERS[folder.name]
    if len(names) != expected or len(found) != 20 * expected:
        raise ValueError(
            f"{folder} holds {len(found)} drawings of {len(names)} characters, not "
            f"{20 * expected} of {expected}: delete {folder.parent} to load it anew"
        )
    images = np.empty((len(found), 28, 28), np.uint8)
    for start in range(0, len(found), 1000):
        ink = []
        for *_, path in found[start : start + 1000]:
            with Image.open(path) as image:
                ink.append(np.asarray(image.convert("L")) < 128)  # ink is black in the files
        images[start : start + len(ink)] = area_means(np.stack(ink))
    numbers = np.array([item[:2] for item in found])
    return images, numbers[:, 0], numbers[:, 1], names


def area_means(ink: np.ndarray) -> np.ndarray:
    """Bits (N, 105, 105) to bytes (N, 28, 28): round(255 * mean over a 3.75 x 3.75 square)."""
    # In quarters of a source pixel, output i covers 15 i .. 15 i + 15, source j 4 j .. 4 j + 4.
    output, source = 15 * np.arange(28)[:, None], 4 * np.arange(105)[None]
    overlap = np.minimum(output + 15, source + 4) - np.maximum(output, source)
    weights = overlap.clip(0).astype(np.float32)
    # Sums of at most 15 * 15 quarters squared, which float32 holds exactly.
    area = (weights @ ink.astype(np.float32) @ weights.T).astype(np.int32)
    # round(255 * area / 225) = round(17 * area / 15), in integers: it never falls on a half.
    return ((34 * area + 15) // 30).astype(np.uint8)
