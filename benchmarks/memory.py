"""Peak memory of training by batch size: ``python -m benchmarks.memory``.

Each configuration runs in a process of its own. On the CPU the peak is of the resident set, as
Linux knows it; on CUDA of what PyTorch allocated there. The first steps, in which code is compiled,
are told from the later ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.contender import CONTENDERS, Task, make
from benchmarks.sizes import SIZES

STEPS = 20

MIB = 2**20


def measure(contender: str, size: str, batch: int, device: str) -> dict[str, float]:
    """Peaks of this process in MiB: without a contender, in its first steps, in later ones."""
    task = Task.make(replace(SIZES[size], batch=batch), device, seed=record.SEED)
    peaks = {"before": _peak(device)}
    _reset(device)
    run = make(contender, task).run
    run(3)
    peaks["first steps"] = _peak(device)
    _reset(device)
    run(STEPS)
    peaks["later steps"] = _peak(device)
    return peaks


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: the peak is known on Linux only")
    return int(found[1]) / 1024


def _reset(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident: proc(5)


def _in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--one", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(result: dict[str, Any]) -> str:
    """A row for each configuration."""
    peaks = ("before", "first steps", "later steps")
    rows = [
        (found["contender"], str(found["batch"]), *(f"{found[peak]:.0f}" for peak in peaks))
        for found in result["peaks_mib"]
    ]
    header = ("contender", "batch", *(f"{peak}, MiB" for peak in peaks))
    parts = (record.heading(result), f"size {result['size']}", record.table(header, rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="paper", choices=SIZES)
    parser.add_argument("--batches", default="16,128,1024,8192", help="rows a step")
    parser.add_argument(
        "--contenders", type=record.some_of(CONTENDERS), default=["ours", "ours eager", "pyro"]
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.one:
        contender, size, batch, device = options.one
        print(json.dumps(measure(contender, size, int(batch), device)))
        return
    result = record.record("memory", options.device, size=options.size, peaks_mib=[])
    for batch in options.batches.split(","):
        for contender in options.contenders:
            peaks = _in_a_process(contender, options.size, batch, options.device)
            found = {"contender": contender, "batch": int(batch), **peaks}
            result["peaks_mib"].append(found)
    record.output(result, show, options)


if __name__ == "__main__":
    main()
