"""What each family gains over the plain VAE: seeds of each recipe, fitted alike, side by side.

    python -m benchmarks.families nll [--only vamp,flow] [--seeds 3] [--save]
    python -m benchmarks.families mig --seeds 5

The figure is the NLL of the embedded digits' test set, by importance sampling, or the mutual
information gap of the posterior means of rendered sprites. A difference is stated with its standard
error over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.record import SEED, add_output_options, heading, output, record, some_of, table
from ppl_vae.disentanglement import disentanglement_of
from ppl_vae.fitting import Fitted, fit
from ppl_vae.importance import Compile
from ppl_vae.recipes import build
from ppl_vae.recipes._parts import COMPARED
from ppl_vae.replicas import evaluate_replicas


class Family(NamedTuple):
    """A recipe with its arguments, what it is compared with, and its figure: "nll" or "mig"."""

    recipe: str
    arguments: dict[str, Any] = {}  # noqa: RUF012
    against: str | None = None
    figure: str = "nll"


FAMILIES = {
    "vae": Family("vae-digits"),
    "mixture": Family("mixture-prior-digits", against="vae"),
    "flow prior": Family("flow-prior-digits", against="vae"),
    "vamp": Family("vamp-digits", against="vae"),
    "flow": Family("flow-digits", against="vae"),
    "vae-5": Family("vae-digits", {"latents": 5}),
    "flow-5": Family("flow-digits", {"latents": 5}, against="vae-5"),
    "two levels": Family("hvae-digits", against="vae"),
    "ladder": Family("ladder-digits", against="vae"),
    "iwae": Family("iwae-digits", against="vae"),
    "dreg": Family("iwae-digits", {"dreg": True}, against="vae"),
    "sprites": Family("vae-sprites", figure="mig"),
    "beta-tc": Family("beta-tc-sprites", against="sprites", figure="mig"),
}

SAMPLES = 1000
"""Importance draws a row, for the NLL."""


def measure(family: Family, seeds: int, compile: Compile = "auto") -> dict[str, Any]:
    """The figures of each seed, and the seconds that fitting all of them took."""
    made = [build(family.recipe, family.arguments, SEED + n) for n in range(seeds)]
    options = {"compile": compile, "progress": False, **made[0].fit}
    started = time.perf_counter()
    if family.figure == "nll":
        models, guides = [e.model for e in made], [e.guide for e in made]
        options |= COMPARED | {"seed": SEED, "seeds": seeds}
        replicas = fit(models, guides, made[0].data, **options).replicas
    else:  # convolutions over a stack of weights are slow on a CPU
        replicas = [
            fit(e.model, e.guide, e.data, seed=SEED + n, **options) for n, e in enumerate(made)
        ]
    seconds = time.perf_counter() - started
    return {
        "recipe": family.recipe,
        "arguments": family.arguments,
        "against": family.against,
        "figure": family.figure,
        "epochs": [len(one.history) for one in replicas],
        "fit_seconds": seconds,
        **FIGURES[family.figure](replicas),
    }


def nll(replicas: Sequence[Fitted]) -> dict[str, Any]:
    """NLL, ELBO and KL on the test set, nats a row."""
    spread = evaluate_replicas(replicas, samples=SAMPLES)
    return {
        "each": [one.nll for one in spread.each],
        "elbo": [one.elbo for one in spread.each],
        "kl": [one.kl for one in spread.each],
    }


def mig(replicas: Sequence[Fitted]) -> dict[str, Any]:
    """MIG and FactorVAE score on the training rows, where classes have most rows; the ELBO."""
    found = [disentanglement_of(one.model, one.guide, one.data, split="train") for one in replicas]
    return {
        "each": [one["mig"] for one in found],
        "scores": found,
        "elbo": [one.history[-1]["elbo"] for one in replicas],
        "kl": [one.history[-1]["kl"] for one in replicas],
    }


FIGURES = {"nll": nll, "mig": mig}


def compared(result: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By how much a result is better than another, and the standard error of that over seeds."""
    sign = -1 if result["figure"] == "nll" else 1
    gain = sign * (statistics.fmean(result["each"]) - statistics.fmean(other["each"]))
    return {"gain": gain, "standard_error": math.hypot(_error(result), _error(other))}


def run(figure: str, names: Sequence[str], seeds: int) -> dict[str, Any]:
    """The families of these names that have this figure, and what they are compared with."""
    names = [name for name in names if FAMILIES[name].figure == figure]
    wanted = dict.fromkeys(
        name for given in names for name in (FAMILIES[given].against, given) if name is not None
    )
    results = {name: measure(FAMILIES[name], seeds) for name in wanted}
    for result in results.values():
        if result["against"] is not None:
            result |= compared(result, results[result["against"]])
    settings = {name: str(value) for name, value in COMPARED.items()}
    return record(
        f"families-{figure}",
        "cpu",
        seeds=seeds,
        samples=SAMPLES,
        settings=settings,
        families=results,
    )


def show(result: dict[str, Any]) -> str:
    """A table of the families."""
    rows = []
    for name, found in result["families"].items():
        gain = f"{found['gain']:.2f} ± {found['standard_error']:.2f}" if found["against"] else "–"
        rows.append(
            (
                name,
                f"{found['figure']} {statistics.fmean(found['each']):.2f} ± {_error(found):.2f}",
                found["against"] or "–",
                gain,
                f"{statistics.fmean(found['elbo']):.2f}",
                f"{statistics.fmean(found['kl']):.1f}",
                f"{found['fit_seconds']:.0f} s",
            )
        )
    header = ("family", "figure", "against", "better by", "ELBO", "KL", "fit, all seeds")
    return f"{heading(result)}\n\n{table(header, rows)}"


def _error(result: dict[str, Any]) -> float:
    each = result["each"]
    return statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--only", type=some_of(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    add_output_options(parser)
    options = parser.parse_args()
    output(run(options.figure, options.only, options.seeds), show, options)


if __name__ == "__main__":
    main()
