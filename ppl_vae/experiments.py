"""Experiments: many runs of recipes side by side, with seeds, a table and a plot.

OUT/experiment.json        what all records share
OUT/runs/NAME/             a run's folder each
OUT/records/NAME.json      its figures, once it is finished
OUT/table.json, table.md   means and standard errors over seeds, and every seed's figures
OUT/plot.png
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_vae.atomic import write_atomically
from ppl_vae.discrete import Estimator
from ppl_vae.evaluation import evaluate, finite_or_none
from ppl_vae.figures import empty
from ppl_vae.fitting import Fitted, torch_device
from ppl_vae.markdown import table as markdown_table
from ppl_vae.recipes import build, find_recipe, recipes, resume, run_recipe
from ppl_vae.replicas import averaged, averaged_labels, spread
from ppl_vae.run import Run, environment
from ppl_vae.supervised import RULE, classifier, fit_supervised

SUPERVISED = "supervised"
"""What stands for the estimator of a baseline that learns from the rows with labels alone."""


class Case(NamedTuple):
    """One run of an experiment.

    Attributes:
        model: as the table calls it.
        recipe: that makes it.
        estimator: of the label's gradient; of a recipe without a choice, its own.
        chosen: whether the recipe takes the estimator as an argument.
        labels: how many training rows keep their label.
        seed: of weights, noise, order of rows, and of the draw of those labels.
    """

    model: str
    recipe: str
    estimator: str
    chosen: bool
    labels: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.estimator}-{self.labels}-{self.seed}"

    def arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {"labels": self.labels, "label_seed": self.seed}
        return given | ({"estimator": self.estimator} if self.chosen else {})


def semi_supervised(
    out: str | Path,
    *,
    data: Literal["digits", "mnist"] = "digits",
    models: Sequence[str] | None = None,
    estimators: Sequence[str] = ("enumerate",),
    labels: Sequence[int] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    samples: int = 100,
    device: str = "auto",
    progress: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Fit every combination of models, estimators, numbers of labels and seeds, and a classifier on
    the rows with labels alone; write the figures of each, and a table over seeds.

    A record that is there is not made again, and a run that was interrupted goes on, so that the
    same call, or one for more, completes an experiment. A run whose loss is no longer finite is
    recorded as failed, and the others go on. Figures are those of the test rows, whose labels
    nobody saw. The baseline has the net of the recipe's classifier, with the initial weights of the
    same seed (:func:`ppl_vae.supervised.fit_supervised`).

    Args:
        out: folder of the experiment.
        data: the recipes' data.
        models: the beginnings of recipes' names, such as "m2"; names of recipes; or
            ``path/to/file.py:function``. None: all recipes of these data.
        estimators: of the label's gradient; a recipe without a choice is run with its own.
        labels: numbers of labels; None: the recipes' own.
        seeds: from 0 upwards, each with labels of its own.
        epochs: None: the recipes' own.
        samples: importance draws a row, for NLL and p(y | x).
        device: "auto", "cpu" or "cuda".
        progress: show that of each fit.
        say: is told what is done.

    Returns:
        What ``table.json`` holds.

    Raises:
        ValueError: an unknown model or estimator, a number below 1, a folder that holds an
            experiment with other data, epochs or samples; and as :func:`ppl_vae.fit`.
        KeyboardInterrupt: after a checkpoint has been saved.
    """
    for name, value in (("seeds", seeds), ("samples", samples), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    out, device = Path(out), torch_device(device)
    settings = {"data": data, "epochs": epochs, "samples": samples, "device": device}
    cases = list(combinations(data, models, estimators, labels, seeds))
    _begin(out, settings)
    shared = {"epochs": epochs, "samples": samples, "device": device, "progress": progress}
    records: list[dict[str, Any]] = []
    table: dict[str, Any] = {}
    for number, case in enumerate(cases):
        path = out / "records" / f"{case.name}.json"
        if not path.exists():
            say(f"{number + 1} of {len(cases)}: {case.name}")
            record = _run(case, out / "runs" / case.name, **shared)
            write_atomically(path, _json(record))
        record = json.loads(path.read_text("utf-8"))
        if record["recipe"] != case.recipe:
            raise ValueError(
                f"{path} is of recipe {record['recipe']!r}, not {case.recipe!r}: give another --out"
            )
        records.append(record)
        table = {"experiment": "semi-supervised", **settings, **tabulated(records)}
        write_atomically(out / "table.json", _json(table))
        write_atomically(out / "table.md", markdown(table).encode())
    drawn = BytesIO()
    plot(table).savefig(drawn, format="png", dpi=150)
    write_atomically(out / "plot.png", drawn.getvalue())
    return table


def combinations(
    data: str,
    models: Sequence[str] | None,
    estimators: Sequence[str],
    labels: Sequence[int] | None,
    seeds: int,
) -> Iterator[Case]:
    """The runs of an experiment, baselines first; arguments are those of :func:`semi_supervised`.

    Raises:
        ValueError: an unknown model or estimator; two models of one name.
    """
    if wrong := [name for name in estimators if name not in get_args(Estimator)]:
        raise ValueError(
            f"estimator {wrong[0]!r}: expected some of {', '.join(get_args(Estimator))}"
        )
    found = _recipes(data, models)
    for model, recipe in found.items():
        known = inspect.signature(find_recipe(recipe)).parameters
        counts = [known["labels"].default] if labels is None else labels
        own = classifier(build(recipe, {"labels": counts[0]}, seed=0).guide)
        chosen = "estimator" in known
        kinds = estimators if chosen else ["own" if own is None else own.estimator]
        for count in counts:
            for seed in range(seeds):
                if own is not None:
                    yield Case(model, recipe, SUPERVISED, False, count, seed)
                for estimator in dict.fromkeys(kinds):
                    yield Case(model, recipe, estimator, chosen, count, seed)


def tabulated(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records, by model, estimator and number of labels: mean and standard error over seeds."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        key = record["model"], record["estimator"], record["labels"]
        groups.setdefault(key, []).append(record)
    rows: list[dict[str, Any]] = []
    for (model, estimator, labels), own in groups.items():
        done = [one for one in own if "failed" not in one]
        mean, error = spread([_numbers(one["figures"]) for one in done]) if done else ({}, {})
        rows.append(
            {
                "model": model,
                "recipe": own[0]["recipe"],
                "estimator": estimator,
                "labels": labels,
                "seeds": len(done),
                "failed": len(own) - len(done),
                "mean": mean,
                "standard_error": error,
                "each": [{k: v for k, v in one.items() if k != "evaluation"} for one in own],
            }
        )
    return finite_or_none({"rows": rows, "baseline": RULE})


def markdown(table: dict[str, Any]) -> str:
    """The table, and every seed's error, for people."""
    head = (
        "model",
        "estimator",
        "labels",
        "seeds",
        "error, %",
        "error by p(y \\| x), %",
        "log loss",
        "calibration error",
        "NLL, nats",
        "fit, s",
        "ms a step",
    )
    lines: list[Sequence[str]] = []
    each: list[Sequence[str]] = []
    for row in table["rows"]:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        lines.append(
            (
                row["model"],
                row["estimator"],
                str(row["labels"]),
                f"{row['seeds']}{failed}",
                _shown(_error(row, "classifier"), 2),
                _shown(_error(row, "importance"), 2),
                _shown(_spread(row, "labels", "classifier", "log_loss"), 3),
                _shown(_spread(row, "labels", "classifier", "calibration_error"), 3),
                _shown(_spread(row, "nll"), 2),
                _shown(_spread(row, "seconds"), 0),
                _shown(_spread(row, "ms_a_step"), 1),
            )
        )
        seen = [
            f"{one['seed']}: "
            + (
                "failed"
                if "failed" in one
                else f"{100 * (1 - one['figures']['labels']['classifier']['accuracy']):.2f}"
            )
            for one in row["each"]
        ]
        each.append((row["model"], row["estimator"], str(row["labels"]), ", ".join(seen)))
    machines = {_machine(one) for row in table["rows"] for one in row["each"]}
    epochs = "the recipes' own" if table["epochs"] is None else str(table["epochs"])
    return "\n".join(
        [
            f"# Semi-supervised learning, {table['data']}",
            "",
            "Test rows, mean ± standard error over seeds. Error: of the classifier q(y | x), or by "
            f"importance sampling of p(y | x), {table['samples']} draws; log loss and calibration "
            f"error are the classifier's. Epochs: {epochs}. Milliseconds a step are all of "
            "training, validation included, by the number of steps.",
            "",
            markdown_table(head, lines),
            "",
            f"`{SUPERVISED}`: the classifier's net on the rows with labels alone. {RULE}.",
            "",
            markdown_table((*head[:3], "error, %, seed by seed"), each),
            "",
            *sorted(machines),
            "",
        ]
    )


def plot(table: dict[str, Any]) -> Figure:
    """Test error by the number of labels: a line for each model and estimator."""
    figure = empty(6.4, 4.2)
    ax = figure.subplots()
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table["rows"]:
        if row["seeds"]:
            lines.setdefault((row["model"], row["estimator"]), []).append(row)
    counts = sorted({row["labels"] for row in table["rows"]})
    for number, ((model, estimator), rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row["labels"])
        # Apart, so that error bars do not hide each other.
        shift = 1.03 ** (number - (len(lines) - 1) / 2)
        errors = [_error(row, "classifier") for row in rows]
        ax.errorbar(
            [row["labels"] * shift for row in rows],
            [mean for mean, _ in errors],
            yerr=np.nan_to_num([se for _, se in errors]),
            label=f"{model}, {estimator}",
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="--" if estimator == SUPERVISED else "-",
            color="0.45" if estimator == SUPERVISED else None,
        )
    ax.set_xscale("log")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.set_xticks([], minor=True)
    if len(counts) == 1:
        ax.set_xlim(counts[0] / 1.5, counts[0] * 1.5)
    ax.set(xlabel="training rows with a label", ylabel="test error of q(y | x), %")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    if lines:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    seeds = {row["seeds"] for row in table["rows"]}
    over = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{seeds.pop()}" if seeds else "0"
    figure.suptitle(f"{table['data']}: mean and standard error over {over} seeds", fontsize=10)
    return figure


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or find that it holds this experiment."""
    path = out / "experiment.json"
    if path.exists():
        was = json.loads(path.read_text("utf-8"))
        for name, value in settings.items():
            if was.get(name) != value:
                raise ValueError(
                    f"{out} was begun with {name}={was.get(name)}, not {value}: its records could "
                    "not be compared with those to come; leave it as it was, or give another --out"
                )
    elif out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise FileExistsError(f"{out} already holds other files: give another --out")
    (out / "records").mkdir(parents=True, exist_ok=True)
    write_atomically(path, _json(settings))


def _recipes(data: str, models: Sequence[str] | None) -> dict[str, str]:
    """The recipe of each model, by what it is called."""
    of_data = re.compile(rf"(.+)-{re.escape(data)}(-\d+)?")
    fit = {
        match[1]: name
        for name, function in recipes().items()
        if (match := of_data.fullmatch(name)) and _is_semi_supervised(function)
    }
    if models is None:
        return fit
    found: dict[str, str] = {}
    for model in models:
        file, colon, function = model.rpartition(":")
        recipe = fit.get(model, model)
        if recipe not in recipes() and not colon:
            raise ValueError(
                f"there is no semi-supervised model {model!r} of {data}, only "
                f"{', '.join(fit) or 'none'}: give one, a recipe, or path/to/file.py:function"
            )
        if not _is_semi_supervised(find_recipe(recipe)):
            raise ValueError(f"recipe {recipe!r} has no arguments labels and label_seed")
        name = function if colon else model
        if name in found:
            raise ValueError(f"two models are called {name!r}: rename one")
        # Of a file, as it is found from any folder later on.
        found[name] = f"{Path(file).absolute()}:{function}" if colon else recipe
    return found


def _is_semi_supervised(recipe: Callable[..., Any]) -> bool:
    return {"labels", "label_seed"} <= inspect.signature(recipe).parameters.keys()


def _run(
    case: Case, folder: Path, *, epochs: int | None, samples: int, device: str, progress: bool
) -> dict[str, Any]:
    """The record of a run, which is begun or gone on with."""
    record: dict[str, Any] = case._asdict() | {
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "device": device,
        **environment(),
    }
    del record["chosen"]
    try:
        if case.estimator == SUPERVISED:
            record |= _baseline(case, device)
        else:
            fitted = _fit(case, folder, epochs=epochs, device=device, progress=progress)
            record |= _figures(fitted, samples)
    except FloatingPointError as error:
        record["failed"] = str(error)
    return record | {"date": datetime.now(UTC).isoformat(timespec="seconds")}


def _fit(case: Case, folder: Path, **options: Any) -> Fitted:
    if (folder / "run.json").exists():
        return resume(folder, **options)
    return run_recipe(case.recipe, case.arguments(), out=folder, seed=case.seed, **options)


def _figures(fitted: Fitted, samples: int) -> dict[str, Any]:
    found = evaluate(fitted.model, fitted.guide, fitted.data, samples=samples)
    assert fitted.run is not None
    run = Run.open(fitted.run.folder)
    seconds, steps = run.record["seconds"], run.steps()[0]
    if found.labels is None:
        raise ValueError(
            f"{run.folder}: no labels are withheld from the training rows, or the test rows have "
            "none: a recipe's data come from Dataset.labeled(labels, label_seed)"
        )
    return {
        "parameters": run.record["parameters"],
        "epochs_done": run.record["epochs_done"],
        "steps": steps,
        "compile_seconds": run.record["compile_seconds"],
        "evaluation": found.to_json(),
        "figures": {
            **averaged(found),
            "seconds": seconds,
            "ms_a_step": 1000 * seconds / steps,
        },
    }


def _baseline(case: Case, device: str) -> dict[str, Any]:
    made = build(case.recipe, case.arguments(), case.seed)
    found = fit_supervised(made, seed=case.seed, device=device)
    return {
        "parameters": sum(p.numel() for p in found.net.parameters()),
        "steps": found.steps,
        "best_step": found.best_step,
        "figures": {
            "labels": {"classifier": averaged_labels(found.scores)},
            "seconds": found.seconds,
            "ms_a_step": 1000 * found.seconds / found.steps,
        },
    }


def _numbers(figures: Any) -> Any:
    """Figures, with nan for one that was not finite."""
    if isinstance(figures, dict):
        return {name: _numbers(value) for name, value in figures.items()}
    return math.nan if figures is None else float(figures)


def _spread(row: dict[str, Any], *names: str) -> tuple[float, float]:
    """Mean and standard error over seeds of a figure; nan where there is none."""
    pair: list[float] = []
    for figures in (row["mean"], row["standard_error"]):
        for name in names:
            figures = figures.get(name) if isinstance(figures, dict) else None
        pair.append(math.nan if figures is None else figures)
    return pair[0], pair[1]


def _error(row: dict[str, Any], source: str) -> tuple[float, float]:
    """Test error in percent, and its standard error over seeds."""
    mean, error = _spread(row, "labels", source, "accuracy")
    return 100 * (1 - mean), 100 * error


def _shown(pair: tuple[float, float], digits: int) -> str:
    mean, error = pair
    if math.isnan(mean):
        return "–"
    shown = f"{mean:.{digits}f}"
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def _machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    where = ", ".join(hardware["cuda"]) if record["device"] == "cuda" else hardware["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"On {where}, {record['threads']} threads of {hardware['cpus']}; {packages}."


def _json(value: Any) -> bytes:
    return (json.dumps(finite_or_none(value), indent=2, ensure_ascii=False) + "\n").encode()
