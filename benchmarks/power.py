"""What the checks find and what they miss: planted faults, each many times, and false alarms.

    python -m benchmarks.power [--json] [--save] [--only "mode dropped,PPCA"] [--replications 100]

Every replication draws a model, its data and its noise anew and runs the whole report
(:func:`ppl_vae.check`) at level 0.05, which its checks share. A check's rate is the share of
replications in which it failed the pair; that of the report, in which any did.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.faults import FAULTS, SOUND
from benchmarks.record import add_output_options, heading, output, record, some_of, table
from ppl_vae.checks import CHECKS, check

LEVEL = 0.05
SIZES: dict[str, dict[str, Any]] = {
    "evidence": {
        "rows": 100,
        "samples": 500,
        "annealed_rows": 20,
        "simulated_rows": 0,
        "temperatures": 30,
        "chains": 2,
        "leapfrog": 5,
        "compile": False,
    },
    "population_predictive": {"replicates": 240},
    "posterior_predictive": {"replicates": 240},
    "row_order": {"permutations": 499},
    "to_arviz": {"rows": 2, "draws": 2},
}
"""Arguments of the checks that are not left as they are, to save time."""

SKIPPED = ("gaps",)
"""Checks that only measure."""


def replicate(name: str, seed: int) -> dict[str, str]:
    """One report's verdicts by check, with the reason where one does not apply."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    model, guide, data = {**SOUND, **FAULTS}[name].make()
    only = [one for one in CHECKS if one not in SKIPPED]
    report = check(model, guide, data, seed=seed, level=LEVEL, only=only, **SIZES)
    return {result.name: result.verdict for result in report.results} | dict(report.skipped)


def rates(verdicts: Sequence[dict[str, str]]) -> dict[str, float]:
    """The share of the reports in which each check failed the pair, and in which any did."""
    names = {name for one in verdicts for name in one}
    failed = {
        name: sum(one.get(name) == "fail" for one in verdicts) / len(verdicts)
        for name in CHECKS
        if name in names and any(one.get(name) in ("pass", "fail", "measured") for one in verdicts)
    }
    return {"report": sum("fail" in one.values() for one in verdicts) / len(verdicts), **failed}


def measure(names: Sequence[str], replications: int, workers: int) -> dict[str, dict[str, float]]:
    """The rates of each scenario, by its name."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(workers, context) as pool:
        for number, name in enumerate(names):
            start = time.perf_counter()
            seeds = range(10_000 * number, 10_000 * number + replications)
            verdicts = list(pool.map(replicate, [name] * replications, seeds, chunksize=5))
            found[name] = rates(verdicts)
            seconds = time.perf_counter() - start
            print(f"{name}: {found[name]} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def show(result: dict[str, Any]) -> str:
    """Two tables: what is found of each fault, and how often nothing is wrong and a check fails."""
    each, count = result["rates"], result["replications"]
    lines = [heading(result), ""]
    for title, scenarios, least in (("Fault", FAULTS, 0.05), ("No fault", SOUND, 1e-9)):
        rows = [
            (name, scenarios[name].about, _percent(own["report"]), _checks(own, least))
            for name, own in each.items()
            if name in scenarios
        ]
        if rows:
            which = "checks that fail the pair" + (", from 5 %" if least > 0.01 else "")
            header = (title, "", "report fails", which)
            lines += [table(header, rows), ""]
    sound = [own["report"] for name, own in each.items() if name in SOUND]
    if sound:
        rate, total = sum(sound) / len(sound), count * len(sound)
        error = math.sqrt(rate * (1 - rate) / total)
        lines.append(
            f"False alarms of the whole report: {rate:.1%} +- {error:.1%} of {total} reports, at "
            f"level {result['level']:.0%}; {count} replications a line."
        )
    return "\n".join(lines)


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _checks(rates: dict[str, float], least: float) -> str:
    failing = {name: rate for name, rate in rates.items() if name != "report" and rate >= least}
    ordered = sorted(failing.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {_percent(rate)}" for name, rate in ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=some_of([*FAULTS, *SOUND]), default=[*FAULTS, *SOUND])
    parser.add_argument("--replications", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    add_output_options(parser)
    options = parser.parse_args()
    result = record(
        "power",
        "cpu",
        level=LEVEL,
        replications=options.replications,
        sizes=SIZES,
        rates=measure(options.only, options.replications, options.workers),
    )
    output(result, show, options)


if __name__ == "__main__":
    main()
