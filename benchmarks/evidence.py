"""Speed of importance-sampled NLL, in rows x draws a second: ``python -m benchmarks.evidence``.

``ppl_vae.evaluate`` against pythae's ``get_nll`` and against the bound set by the decoder's matrix
products alone, as large matrices. Both NLLs are first found equal, over many seeds, on a few rows.
pythae takes one row at a time, so it is timed on few rows.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.agreement import Disagreement, Mean, average
from benchmarks.contender import Task
from benchmarks.programs import pair
from benchmarks.sizes import SIZES
from benchmarks.timing import interleaved
from ppl_vae import evaluate

FEW = 8
"""Rows on which NLLs are compared and pythae is timed."""

AT_ONCE = 4096
"""Rows of a matrix in the bound."""

Nll = Callable[[Tensor, int, int], float]
"""NLL in nats per row, of rows ``(rows, pixels)``, a number of draws, a seed."""


def ours(task: Task) -> Nll:
    programs = pair(task.size, task.nets())
    for program in (programs.model, programs.guide):
        program.to(task.device)

    def nll(x: Tensor, draws: int, seed: int) -> float:
        data = {"train": x, "test": x}
        figures = evaluate(
            programs.model, programs.guide, data, samples=draws, seed=seed, compile=True
        )
        return figures.nll

    return nll


def pythae(task: Task, batch: int = 100) -> Nll:
    """pythae's ``get_nll``, ``batch`` draws of a row at once: 100 is its own choice."""
    from benchmarks.pythae_ import vae

    model = vae(task.nets()).to(task.device).eval()

    @torch.no_grad()
    def nll(x: Tensor, draws: int, seed: int) -> float:
        if draws % batch:
            raise ValueError(f"{draws} draws: pythae would make another number, of {batch} each")
        torch.manual_seed(seed)
        return -float(model.get_nll(x, draws, batch))

    return nll


def matrix_products(task: Task, draws: int) -> Callable[[], None]:
    """The decoder's matrix products for so many draws, `AT_ONCE` at a time, and nothing else."""
    generator = torch.Generator(task.device).manual_seed(record.SEED)
    products = [
        (
            torch.randn(AT_ONCE, layer.in_features, generator=generator, device=task.device),
            layer.weight.T.detach(),
            torch.empty(AT_ONCE, layer.out_features, device=task.device),
        )
        for layer in task.nets()["decoder"].modules()
        if isinstance(layer, nn.Linear)
    ]

    def multiply() -> None:
        for _ in range(draws // AT_ONCE):
            for left, right, out in products:
                torch.mm(left, right, out=out)
        if task.device.type == "cuda":
            torch.cuda.synchronize()

    return multiply


def measure(task: Task, *, rows: int, draws: int, rounds: int) -> dict[str, Any]:
    """Check NLLs and time them: figures by contender, in JSON types."""
    x = torch.cat(task.batches)[:rows]
    few = x[:FEW]
    nlls = {"ours": ours(task)}
    if there := importlib.util.find_spec("pythae") is not None:
        nlls["pythae"] = pythae(task)
    figures: dict[str, Any] = _compare(nlls, few)
    if there:
        nlls[f"pythae, {draws} at once"] = pythae(task, draws)
    else:
        figures["pythae"] = {"absent": "pythae is not installed"}
    # So many rows x draws in a call.
    work = dict.fromkeys(nlls, FEW * draws) | {"ours": len(x) * draws}
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(nll, x if name == "ours" else few, draws, record.SEED)
        for name, nll in nlls.items()
    }
    work["matrix products"] = work["ours"] // AT_ONCE * AT_ONCE
    calls["matrix products"] = matrix_products(task, work["matrix products"])
    runs = {name: functools.partial(_repeat, call) for name, call in calls.items()}
    for name, timing in interleaved(runs, rounds=rounds, seconds=0.5, warm_up=1)[0].items():
        figures.setdefault(name, {})
        figures[name]["per_s"] = work[name] / timing.median
        figures[name]["min_per_s"] = work[name] / max(timing.rounds)
        figures[name]["max_per_s"] = work[name] / min(timing.rounds)
    return figures


def _compare(nlls: Mapping[str, Nll], x: Tensor) -> dict[str, dict[str, float]]:
    """Mean NLLs from 100 draws a row, over seeds: an estimate that all are to share.

    Raises:
        Disagreement: they do not.
    """
    means: dict[str, Mean] = {}
    for name, nll in nlls.items():
        seeds = itertools.count()
        means[name] = average(lambda nll=nll, seeds=seeds: nll(x, 100, next(seeds)))
        if not means[name].agrees(means["ours"]):
            raise Disagreement(f"NLL of {name}: {means[name]}; of ours: {means['ours']}")
    return {name: {"nll": found.mean, "nll_se": found.error} for name, found in means.items()}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def show(result: dict[str, Any]) -> str:
    """Rates, and ratios against the targets: 20 times pythae's, half of the bound."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for size, figures in result["sizes"].items():
        ours = figures["ours"]["per_s"]
        for name, found in figures.items():
            if "absent" in found:
                notes.append(f"{size}: no {name}: {found['absent']}")
                continue
            rates = (f"{found[key]:.3g}" for key in ("per_s", "min_per_s", "max_per_s"))
            nll = f"{found['nll']:.3f}" if "nll" in found else ""
            rows.append((size, name, *rates, f"{ours / found['per_s']:.2f}", nll))
    header = ("size", "contender", "rows x draws / s", "min", "max", "ours / it", "nll")
    targets = "Targets: ours / pythae >= 20, ours / matrix products >= 0.5."
    return "\n\n".join([record.heading(result), record.table(header, rows), targets, *notes])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    vaes = [name for name, size in SIZES.items() if size.program == "vae"]
    parser.add_argument("--sizes", type=record.some_of(vaes), default=vaes)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--draws", type=int, default=500, help="a row; a multiple of 100")
    parser.add_argument("--rounds", type=int, default=5)
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    result = record.record(
        "evidence", options.device, rows=options.rows, draws=options.draws, sizes={}
    )
    for name in options.sizes:
        size = SIZES[name]
        batches = -(-options.rows // size.batch)
        task = Task.make(size, options.device, batches=batches, seed=record.SEED)
        result["sizes"][name] = measure(
            task, rows=options.rows, draws=options.draws, rounds=options.rounds
        )
    record.output(result, show, options)


if __name__ == "__main__":
    main()
