"""A training killed at random moments, in the middle of a checkpoint too, loses no bit."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch

from ppl_vae import recipes
from ppl_vae.run import Run

KILLS = 20
# A checkpoint at every step.
OPTIONS: dict[str, Any] = {"epochs": 6, "progress": False, "checkpoint_seconds": 0.0}
SMALL = {"latents": 2, "hidden": 8}


def test_twenty_kills_and_the_bits_of_an_undisturbed_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ppl_vae.recipes", "ppl_vae.recipes.vae", "sklearn.datasets"])
    began = time.monotonic()
    recipes.run_recipe("vae-digits", SMALL, out=tmp_path / "whole", **OPTIONS)
    took = time.monotonic() - began

    moments = random.Random(0)
    folders = (tmp_path / f"killed-{i}" for i in itertools.count())
    folder = next(folders)
    kills = mid_write = 0
    while True:
        begun = (folder / "run.json").exists()
        if begun and Run.open(folder).record["status"] == "finished":
            compare(folder, tmp_path / "whole")
            if kills >= KILLS:
                break
            folder, begun = next(folders), False
        if begun:
            quick = {k: v for k, v in OPTIONS.items() if k != "epochs"}
            work = context.Process(target=recipes.resume, args=(folder,), kwargs=quick)
        else:
            arguments = {"out": folder, **OPTIONS}
            work = context.Process(
                target=recipes.run_recipe, args=("vae-digits", SMALL), kwargs=arguments
            )
        work.start()
        if kills < KILLS:
            work.join(moments.uniform(0.0, 0.6 * took))
            while kills % 2 and work.is_alive() and not writing(folder):
                pass  # every other kill falls into the writing of a checkpoint
            kills += work.is_alive()
            work.kill()
        work.join()
        assert work.exitcode in (0, -9)
        mid_write += writing(folder)
    assert mid_write > 3, "that many kills fell into the writing of a checkpoint"


def writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".*.tmp"))


def compare(folder: Path, whole: Path) -> None:
    ours, theirs = Run.open(folder), Run.open(whole)
    one, other = ours.latest(), theirs.latest()
    assert one is not None
    assert other is not None
    assert one.step == other.step
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    for row, expected in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}
