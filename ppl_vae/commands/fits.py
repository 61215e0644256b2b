"""The command that makes a run, or goes on with one."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ppl_vae.commands.options import Device


def fit_command(
    recipe: str | None = None,
    resume: Path | None = None,
    out: Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    device: Device | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    precision: Literal["32-true", "64-true", "bf16-mixed"] | None = None,
    matmul_precision: Literal["highest", "high", "medium"] | None = None,
    compile: Literal["auto", "yes", "no"] | None = None,
    batch_size: int | None = None,
    labeled_batch: int | None = None,
    accumulate: int | None = None,
    optimizer: Literal["adam", "adamw", "adamax"] | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    schedule: Literal["cosine", "plateau"] | None = None,
    max_grad_norm: float | None = None,
    warmup: float | None = None,
    patience: int | None = None,
    average: int | None = None,
    checkpoint_seconds: float | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
    **arguments: Any,
) -> None:
    """Fit a recipe, or go on with a run.

    An option that is left out is as the recipe says. ``ppl-vae fit RECIPE --help`` shows the
    recipe's own arguments too.

    Args:
        recipe: name, or path/to/file.py:function.
        resume: folder of a run to go on with, to the same bits as if it had never stopped.
        out: folder of the run; new, or empty. Default: runs/RECIPE-DATE-TIME.
        epochs: passes over the training rows.
        seed: of weights, noise and order of the rows. Default: 0.
        seeds: train so many replicas at once, from that seed upwards, each in a folder of its own
            in the run's.
        device: where to compute. Default: auto.
        devices: on each machine, with a process each. Default: 1, or as torchrun says.
        num_nodes: machines. Default: 1, or as torchrun says.
        precision: of the arithmetic.
        matmul_precision: of float32 matrix products; high is TF32 on CUDA.
        compile: the step; auto does so where the run is long enough to gain. Default: auto.
        batch_size: rows a step.
        labeled_batch: rows a step with labels, where others have none.
        accumulate: parts in which a batch is run, to save memory.
        optimizer: its name.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        schedule: of the learning rate.
        max_grad_norm: longer gradients are shortened to it.
        warmup: epochs over which the KL's weight rises from 0 to 1.
        patience: epochs without a better validation ELBO before stopping.
        average: validate by, and end with, the means of the weights over so many last epochs.
        checkpoint_seconds: least time between checkpoints.
        tensorboard: write metrics for TensorBoard too.
        quiet: show no progress.
    """
    from ppl_vae import recipes
    from ppl_vae.gallery import save_gallery

    options: dict[str, Any] = {
        "epochs": epochs,
        "device": device,
        "devices": devices,
        "num_nodes": num_nodes,
        "precision": precision,
        "matmul_precision": matmul_precision,
        "compile": {"yes": True, "no": False}.get(compile or "", compile),
        "accumulate": accumulate,
        "batch_size": batch_size,
        "labeled_batch": labeled_batch,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "max_grad_norm": max_grad_norm,
        "warmup": warmup,
        "patience": patience,
        "average": average,
        "checkpoint_seconds": checkpoint_seconds,
        "tensorboard": tensorboard or None,
        "progress": not quiet,
    }
    if resume is not None:
        if recipe is not None or out is not None or seeds is not None:
            raise ValueError(
                "--resume DIR goes on with the run, or the replicas, in DIR: give no RECIPE, no "
                "--out and no --seeds"
            )
        fitted = recipes.resume(resume, seed=seed, **options)
    elif recipe is not None:
        if out is None:
            name = recipe.rpartition(":")[2]
            out = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
            if os.environ.get("LOCAL_RANK", "0") == "0":  # of several workers, the first has it
                print(f"run: {out}", file=sys.stderr)
        fitted = recipes.run_recipe(
            recipe, arguments, out=out, seed=seed or 0, seeds=seeds, **options
        )
    else:
        raise ValueError("give a RECIPE (ppl-vae list names them), or --resume DIR")
    if fitted.run is None:
        return  # the first worker has it
    for one in fitted.replicas or [fitted]:
        assert one.run is not None
        for name, reason in save_gallery(one, one.run.folder / "figures").items():
            print(f"no picture {name}: {reason}", file=sys.stderr)
    print(out or resume)
