"""Estimators of discrete latents' gradients: variance at one point, time, and what they lead to.

    python -m benchmarks.estimators static_mnist [--epochs 8] [--only score-both,relaxed] [--save]
    python -m benchmarks.estimators digits --epochs 200

One sigmoid belief network, learned by each estimator from the same start for as many epochs. With
``--save`` a result is kept after each estimator, and a run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, SEED, heading, record, some_of, table
from ppl_vae.atomic import write_atomically
from ppl_vae.data import Rows
from ppl_vae.evaluation import evaluate
from ppl_vae.fitting import fit
from ppl_vae.objectives import plain_elbo
from ppl_vae.recipes import Experiment, build
from ppl_vae.svi import SVI, parameters
from ppl_vae.training import Training

RECIPES = {"static_mnist": "sbn-static-mnist", "digits": "sbn-digits"}

ESTIMATORS: dict[str, dict[str, Any]] = {
    "score-both": {"estimator": "score", "baseline": "both"},
    "relaxed": {"estimator": "relaxed"},
    "leave-one-out": {"estimator": "leave-one-out"},
    "vimco": {"estimator": "vimco"},
    "reweighted-wake-sleep": {"estimator": "reweighted-wake-sleep"},
    "straight-through": {"estimator": "straight-through"},
    "score-net": {"estimator": "score", "baseline": "net"},
    "score-average": {"estimator": "score", "baseline": "average"},
    "score-none": {"estimator": "score", "baseline": "none"},
}

BATCH = 100

APPROACH = 500
"""Steps by leave-one-out to the point at which variances are compared."""

LEARNING = 300
"""Steps that baselines learn there, all else being fixed."""

REPEATS = 200
"""Gradients of one batch, of which the variance is taken."""

TIMED = 40
"""Steps of which the median time is taken."""

ROWS, SAMPLES = 2000, 200
"""Rows of the test set, and importance draws of each, for the NLL."""


class Step:
    """Steps of an experiment as ``fit`` takes them, eagerly."""

    def __init__(self, made: Experiment, learned: Sequence[Tensor], learning_rate: float) -> None:
        self.rows = made.data.split("train")
        example = self.rows.batch(slice(0, 2))["x"]
        objective = made.fit.get("objective") or plain_elbo(made.model, made.guide, example)
        self.svi = SVI(
            made.model,
            made.guide,
            torch.optim.Adam(learned, learning_rate),
            Training(objective, len(self.rows)),
            compile=False,
        )

    def __call__(self, x: Tensor) -> None:
        self.svi.step(x, total=len(self.rows))

    def gradients(self, x: Tensor) -> None:
        """Put gradients, in nats a row, on the parameters."""
        with self.svi.parameters():
            self.svi.gradients(x, total=len(self.rows))


def batches(rows: Rows) -> Iterator[Tensor]:
    """Batches of the training rows in random order, without end."""
    while True:
        for part in torch.randperm(len(rows)).split(BATCH):
            if len(part) == BATCH:
                yield rows.batch(part)["x"]


def steps(step: Callable[[Tensor], None], rows: Rows, count: int) -> list[float]:
    """Take steps on random batches; the seconds of each."""
    seconds: list[float] = []
    for _, x in zip(range(count), batches(rows), strict=False):
        started = time.perf_counter()
        step(x)
        seconds.append(time.perf_counter() - started)
    return seconds


def point(recipe: str) -> dict[str, Tensor]:
    """The weights at which variances are compared."""
    torch.manual_seed(SEED)
    made = build(recipe, ESTIMATORS["leave-one-out"], SEED)
    step = Step(made, list(parameters(made.model, made.guide)), made.fit["learning_rate"])
    steps(step, step.rows, APPROACH)
    pair = nn.ModuleList([made.model, made.guide])
    return {name: value.detach().clone() for name, value in pair.state_dict().items()}


def variance(recipe: str, arguments: dict[str, Any], at: dict[str, Tensor]) -> dict[str, float]:
    """Variance of the gradient of the guide's parameters, and the square of its mean, nats a row;
    both summed over the parameters."""
    torch.manual_seed(SEED)
    made = build(recipe, arguments, SEED)
    nn.ModuleList([made.model, made.guide]).load_state_dict(at, strict=False)
    named = dict(made.guide.named_parameters())
    baselines = [p for name, p in named.items() if ".baseline." in name]
    step = Step(made, baselines or list(named.values()), 1e-2)
    if any(".baseline." in name for name, _ in made.guide.named_modules()):
        # A running mean learns by the backward pass alone.
        steps(step if baselines else step.gradients, step.rows, LEARNING)
    x = step.rows.batch(slice(0, BATCH))["x"]
    guide = [p for name, p in named.items() if ".baseline." not in name]
    total, squares = [torch.zeros_like(p) for p in guide], [torch.zeros_like(p) for p in guide]
    for _ in range(REPEATS):
        for parameter in (*guide, *made.model.parameters()):
            parameter.grad = None
        step.gradients(x)
        for parameter, one, square in zip(guide, total, squares, strict=True):
            assert parameter.grad is not None
            one += parameter.grad
            square += parameter.grad**2
    means = [one / REPEATS for one in total]
    spread = [
        (square / REPEATS - mean**2).sum() * REPEATS / (REPEATS - 1)
        for square, mean in zip(squares, means, strict=True)
    ]
    noise = float(torch.stack(spread).sum())
    # The mean's own variance is part of its square.
    signal = float(sum((mean**2).sum() for mean in means)) - noise / REPEATS
    return {"variance": noise, "squared_mean": signal}


def milliseconds(recipe: str, arguments: dict[str, Any]) -> float:
    """The median time of an eager step."""
    made = build(recipe, arguments, SEED)
    step = Step(made, list(parameters(made.model, made.guide)), made.fit["learning_rate"])
    return 1e3 * statistics.median(steps(step, step.rows, TIMED)[5:])


def measure(
    recipe: str, arguments: dict[str, Any], epochs: int, at: dict[str, Tensor]
) -> dict[str, Any]:
    """All figures of one estimator."""
    found: dict[str, Any] = variance(recipe, arguments, at)
    found["ms_a_step"] = milliseconds(recipe, arguments)
    made = build(recipe, arguments, SEED)
    options = made.fit | {"epochs": epochs, "batch_size": BATCH, "patience": None}
    started = time.perf_counter()
    fitted = fit(made.model, made.guide, made.data, seed=SEED, progress=False, **options)
    found["fit_seconds"] = time.perf_counter() - started
    found["validation_elbo"] = [row.get("validation_elbo") for row in fitted.history]
    test = made.data.split("test")
    # Spread over the set, since the first rows of MNIST's are easier than the others.
    some = test.batch(torch.arange(0, len(test), max(1, len(test) // ROWS)))["x"]
    train = made.data.split("train").batch(slice(0, 2))["x"]
    figures = evaluate(
        fitted.model,
        fitted.guide,
        {"train": train, "test": some},
        samples=SAMPLES,
        seed=SEED,
        compile=False,
    )
    return found | {
        "arguments": arguments,
        "nll": figures.nll,
        "nll_se": figures.nll_se,
        "elbo": figures.elbo,
        "rows": figures.rows,
    }


def run(
    data: str, names: list[str], epochs: int, *, save: bool, again: bool = False
) -> dict[str, Any]:
    """The estimators of these names, those that are on the disk already as they are.

    Args:
        again: time all steps anew, one estimator after the other; a fit takes long enough for the
            machine's load to change in between.
    """
    what = f"estimators-{data}"
    settings = {
        "epochs": epochs,
        "batch": BATCH,
        "rows": ROWS,
        "samples": SAMPLES,
        "approach": APPROACH,
        "repeats": REPEATS,
    }
    path = RESULTS / f"cpu-{what}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if save and path.is_file() else {}
    done = kept.get("estimators", {}) if kept.get("settings") == settings else {}
    result = record(what, "cpu", settings=settings, estimators=done)
    missing = [name for name in names if name not in done]
    at = point(RECIPES[data]) if missing else {}
    for name in missing:
        done[name] = measure(RECIPES[data], ESTIMATORS[name], epochs, at)
        print(f"{name}: {done[name]}", flush=True)
        if save:
            RESULTS.mkdir(exist_ok=True)
            text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
            write_atomically(path, text.encode())
    if again:
        for one in done.values():
            one["ms_a_step"] = milliseconds(RECIPES[data], one["arguments"])
        result["timed"] = {"date": result["date"], "load": result["load"]}
        if save:
            text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
            write_atomically(path, text.encode())
    return result


def show(result: dict[str, Any]) -> str:
    """A table of the estimators, the best NLL first."""
    found = sorted(result["estimators"].items(), key=lambda item: item[1]["nll"])
    rows = [
        (
            name,
            f"{one['variance']:.3g}",
            f"{one['squared_mean']:.3g}",
            f"{one['ms_a_step']:.1f}",
            f"{-one['elbo']:.2f}",
            f"{one['nll']:.2f}",
            f"+{one['nll'] - found[0][1]['nll']:.2f}",
        )
        for name, one in found
    ]
    header = (
        "estimator",
        "variance of the gradient",
        "its mean squared",
        "ms a step",
        "test -ELBO",
        "test NLL",
        "to the best",
    )
    said = f"{result['settings']['epochs']} epochs, batches of {BATCH}; nats a row"
    return f"{heading(result)}\n\n{said}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", choices=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", type=some_of(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--save", action="store_true", help="keep it under benchmarks/results/")
    parser.add_argument("--again", action="store_true", help="time all steps anew, side by side")
    options = parser.parse_args()
    pyro.enable_validation(False)
    settings = {"save": options.save, "again": options.again}
    print(show(run(options.data, options.only, options.epochs, **settings)))


if __name__ == "__main__":
    main()
