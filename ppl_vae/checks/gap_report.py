"""What the check of gaps says of its figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from xarray import Dataset

from ppl_vae.weights import RELIABLE

LITTLE = 0.1
"""Nats: a gap of less is no cause to do anything."""

_FIGURES = {
    "log_evidence": "log p(x)",
    "elbo": "ELBO, amortized",
    "elbo_refined": "ELBO, refined in the family",
    "elbo_full_rank": "ELBO, refined with all covariances",
    "inference": "inference gap",
    "amortization": "amortization gap",
    "approximation": "approximation gap",
    "by_full_rank": "approximation gap: all covariances get back",
    "rest": "approximation gap: rest",
    "late_gain": "gain of the later half of the steps, in the family",
    "late_gain_full_rank": "gain of the later half of the steps, all covariances",
}


def records(group: Dataset, splits: list[str]) -> list[dict[str, Any]]:
    """The table of figures, from those of the rows (see :func:`ppl_vae.checks.gaps.gaps`)."""
    table: list[dict[str, Any]] = []
    for split in splits:
        rows = group["split"].values == split
        for key, figure in _FIGURES.items():
            if key in group:
                table.append(_record(split, figure, group[key].values[rows]))
        high = (group["pareto_k"].values[rows] > RELIABLE).astype(float)
        table.append(_record(split, f"rows with Pareto-k above {RELIABLE}", high, "share"))
    if len(splits) > 1:
        table.append(_difference(table, splits))
    return table


def _record(split: str, figure: str, values: np.ndarray, unit: str = "nats") -> dict[str, Any]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {
        "split": split,
        "figure": figure,
        "rows": len(values),
        "value": float(values.mean()),
        "standard_error": float(error),
        "unit": unit,
    }


def _difference(table: list[dict[str, Any]], splits: list[str]) -> dict[str, Any]:
    """How much more the encoder loses of rows that it was not fitted to."""
    train, held = (_of(table, split, "amortization gap") for split in splits)
    return held | {
        "split": f"{splits[1]} less {splits[0]}",
        "value": held["value"] - train["value"],
        "standard_error": math.hypot(held["standard_error"], train["standard_error"]),
    }


def _of(table: list[dict[str, Any]], split: str, figure: str) -> dict[str, Any]:
    return next(r for r in table if (r["split"], r["figure"]) == (split, figure))


def _shown(record: dict[str, Any]) -> str:
    return f"{record['value']:.2f} ± {record['standard_error']:.2f}"


def meaning(table: list[dict[str, Any]], splits: list[str], note: str) -> str:
    """Where the bound is lost, and what to try; ``note`` says what could not be found out."""
    split = splits[-1]
    inference, amortization, approximation, covariances = (
        _of(table, split, _FIGURES[key])
        for key in ("inference", "amortization", "approximation", "by_full_rank")
    )
    found = [
        f"The ELBO of {inference['rows']} rows ({split}) lacks {_shown(inference)} nats to log "
        f"p(x): {_shown(amortization)} by the encoder (amortization gap), "
        f"{_shown(approximation)} by the family of q (approximation gap)"
        + ("." if note else f", of which covariances get back {_shown(covariances)}.")
    ]
    if note:
        found.append(note)
    more = table[-1] if len(splits) > 1 else None
    overfitted = more is not None and more["value"] > max(2 * more["standard_error"], LITTLE)
    if inference["value"] < LITTLE:
        found.append("Little is lost: nothing need be done.")
    elif amortization["value"] >= approximation["value"]:
        found.append(
            "Before a richer family, try SemiAmortized"
            + ("." if overfitted else ", a larger encoder, or more training of the guide.")
        )
    elif not note and covariances["value"] > approximation["value"] / 2:
        found.append("Try a family with covariances: FullRank, or a flow.")
    else:
        found.append(
            "Try a richer family: NormalizingFlow, Mixture, or with several latents Autoregressive."
        )
    if overfitted and more is not None:
        found.append(
            f"Of held-out rows the encoder loses {_shown(more)} nats more than of training rows: "
            "it is overfitted; fit it on more rows, or further on rows that the model emits."
        )
    high = _of(table, split, f"rows with Pareto-k above {RELIABLE}")["value"]
    if high > 0:
        found.append(
            f"Pareto-k is above {RELIABLE} in {high:.0%} of the rows: log p(x), and with it the "
            "approximation gap, may be larger than it seems there."
        )
    late = _of(table, split, _FIGURES["late_gain"])["value"]
    if late > max(LITTLE, amortization["value"] / 4):
        found.append("Refining still gained at its end: take more steps.")
    return " ".join(found)
