"""What a measurement depends on, and where results are kept."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ppl_vae.markdown import table as table
from ppl_vae.run import environment

RESULTS = Path(__file__).parent / "results"
OTHERS = ("numpyro", "jax", "jaxlib", "pythae")
SEED = 0


def record(what: str, device: str, **fields: Any) -> dict[str, Any]:
    """A result with date, versions, hardware, threads and seed; ``load`` tells who else ran."""
    found = environment()
    for package in OTHERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][package] = importlib.metadata.version(package)
    return {
        "what": what,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **found,
        "threads": {"torch": torch.get_num_threads(), "jax": os.cpu_count()},
        "load": os.getloadavg()[0],
        "seed": SEED,
        **fields,
    }


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What parses an option that takes names, parted by commas."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that `output` reads."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="keep it under benchmarks/results/")


def output(
    result: dict[str, Any], show: Callable[[dict[str, Any]], str], options: argparse.Namespace
) -> None:
    """Print a result, and write it to ``results/<device>-<what>.json`` if that is asked for."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text if options.json else show(result))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{result['device']}-{result['what']}.json"
        path.write_text(text + "\n", encoding="utf-8")
        print(f"written to {path}", file=sys.stderr)


def heading(result: dict[str, Any]) -> str:
    """One line on where and with what a result was measured."""
    hardware, versions = result["hardware"], result["versions"]
    where = ", ".join(hardware["cuda"]) if result["device"] == "cuda" else hardware["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{result['what']} on {where}, {result['threads']['torch']} threads, "
        f"load {result['load']:.1f} before; {packages}"
    )
