"""From the files of a trained model to a fitted pair, or to the folder of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ppl_vae.data import Dataset
from ppl_vae.data.stand_ins import stand_in, standing_in
from ppl_vae.draws import some_covariates
from ppl_vae.fitting import Fitted, torch_device
from ppl_vae.loop import load_weights
from ppl_vae.model import GenerativeModel
from ppl_vae.pretrained.files import FOLDER, Facts, read_facts, read_weights
from ppl_vae.recipes import build
from ppl_vae.run import Run
from ppl_vae.sites import evaluating

SIMULATED = {"train": 300, "validation": 100, "test": 100}
"""Rows that stand in for the data where those are not at hand."""


def load(name: str, *, device: str = "cpu", folder: Path = FOLDER) -> Fitted:
    """A trained model that comes with the package, with its guide and its data.

    Where the data's files are not at hand, the data are rows drawn from the model itself (see
    :data:`SIMULATED`), always the same ones, with a RuntimeWarning that says where the files
    belong. Nothing is downloaded. With the files there, they are read, and other data than those
    of the fit are told of by a RuntimeWarning.

    Args:
        name: one of :func:`~ppl_vae.pretrained.names`.
        device: "auto", "cpu" or "cuda".
        folder: where the model's files lie.

    Raises:
        ValueError: there is no model of that name; "cuda" for ``device`` where there is none.
        CorruptCheckpoint: its files are damaged.
    """
    facts = read_facts(name, folder)
    return _fitted(facts, read_weights(facts, folder), device)


def opened(run: Run, device: str) -> Fitted:
    """The trained model in a folder that :func:`as_run` made: see :func:`ppl_vae.load`.

    Raises:
        CorruptCheckpoint: its checkpoint is damaged.
        ValueError: its checkpoint is missing.
    """
    if (checkpoint := run.load("best")) is None:
        raise ValueError(f"{run.folder} has no weights: its checkpoint 'best' is missing")
    about = {**run.record, "name": run.record["pretrained"]}
    fitted = _fitted(about, checkpoint.tensors, device, above=1)
    fitted.run = run
    return fitted


def as_run(name: str, out: str | Path, *, folder: Path = FOLDER) -> Run:
    """A trained model as the folder of a finished run, which commands and ``ppl_vae.load`` open.

    There is no state of an optimizer in it, so that the fit cannot go on.

    Args:
        name: one of :func:`~ppl_vae.pretrained.names`.
        out: folder of the run; new, or empty.
        folder: where the model's files lie.

    Raises:
        ValueError, CorruptCheckpoint: as :func:`load`.
        FileExistsError: ``out`` holds something.
    """
    facts = read_facts(name, folder)
    tensors = read_weights(facts, folder)
    taken = {field: facts[field] for field in _OF_RUN}
    about = {**taken, "weights": "best", "status": "finished", "pretrained": name}
    run = Run.create(out, about)
    run.save_as("best", tensors, {"epoch": facts["best_epoch"]})
    return run


def _fitted(facts: Facts, tensors: Mapping[str, Tensor], device: str, *, above: int = 0) -> Fitted:
    """A recipe's pair with these weights, and its data, or rows in their place.

    Args:
        above: how many calls further up than the caller's caller a warning is to point.
    """
    place, source = torch_device(device), facts["source"]
    with standing_in({source["name"]: stand_in(source)}) as missing:
        made = build(facts["recipe"], facts["arguments"], facts["seed"])
    load_weights(made.model, made.guide, tensors)
    data, doubt = made.data, _difference(facts, made.data)
    if missing:
        data = _simulated(made.model, made.data)
        doubt = (
            f"{missing[source['name']]}. Until then, the data of {facts['name']} are rows drawn "
            "from the model, whose figures say nothing of real ones"
        )
    if doubt:
        warnings.warn(doubt, RuntimeWarning, stacklevel=3 + above)
    made.model.to(place)
    made.guide.to(place)
    return Fitted(made.model, made.guide, data)


# What ``run.json`` has of the run in which the model was trained.
_OF_RUN = (
    "recipe",
    "arguments",
    "seed",
    "model",
    "guide",
    "parameters",
    "fit",
    "data",
    "source",
    "versions",
    "hardware",
    "created",
    "epochs_done",
    "seconds",
)


def _difference(facts: Facts, data: Dataset) -> str:
    """Says so, where data are other ones than those of the fit."""
    expected, found = facts["data"]["sha256"], data.fingerprint()["sha256"]
    if found == expected:
        return ""
    return (
        f"{facts['name']} was fitted to {facts['data']['name']} with sha256 {expected[:12]}…, and "
        f"the data here have {found[:12]}…: figures are not to be compared"
    )


def _simulated(model: GenerativeModel, like: Dataset) -> Dataset:
    """Rows drawn from a model, stored as those of a data set are, as far as the model has them."""
    splits: dict[str, dict[str, Tensor]] = {}
    with evaluating(0, model):
        for split, rows in SIMULATED.items():
            drawn = model.simulate(rows, **some_covariates(model, like, rows, seed=0))
            splits[split] = {
                name: _stored(drawn[name], column, like.unit if name == "x" else 1.0)
                for name, column in like.splits["train"].items()
                if name in (*model.observables, *model.covariates) and name in drawn
            }
    classes = like.classes if "y" in splits["train"] else None
    return replace(like, name=f"{like.name}, simulated", splits=splits, classes=classes)


def _stored(value: Tensor, column: Tensor, unit: float) -> Tensor:
    """A site's draws as a column of its kind: in whole numbers, where they are whole."""
    if value.dim() > column.dim():  # labels, one-hot
        value = value.argmax(-1)
    stored = value * unit
    if column.dtype.is_floating_point or bool((stored == stored.round()).all()):
        return stored.to(column.dtype)
    return stored
