"""The scores of test rows, kept part by part, and what would make them too good."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae.atomic import write_atomically
from ppl_vae.data import Dataset
from ppl_vae.draws import observed
from ppl_vae.fitting import Fitted
from ppl_vae.importance import parts
from ppl_vae.loop import weights
from ppl_vae.sites import evaluating
from ppl_vae.weights import bound, effective_samples, log_weights, pareto_smoothed

Say = Callable[[str], object]

ROWS_AT_ONCE = 1000

TAILS = 10
"""One in so many rows has a Pareto-k, the first of each part among them."""


def score(
    fitted: Fitted,
    folder: Path | None = None,
    *,
    samples: int,
    split: str = "test",
    rows: Sequence[int] | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
) -> dict[str, np.ndarray]:
    """Importance sampling of every row of a split, some hundred at a time.

    Each part has a random state of its own, so that what is done need not be done again.

    Args:
        folder: where the scores of each part are kept; None: nowhere.
        samples: importance draws a row.
        rows: numbers of the rows; None: all.
        seed: of the draws.
        say: is told which part is done.

    Returns:
        float64 ``(rows,)`` each: "elbo", "log_evidence" (Burda et al. 2016, arXiv:1509.00519,
        eq. 8), "pareto_k", nan but for one in :data:`TAILS` rows, and "effective_samples"; in
        nats per datum; and the "seconds" that a row took, when it was scored.
    """
    model, guide, held = fitted.model, fitted.guide, fitted.data.split(split)
    chosen = torch.arange(len(held)) if rows is None else torch.tensor(rows)
    kept = None if folder is None else folder / "scores" / _digest(fitted, chosen, seed)
    each = []
    for part in parts(len(chosen), ROWS_AT_ONCE):
        path = None if kept is None else kept / f"{split}-{samples}-{part.start:06d}.npz"
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as found:
                each.append(dict(found))
            continue
        begun = time.monotonic()
        with evaluating(seed + part.start, model, guide):
            columns = observed(model, held, chosen[part])
            each.append(_row_scores(log_weights(model, guide, columns, samples=samples)))
        took = time.monotonic() - begun
        each[-1]["seconds"] = np.full(len(chosen[part]), took / len(chosen[part]))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = io.BytesIO()
            np.savez(written, **each[-1])  # pyright: ignore[reportArgumentType]
            write_atomically(path, written.getvalue())
        nll = -np.concatenate([one["log_evidence"] for one in each]).mean()
        say(f"{min(part.stop, len(chosen))} of {len(chosen)} {split} rows: NLL {nll:.2f}")
    return {name: np.concatenate([one[name] for one in each]) for name in each[0]}


def _row_scores(drawn: Tensor) -> dict[str, np.ndarray]:
    """From log weights ``(samples, rows)``."""
    k = torch.full_like(drawn[0], math.nan)
    # A fit of the tail takes a row as long as a thousand draws: a tenth of the rows tell enough.
    k[::TAILS] = pareto_smoothed(drawn[:, ::TAILS]).pareto_k
    found = {
        "elbo": drawn.mean(0),
        "log_evidence": bound(drawn, len(drawn)),
        "pareto_k": k,
        "effective_samples": effective_samples(drawn),
    }
    return {name: column.numpy() for name, column in found.items()}


def _digest(fitted: Fitted, rows: Tensor, seed: int) -> str:
    """Of weights, data, rows and draws, so that scores of others are not taken for theirs."""
    found = hashlib.sha256(f"{fitted.data.fingerprint()['sha256']} {seed} ".encode())
    found.update(rows.numpy().tobytes())
    for name, tensor in sorted(weights(fitted.model, fitted.guide).items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def leaks(data: Dataset) -> dict[str, Any]:
    """What would make a figure too good: test rows among the others, and values between 0 and 1.

    Rows are compared as stored, before bits are drawn. Of binarized data, ``values`` are the least
    and the greatest of the test rows, and ``whole`` whether all are whole numbers: grey pixels have
    no likelihood under a Bernoulli.
    """
    test = data.split("test")
    of_test = _bytes_of(test.stored["x"])
    seen = {
        name: set(_bytes_of(data.split(name).stored["x"])) for name in data.splits if name != "test"
    }
    values = [test.batch(part)["x"] for part in parts(len(test), 1000)]
    return {
        "test_rows_also_in": {name: sum(r in rows for r in of_test) for name, rows in seen.items()},
        "values": [min(float(x.min()) for x in values), max(float(x.max()) for x in values)],
        "whole": all(bool((x == x.round()).all()) for x in values),
    }


def _bytes_of(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.cpu().flatten(1).numpy()]
