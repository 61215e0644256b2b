"""Data sets: well-known ones by name, the user's own from files and arrays, all of one type.

`load_data("mnist")` or `load_data("faces.npy")` reads; `from_arrays` and `as_dataset` wrap what is
in memory; every one of them returns a `Dataset`, whose splits hand out batches by index.
"""

from ppl_vae.data.arrays import as_dataset, from_arrays
from ppl_vae.data.dataset import Binarization, Dataset, Rows
from ppl_vae.data.load import load_data
from ppl_vae.data.sources import DataNotFoundError, data_home, known_names

__all__ = [
    "Binarization",
    "DataNotFoundError",
    "Dataset",
    "Rows",
    "as_dataset",
    "data_home",
    "from_arrays",
    "known_names",
    "load_data",
]
