"""A reproduction: a recipe fitted, scored on every test row, and held against what was published.

OUT/runs/NAME/seed-N           the run, and the scores of the test rows that are done
OUT/records/NAME-seed-N.json   what came of it, once it is finished

Everything goes on where it was stopped, by Ctrl-C, a kill, or the end of a budget.
"""

from __future__ import annotations

import _thread
import hashlib
import io
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.atomic import write_atomically
from ppl_vae.data import Dataset
from ppl_vae.draws import observed
from ppl_vae.evaluation import Evaluation, evaluate, finite_or_none
from ppl_vae.fitting import Fitted, torch_device
from ppl_vae.importance import parts
from ppl_vae.loop import weights
from ppl_vae.recipes import load, resume, run_recipe
from ppl_vae.replicas import averaged_labels
from ppl_vae.reproduction.published import Published, find_published, published
from ppl_vae.run import Run, environment
from ppl_vae.sites import evaluating
from ppl_vae.weights import RELIABLE, bound, effective_samples, log_weights, pareto_smoothed

FORMAT = 1

Protocol = Literal["recipe", "paper"]
"""How the model is optimized: as its recipe says, or as the paper's authors did."""

MARGIN = 0.3
"""Nats within which two figures are told apart by nobody: seeds of one fit differ by about 0.1."""

Say = Callable[[str], object]


class Reproduction(NamedTuple):
    """One run for one published figure."""

    figure: Published
    protocol: Protocol
    seed: int

    @property
    def family(self) -> str:
        """What the seeds of a figure have in common."""
        return self.figure.name + ("" if self.protocol == "recipe" else f"-{self.protocol}")

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.family / f"seed-{self.seed}"

    def path(self, out: Path) -> Path:
        return out / "records" / f"{self.family}-seed-{self.seed}.json"

    def options(self) -> dict[str, Any]:
        """Of the fit, which win over the recipe's own."""
        if self.protocol == "recipe":
            return {}
        return dict(self.figure.paper or {})


def reproduce(
    names: Sequence[str] = (),
    *,
    out: str | Path,
    protocol: Protocol = "recipe",
    seeds: int = 1,
    budget: float | None = None,
    device: str = "auto",
    progress: bool = False,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Fit, score and record what is asked for and not there yet, seed by seed; or go on with it.

    Args:
        names: of published figures (see :func:`~ppl_vae.reproduction.published`); none: all whose
            data can be had, those of most worth first.
        out: folder of the runs and the records.
        protocol: how to optimize. Data, early stopping and evaluation are the paper's either way.
        seeds: how many, from 0 upwards. On CUDA they are trained at once.
        budget: minutes after which to stop; what is begun then goes on the next time.
        device: "auto", "cpu" or "cuda".
        progress: show a fit's progress.
        say: is told what is done.

    Returns:
        the records, also of those that were there.

    Raises:
        ValueError: an unknown name; a number below 1; "paper" for a figure without one.
        FileNotFoundError: data of a figure that was asked for by its name.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget={budget}: expected minutes, more than 0")
    device, out = torch_device(device), Path(out)
    figures = [find_published(name) for name in names] or list(published().values())
    if protocol == "paper":
        if without := [figure.name for figure in figures if figure.paper is None and names]:
            raise ValueError(
                f"{without[0]} has no paper's optimization beside the recipe's own: leave "
                "--protocol out"
            )
        figures = [figure for figure in figures if figure.paper is not None]
    records: list[dict[str, Any]] = []
    together = device == "cuda" and seeds > 1
    with _deadline(budget, say):
        for batch in [range(seeds)] if together else [[seed] for seed in range(seeds)]:
            for figure in figures:
                wanted = [Reproduction(figure, protocol, seed) for seed in batch]
                try:
                    _fit_missing(wanted, out, device=device, progress=progress, say=say)
                except FileNotFoundError as error:
                    if names:
                        raise
                    say(f"{figure.name}: passed over, {error}")
                    continue
                records += [_recorded(one, out, device=device, say=say) for one in wanted]
    return records


def _fit_missing(
    wanted: Sequence[Reproduction], out: Path, *, device: str, progress: bool, say: Say
) -> None:
    """Fit those without a record: one alone, or all at once."""
    if all(one.path(out).exists() for one in wanted):
        return
    first = wanted[0]
    folder = first.folder(out) if len(wanted) == 1 else first.folder(out).parent
    begun = [one.folder(out) for one in wanted if (one.folder(out) / "run.json").exists()]
    if len(begun) == len(wanted) and all(_finished(each) for each in begun):
        return
    options = {"device": device, "progress": progress}
    # A run begins with a checkpoint: a folder without one is what a kill left of a beginning.
    if begun and len(begun) == len(wanted):
        say(f"{first.family}: going on with {folder}")
        resume(folder, **options)
        return
    say(f"{first.family}: fitting {first.figure.recipe}")
    run_recipe(
        first.figure.recipe,
        first.figure.arguments,
        out=folder,
        seed=first.seed,
        seeds=None if len(wanted) == 1 else len(wanted),
        **first.options(),
        **options,
    )


def _finished(folder: Path) -> bool:
    return Run.open(folder).record.get("status") == "finished"


def _recorded(one: Reproduction, out: Path, *, device: str, say: Say) -> dict[str, Any]:
    """The record of a finished fit, made if it is not there."""
    path = one.path(out)
    if not path.exists():
        fitted = load(one.folder(out), device=device)
        record = made_record(one, fitted, device=device, say=say)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_json(record))
        ours, figure = record["figures"][one.figure.measure], one.figure
        against = "" if figure.value is None else f" (published {figure.value:g})"
        say(f"{one.family}: {ours:.2f}{against}: {record['verdict']}; {path}")
    return json.loads(path.read_text("utf-8"))


def made_record(
    one: Reproduction, fitted: Fitted, *, device: str, say: Say = lambda text: None
) -> dict[str, Any]:
    """Score the test rows of a finished run; what came of it, in JSON types."""
    assert fitted.run is not None
    figure, run = one.figure, Run.open(fitted.run.folder)
    about = run.record
    begun, load_before = time.monotonic(), os.getloadavg()[0]
    figures = _figures(fitted, figure, run.folder, say)
    return {
        "format": FORMAT,
        "name": figure.name,
        "protocol": one.protocol,
        "seed": one.seed,
        "published": {"value": figure.value, "error": figure.error, "measure": figure.measure},
        "figures": figures,
        "verdict": verdict(figures[figure.measure], figure, figures.get("error_se", 0.0)),
        "evaluated": {
            "device": device,
            "threads": torch.get_num_threads(),
            "load": load_before,
            "seconds": time.monotonic() - begun,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment(),
        },
        **{name: about[name] for name in _OF_RUN},
        "best_epoch": _best_epoch(run),
        "leaks": leaks(fitted.data),
        "curve": _curve(run.metrics()),
    }


# What a record takes over from ``run.json``: the recipe as resolved, data, versions, hardware.
_OF_RUN = (
    "recipe",
    "arguments",
    "model",
    "guide",
    "parameters",
    "fit",
    "data",
    "versions",
    "hardware",
    "created",
    "epochs_done",
    "seconds",
    "compile_seconds",
    "weights",
)


def verdict(ours: float, figure: Published, error: float = 0.0) -> str:
    """ "better", "reached" or "worse" than the published figure, or "none published".

    Of nats, figures within :data:`MARGIN` are alike. Test rows are the same for both, so that the
    standard error over rows, most of which both have in common, tells nothing. Of errors in
    percent, and of means over seeds, those within two standard errors of the difference.

    Args:
        error: standard error of ours, over seeds, or of a share of rows.
    """
    if figure.value is None:
        return "none published"
    least = 0.0 if figure.measure == "error" else MARGIN
    margin = max(least, 2 * math.hypot(error, figure.error or 0.0))
    difference = ours - figure.value
    return "reached" if abs(difference) <= margin else "better" if difference < 0 else "worse"


def _figures(fitted: Fitted, figure: Published, folder: Path, say: Say) -> dict[str, Any]:
    """All figures of the test rows."""
    if figure.measure == "error":
        found = evaluate(fitted.model, fitted.guide, fitted.data, samples=figure.samples)
        return finite_or_none(_of_labels(found))
    scores = score(fitted, folder, samples=figure.samples, say=say)
    # Draws of its own, so that the ELBO stands beside a second one.
    found = evaluate(fitted.model, fitted.guide, fitted.data, samples=10, seed=1)
    evidence, k = scores["log_evidence"], scores["pareto_k"]
    known = k[np.isfinite(k)]
    return finite_or_none(
        {
            "split": "test",
            "rows": len(evidence),
            "samples": figure.samples,
            "nll": -float(evidence.mean()),
            "nll_se": _standard_error(evidence),
            "negative_elbo": -float(scores["elbo"].mean()),
            "negative_elbo_se": _standard_error(scores["elbo"]),
            "negative_elbo_of_10_draws": -found.elbo,
            "reconstruction": found.reconstruction,
            "kl_per_site": found.kl_per_site,
            "active_units": found.active_units,
            "bits_per_dim": found.bits_per_dim,
            "pareto_k": {
                "median": float(np.median(known)) if len(known) else math.nan,
                "share_above_0.7": float((known > RELIABLE).mean()) if len(known) else math.nan,
                "rows_without": len(k) - len(known),
            },
            "effective_samples": {
                "median": float(np.median(scores["effective_samples"])),
                "least": float(scores["effective_samples"].min()),
            },
        }
    )


def _of_labels(found: Evaluation) -> dict[str, Any]:
    if found.labels is None:
        raise ValueError(
            "no labels are withheld from the training rows: a recipe's data come from "
            "Dataset.labeled(labels, label_seed)"
        )
    scores = found.labels["classifier"]
    return {
        "split": found.split,
        "rows": found.rows,
        "samples": found.samples,
        "error": 100 * (1 - scores.accuracy),
        "error_se": 100 * scores.accuracy_se,
        "nll": found.nll,
        "nll_se": found.nll_se,
        "negative_elbo": -found.elbo,
        "negative_elbo_se": found.elbo_se,
        "labels": {source: averaged_labels(own) for source, own in found.labels.items()},
    }


ROWS_AT_ONCE = 500


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
        eq. 8), "pareto_k" and "effective_samples"; in nats per datum.
    """
    model, guide, held = fitted.model, fitted.guide, fitted.data.split(split)
    chosen = torch.arange(len(held)) if rows is None else torch.tensor(rows)
    kept = None if folder is None else folder / "scores" / _digest(fitted)
    each = []
    for part in parts(len(chosen), ROWS_AT_ONCE):
        path = None if kept is None else kept / f"{split}-{samples}-{part.start:06d}.npz"
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as found:
                each.append(dict(found))
            continue
        with evaluating(seed + part.start, model, guide):
            columns = observed(model, held, chosen[part])
            drawn = log_weights(model, guide, columns, samples=samples)
            each.append(_row_scores(drawn))
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
    found = {
        "elbo": drawn.mean(0),
        "log_evidence": bound(drawn, len(drawn)),
        "pareto_k": pareto_smoothed(drawn).pareto_k,
        "effective_samples": effective_samples(drawn),
    }
    return {name: column.numpy() for name, column in found.items()}


def _digest(fitted: Fitted) -> str:
    """Of the weights, so that scores of others are not taken for theirs."""
    found = hashlib.sha256()
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
    seen = {name: _hashes(data.split(name).stored["x"]) for name in data.splits if name != "test"}
    test = data.split("test")
    of_test = _hashes(test.stored["x"])
    values = torch.stack(
        [
            torch.stack([x.min(), x.max(), (x == x.round()).all().to(x.dtype)])
            for part in parts(len(test), 1000)
            for x in [test.batch(part)["x"]]
        ]
    )
    return {
        "test_rows_also_in": {
            name: sum(row in rows for row in of_test) for name, rows in _sets(seen).items()
        },
        "values": [float(values[:, 0].min()), float(values[:, 1].max())],
        "whole": bool(values[:, 2].all()),
    }


def _sets(seen: Mapping[str, list[bytes]]) -> dict[str, set[bytes]]:
    return {name: set(rows) for name, rows in seen.items()}


def _hashes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.cpu().flatten(1).numpy()]


def _best_epoch(run: Run) -> int:
    """Of the weights that were kept."""
    if run.record["weights"] == "best" and (best := run.load("best")) is not None:
        return int(best.state["epoch"])
    return int(run.record["epochs_done"])


def _curve(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """``metrics.csv``, column by column, in four digits after the point."""
    names = list(history[0]) if history else []
    return {name: [round(row[name], 4) for row in history] for name in names}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def as_json(value: Any) -> bytes:
    """JSON whose lists of numbers, such as a curve's, stand on a line each."""
    text = json.dumps(finite_or_none(value), indent=2, ensure_ascii=False)
    lists = re.compile(r"\[\s+([^\[\]{}\"]*?)\s+\]")
    return (lists.sub(lambda m: f"[{' '.join(m[1].split())}]", text) + "\n").encode()


@contextmanager
def _deadline(minutes: float | None, say: Say) -> Iterator[None]:
    """Stops what is done after so many minutes as a Ctrl-C would, which loses nothing."""
    if minutes is None:
        yield
        return
    over = threading.Event()

    def stop() -> None:
        over.set()
        _thread.interrupt_main()

    timer = threading.Timer(60 * minutes, stop)
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        say(f"the budget of {minutes:g} minutes is over: the same command goes on")
    finally:
        timer.cancel()
