"""Milliseconds a training step: ``python -m benchmarks.step``.

Contenders of a size are first checked to compute the same loss, then timed in turn. "First s" are
the seconds until three steps are done, all compiling included, with empty compiler caches. "Loss"
is that check's, in nats a row; "loss after" is the one when all have taken as many steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from typing import Any

import torch

from benchmarks import agreement, record
from benchmarks.contender import CONTENDERS, Absent, Contender, Task, make
from benchmarks.sizes import SIZES
from benchmarks.targets import TARGETS
from benchmarks.timing import interleaved, once


def measure(task: Task, names: list[str], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Check and time contenders on a task: their figures, by name, in JSON types."""
    figures: dict[str, Any] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        torch.manual_seed(record.SEED)
        try:
            first = once(lambda name=name: _first_calls(name, task, contenders))
            figures[name] = {"first_s": first}
        except Absent as reason:
            figures[name] = {"absent": str(reason)}
    means = agreement.check(task, contenders)
    runs = {name: contender.run for name, contender in contenders.items()}
    timings, steps = interleaved(runs, rounds=rounds, seconds=seconds)
    for name, contender in contenders.items():
        figures[name] |= timings[name].to_json()
        figures[name] |= {
            "loss": means[name].mean,
            "loss_se": means[name].error,
            "steps": steps,
            "loss_after": statistics.mean(contender.run(1) for _ in range(20)),
        }
    return figures


def _first_calls(name: str, task: Task, contenders: dict[str, Contender]) -> None:
    contenders[name] = make(name, task)
    contenders[name].run(3)  # a step may be compiled only when it has been seen before


def show(result: dict[str, Any]) -> str:
    """A result for people: times, what was absent, and ratios against the targets."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for size, figures in result["sizes"].items():
        ours = figures.get("ours", {}).get("median_ms")
        for name, found in figures.items():
            if "absent" in found:
                notes.append(f"{size}: no {name}: {found['absent']}")
                continue
            ratio = f"{found['median_ms'] / ours:.2f}" if ours else ""
            times = (f"{found[key]:.3f}" for key in ("median_ms", "min_ms", "max_ms"))
            rest = (f"{found['first_s']:.1f}", f"{found['loss']:.2f}", f"{found['loss_after']:.1f}")
            rows.append((size, name, *times, ratio, *rest))
    header = ("size", "contender", "ms", "min", "max", "x ours", "first s", "loss", "loss after")
    parts = [record.heading(result), record.table(header, rows), *notes]
    medians = {
        size: {name: f["median_ms"] for name, f in figures.items() if "median_ms" in f}
        for size, figures in result["sizes"].items()
    }
    wanted = [
        target.row(medians[target.size])
        for target in TARGETS
        if target.device == result["device"] and target.size in medians
    ]
    if wanted:
        parts.append(record.table(("size", "ratio", "target", "measured", "met"), wanted))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=record.some_of(SIZES), default=list(SIZES))
    parser.add_argument("--contenders", type=record.some_of(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="the slowest one's block")
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    # Of torch.jit only: that a contender falls back to eager must be seen.
    for category in (FutureWarning, torch.jit.TracerWarning):
        warnings.simplefilter("ignore", category)
    result = record.record("step", options.device, sizes={})
    with tempfile.TemporaryDirectory() as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        torch.compile(torch.sin)(torch.ones(2))  # what compiling takes once in a process
        for size in options.sizes:
            print(f"{size} …", file=sys.stderr, flush=True)
            task = Task.make(SIZES[size], options.device, seed=record.SEED)
            result["sizes"][size] = measure(
                task,
                options.contenders,
                rounds=options.rounds,
                seconds=options.seconds,
            )
    record.output(result, show, options)


if __name__ == "__main__":
    main()
