"""A reproduction: a recipe fitted, scored on every test row, and held against what was published.

OUT/runs/NAME/seed-N           the run, and the scores of the test rows that are done
OUT/records/NAME-seed-N.json   what came of it, once it is finished

Everything goes on where it was stopped, by Ctrl-C, a kill, or the end of a budget.
"""

from __future__ import annotations

import _thread
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

from ppl_vae.atomic import write_atomically
from ppl_vae.evaluation import Evaluation, evaluate, finite_or_none
from ppl_vae.fitting import Fitted, torch_device
from ppl_vae.recipes import load, resume, run_recipe
from ppl_vae.replicas import averaged_labels
from ppl_vae.reproduction.published import Published, find_published, published
from ppl_vae.reproduction.scoring import Say, leaks, score
from ppl_vae.run import Run, environment
from ppl_vae.weights import RELIABLE

FORMAT = 1

Protocol = Literal["recipe", "paper"]
"""How the model is optimized: as its recipe says, or as the paper's authors did."""

MARGIN = 0.3
"""Nats within which two figures count as alike."""


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

    def arguments(self) -> dict[str, Any]:
        """Of the recipe. Which labels are given is drawn anew for each seed."""
        own = {"label_seed": self.seed} if self.figure.measure == "error" else {}
        return {**self.figure.arguments, **own}

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
    precision: str | None = None,
    progress: bool = False,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Fit, score and record what is asked for and not there yet, seed by seed; or go on with it.

    Args:
        names: of published figures (see :func:`~ppl_vae.reproduction.published`); none: all whose
            data can be had, those of most worth first.
        out: folder of the runs and the records.
        protocol: how to optimize. Data, split and evaluation are the same either way.
        seeds: how many, from 0 upwards. On CUDA they are trained at once.
        budget: minutes after which to stop; what is begun then goes on the next time.
        device: "auto", "cpu" or "cuda".
        precision: of fits that are begun, as :func:`ppl_vae.fit` has it; None: the recipe's, or the
            paper's. Scores are computed in float32, or in float64 for "64-true".
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
    options = {"device": device, "precision": precision, "progress": progress}
    with _deadline(budget, say) as check_time:
        for batch in [range(seeds)] if device == "cuda" else [[seed] for seed in range(seeds)]:
            for figure in figures:
                wanted = [Reproduction(figure, protocol, seed) for seed in batch]
                try:
                    for some in _groups(wanted, out):
                        check_time()
                        _fit(some, out, options, say)
                        check_time()
                        records += [_recorded(one, out, device=device, say=say) for one in some]
                except (OSError, ValueError, FloatingPointError) as error:
                    if names:
                        raise
                    say(f"{figure.name}: passed over, {error}")
    return records


def _groups(wanted: Sequence[Reproduction], out: Path) -> list[list[Reproduction]]:
    """Which seeds are fitted at once: all, where none is begun or all are; else one by one.

    Labels are drawn anew for each seed, and seeds that are fitted at once share their data.
    """
    begun = {one.path(out).exists() or (one.folder(out) / "run.json").exists() for one in wanted}
    left = any(one.path(out).exists() for one in wanted)
    if len(wanted) == 1 or len(begun) > 1 or left or wanted[0].figure.measure == "error":
        return [[one] for one in wanted]
    return [list(wanted)]


def _fit(wanted: Sequence[Reproduction], out: Path, options: Mapping[str, Any], say: Say) -> None:
    """Fit those without a record, or go on with them: one alone, or all at once."""
    first, folders = wanted[0], [one.folder(out) for one in wanted]
    if all(one.path(out).exists() for one in wanted):
        return
    folder = folders[0] if len(wanted) == 1 else folders[0].parent
    if (folders[0] / "run.json").exists():
        if not all(_finished(each) for each in folders):
            say(f"{first.family}: going on with {folder}")
            # What run.json has by its name alone; the rest stays as it was begun, precision too.
            functions = {name: value for name, value in first.options().items() if callable(value)}
            resume(folder, **functions, **{**options, "precision": None})
        return
    say(f"{first.family}: fitting {first.figure.recipe}")
    run_recipe(
        first.figure.recipe,
        first.arguments(),
        out=folder,
        seed=first.seed,
        seeds=None if len(wanted) == 1 else len(wanted),
        **(first.options() | {name: value for name, value in options.items() if value is not None}),
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
        shown = "–" if ours is None else f"{ours:.2f}"
        say(f"{one.family}: {shown}{against}: {record['verdict']}; {path}")
    return json.loads(path.read_text("utf-8"))


def made_record(
    one: Reproduction, fitted: Fitted, *, device: str, say: Say = lambda text: None
) -> dict[str, Any]:
    """Score the test rows of a finished run; what came of it, in JSON types."""
    assert fitted.run is not None
    figure, run = one.figure, Run.open(fitted.run.folder)
    about = run.record
    if (sha256 := fitted.data.fingerprint()["sha256"]) != about["data"]["sha256"]:
        raise ValueError(
            f"{run.folder} was fitted to other data than {fitted.data.name} is now: sha256 "
            f"{about['data']['sha256'][:12]} then, {sha256[:12]} now"
        )
    load_before = os.getloadavg()[0]
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


def verdict(ours: float | None, figure: Published, error: float = 0.0) -> str:
    """ "better", "reached" or "worse" than the published figure, "none published", or "not finite".

    Of nats, figures within :data:`MARGIN` are alike. Test rows are the same for both, so that the
    standard error over rows, most of which both have in common, tells nothing. Of errors in
    percent, and of means over seeds, those within two standard errors of the difference.

    Args:
        error: standard error of ours, over seeds, or of a share of rows.
    """
    if ours is None or not math.isfinite(ours):
        return "not finite"
    if figure.value is None:
        return "none published"
    least = 0.0 if figure.measure == "error" else MARGIN
    margin = max(least, 2 * math.hypot(error, figure.error or 0.0))
    difference = ours - figure.value
    return "reached" if abs(difference) <= margin else "better" if difference < 0 else "worse"


def _figures(fitted: Fitted, figure: Published, folder: Path, say: Say) -> dict[str, Any]:
    """All figures of the test rows."""
    if figure.measure == "error":
        begun = time.monotonic()
        found = evaluate(fitted.model, fitted.guide, fitted.data, samples=figure.samples)
        return finite_or_none({**_of_labels(found), "seconds": time.monotonic() - begun})
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
            "seconds": float(scores["seconds"].sum()),
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
                "rows": len(known),
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
def _deadline(minutes: float | None, say: Say) -> Iterator[Callable[[], None]]:
    """Stops what is done after so many minutes as a Ctrl-C would, which loses nothing.

    Gives a function that stops too, once they are over: a fit that had just come to its end when
    it was interrupted has not stopped.
    """
    over = threading.Event()

    def stop() -> None:
        over.set()
        _thread.interrupt_main()

    def check() -> None:
        if over.is_set():
            raise KeyboardInterrupt

    timer = None if minutes is None else threading.Timer(60 * minutes, stop)
    if timer is not None:
        timer.start()
    try:
        yield check
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        say(f"the budget of {minutes:g} minutes is over: the same command goes on")
    finally:
        if timer is not None:
            timer.cancel()
