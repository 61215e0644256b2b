"""From a finished run and its record to the files of a trained model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ppl_vae.data import known_names, load_data
from ppl_vae.fitting import Fitted
from ppl_vae.loop import load_weights, weights
from ppl_vae.pretrained.files import FOLDER, Facts, write
from ppl_vae.pretrained.storing import packed_bytes, unpack
from ppl_vae.recipes import load
from ppl_vae.reproduction import record as records
from ppl_vae.reproduction.published import each_figure, find_published
from ppl_vae.reproduction.scoring import score

ROWS = 500
"""Test rows that are scored before and after storing."""


def keep(
    run: str | Path,
    record: str | Path,
    name: str,
    *,
    folder: Path = FOLDER,
    rows: int = ROWS,
    samples: int | None = None,
) -> Facts:
    """Store a finished run as a trained model, in place of one of that name; and score test rows
    before and after, with the same draws, to see what storing costs.

    Args:
        run: its folder.
        record: the JSON file of its reproduction.
        name: of the model.
        folder: where to put its two files.
        rows: how many test rows to score, at random.
        samples: importance draws a row; None: as many as in the record.

    Returns:
        what is in the JSON file.

    Raises:
        ValueError: a record of another run or format, a run that is not finished, data that
            ``load_data`` does not know by name, or weights that are too many to be stored.
        FileNotFoundError: no run, no record, or no data.
    """
    fitted = load(run)
    about = _record_of(fitted, Path(record))
    # What recipes make of a data set goes by its name, with more after a comma.
    source = about["data"]["name"].partition(",")[0]
    if source not in known_names():
        raise ValueError(
            f"{run} was fitted to {source!r}, which is none of {', '.join(known_names())}: others "
            "could not read it"
        )
    before = weights(fitted.model, fitted.guide)
    data, bits = packed_bytes(before, _buffers(fitted))
    draws = samples or about["figures"]["samples"]
    cost = _cost(fitted, data, rows=rows, samples=draws)
    facts: Facts = {
        "name": name,
        **{field: value for field, value in about.items() if field not in _LEFT},
        "reproduction": about["name"],
        "published": about["published"] | _published(about["name"]),
        "source": load_data(source).describe() | {"name": source},
        "stored": {"bits": bits, **cost},
    }
    write(facts, data, folder)
    return facts


# Of the record: what has another meaning here, and what is long.
_LEFT = ("format", "name", "published", "curve")


def _record_of(fitted: Fitted, path: Path) -> dict[str, Any]:
    """The record, if it is this run's."""
    assert fitted.run is not None
    run = fitted.run.record
    if run.get("status") != "finished":
        raise ValueError(f"{fitted.run.folder} is not finished: its status is {run.get('status')}")
    record = json.loads(path.read_text("utf-8"))
    if not isinstance(record, dict) or record.get("format") != records.FORMAT:
        raise ValueError(f"{path} is no record of format {records.FORMAT}")
    for field in ("recipe", "arguments", "seed", "created", "epochs_done"):
        if record[field] != run[field]:
            raise ValueError(
                f"{path} is not the record of {fitted.run.folder}: {field} is {record[field]!r} "
                f"there and {run[field]!r} here"
            )
    return record


def _published(name: str) -> dict[str, Any]:
    """Where a published figure stands, and how it was made."""
    figure = find_published(name)
    group = next(group for group, one in each_figure() if one.name == name)
    return {
        "source": group.source,
        "protocol": group.protocol,
        "seen": figure.seen,
        "note": figure.note,
    }


def _buffers(fitted: Fitted) -> set[str]:
    """Names of weights that are no parameters."""
    return {
        f"{role}.{name}"
        for role, module in (("model", fitted.model), ("guide", fitted.guide))
        for name, _ in module.named_buffers()
    }


def _cost(fitted: Fitted, data: bytes, *, rows: int, samples: int) -> dict[str, Any]:
    """NLL of some test rows before and after storing, which the pair has afterwards."""
    held = len(fitted.data.split("test"))
    order = torch.randperm(held, generator=torch.Generator().manual_seed(0))
    chosen = order[:rows].sort().values.tolist()

    def nll() -> np.ndarray:
        return -score(fitted, samples=samples, rows=chosen)["log_evidence"]

    before = nll()
    load_weights(fitted.model, fitted.guide, unpack(safetensors.torch.load(data)))
    after = nll()
    more = after - before
    return {
        "rows": len(more),
        "samples": samples,
        "nll_before": float(before.mean()),
        "nll_after": float(after.mean()),
        "difference": float(more.mean()),
        "difference_se": float(more.std(ddof=1) / math.sqrt(len(more))),
    }
