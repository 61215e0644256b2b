"""What many seeds at once cost: ``python -m benchmarks.seeds``.

Milliseconds a step of one model, of eight as one program, and of eight one after the other.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from benchmarks import record
from benchmarks.programs import pair
from benchmarks.sizes import SIZES, Size
from benchmarks.timing import interleaved
from ppl_vae.recorded import RecordedStep
from ppl_vae.signature import Signature
from ppl_vae.svi import SVI, parameters
from ppl_vae.vectorized import vectorize

SEEDS = 8


def svi(size: Size, seed: int, device: str, x: Tensor) -> SVI:
    """A compiled SVI of a size, after the first steps."""
    torch.manual_seed(seed)
    programs = pair(size, size.build())
    model, guide = programs.model.to(device), programs.guide.to(device)
    optimizer = torch.optim.Adam(parameters(model, guide), 1e-3, fused=True)
    made = SVI(model, guide, optimizer, Trace_ELBO(), compile=True)
    for _ in range(3):
        made.step(x=x)
    return made


def measure(size: Size, device: str, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Times by name, in JSON types."""
    x = size.data(1, record.SEED)[0].to(device)
    alone = svi(size, record.SEED, device, x)
    replicas = [svi(size, seed, device, x) for seed in range(SEEDS)]
    signature = Signature((), {"x": x})
    graphs = [RecordedStep(one, signature, varying=False).graph() for one in replicas]
    batches = torch.stack([x] * SEEDS)
    program = vectorize(graphs, batches)
    separate = [svi(size, seed, device, x) for seed in range(SEEDS)]

    def one(times: int) -> None:
        for _ in range(times):
            alone.update(x=x)

    def together(times: int) -> None:
        for _ in range(times):
            program(batches)

    def in_turn(times: int) -> None:
        for _ in range(times):
            for replica in separate:
                replica.update(x=x)

    runs = {"one": one, "together": together, "in turn": in_turn}
    timings, _ = interleaved(runs, rounds=rounds, seconds=seconds)
    return {name: timing.to_json() for name, timing in timings.items()}


def show(result: dict[str, Any]) -> str:
    """Times, and their ratios to those of one model."""
    rows = [
        (
            size,
            name,
            f"{found['median_ms']:.3f}",
            f"{found['median_ms'] / of['one']['median_ms']:.2f}",
        )
        for size, of in result["sizes"].items()
        for name, found in of.items()
    ]
    table = record.table(("size", f"{SEEDS} models", "ms a step", "x one"), rows)
    target = "Target: together at most 5 times one on a CPU, 2 times on a GPU, at tiny."
    return "\n\n".join([record.heading(result), table, target])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--sizes", type=record.some_of(["tiny", "paper"]), default=["tiny", "paper"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    result = record.record("seeds", options.device, seeds=SEEDS, sizes={})
    for name in options.sizes:
        result["sizes"][name] = measure(
            SIZES[name], options.device, rounds=options.rounds, seconds=0.5
        )
    record.output(result, show, options)


if __name__ == "__main__":
    main()
