"""Commands that make several runs and a table of them, and the models that come of it."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import Literal

from ppl_vae.commands.options import Device, numbers, parted


def experiment_command(
    name: Literal["semi-supervised"],
    data: Literal["digits", "mnist"] = "digits",
    models: str | None = None,
    estimators: str = "enumerate",
    labels: str | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    samples: int = 100,
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run an experiment: recipes side by side, with seeds, a table and a plot; or go on with it.

    Args:
        name: semi-supervised: models of labels, and the same classifier on labeled rows alone.
        data: of the recipes.
        models: parted by commas: m2, or names of recipes, or path/to/file.py:function. Default: all
            semi-supervised recipes of the data.
        estimators: of the label's gradient, parted by commas: enumerate, score, relaxed,
            straight-through.
        labels: how many rows keep theirs, parted by commas. Default: as the recipe says.
        seeds: how many, from 0 upwards; each has labels of its own.
        epochs: passes over the training rows. Default: as the recipe says.
        samples: importance draws a test row.
        out: folder; what is finished in it is not done again. Default: runs/NAME-DATA.
        device: where to compute.
        json: print JSON.
        quiet: do not say which run it is at.
    """
    from ppl_vae.experiments import markdown, semi_supervised

    out = Path("runs") / f"{name}-{data}" if out is None else out
    try:
        table = semi_supervised(
            out,
            data=data,
            models=parted(models),
            estimators=parted(estimators) or [],
            labels=numbers("labels", labels),
            seeds=seeds,
            epochs=epochs,
            samples=samples,
            device=device,
            say=(lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr)),
        )
    except KeyboardInterrupt:
        print("the same command goes on with it", file=sys.stderr)
        raise KeyboardInterrupt from None
    print(json_.dumps(table, indent=2) if json else f"{markdown(table)}\n{out}")


def reproduce_command(
    names: list[str],
    seeds: int = 1,
    budget: float | None = None,
    protocol: Literal["recipe", "paper"] = "recipe",
    device: Device = "auto",
    precision: Literal["32-true", "64-true", "bf16-mixed"] | None = None,
    out: Path = Path("results"),
    table: bool = False,
    quiet: bool = False,
) -> None:
    """Reproduce published figures: fit, score every test row, record; or go on with it.

    What is recorded already is not done again, and what was stopped goes on. README.md in the
    folder, made anew each time, says what was reached, what was not, and what is not there yet.

    Args:
        names: of figures, as README.md has them. Default: all, those of most worth first.
        seeds: how many runs of each, from seed 0 upwards; on CUDA at once.
        budget: minutes after which to stop.
        protocol: how to optimize: as the recipe says, or as the paper did, in up to
            thousands of epochs. Data, split and evaluation are the same either way.
        device: where to compute.
        precision: of fits; scores are computed in float32 (float64 for 64-true). Default: as
            recipe or paper.
        out: folder of runs and records.
        table: only make README.md anew from the records.
        quiet: show no progress.
    """
    from ppl_vae.atomic import write_atomically
    from ppl_vae.reproduction import markdown, read_records, reproduce

    if table and names:
        raise ValueError(f"--table is of all records: leave {' '.join(names)} out")
    if not table:
        reproduce(
            names,
            out=out,
            protocol=protocol,
            seeds=seeds,
            budget=budget,
            device=device,
            precision=precision,
            progress=not quiet,
            say=(lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr)),
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "README.md", markdown(read_records(out)).encode())
    print(out / "README.md")


def load_command(names: list[str], out: Path | None = None) -> None:
    """Load trained models that come with the package into folders of runs, and print their cards.

    ``ppl-vae evaluate``, ``check`` and ``sample`` go on from such a folder, ``fit --resume`` does
    not: the optimizer's state is not kept.

    Args:
        names: of the models. Default: list them.
        out: folder of the run, of one model; new, or empty. Default: runs/NAME.
    """
    from ppl_vae.pretrained import as_run, card, summaries

    if out is not None and len(names) != 1:
        raise ValueError(f"--out {out} is the folder of one model: give one NAME with it")
    if not names:
        print("\n".join(f"{name:<26} {line}" for name, line in summaries().items()))
    for name in names:
        folder = Path("runs") / name if out is None else out
        as_run(name, folder)
        print(f"{card(name)}\n\n{folder}")
