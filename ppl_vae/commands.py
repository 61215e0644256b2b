"""The commands of ``ppl-vae``, each a function whose signature and docstring make its options.

Nothing here imports torch before a command needs it. They are not named like the functions of
``ppl_vae``: jsonargparse would look those up by name, and load them.
"""

from __future__ import annotations

import itertools
import json as json_
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda"]


def list_command(json: bool = False, quick: bool = False) -> None:
    """List the parts of the zoo, which of them do not go together and why, recipes, checks, data.

    Args:
        json: print JSON.
        quick: leave out which parts do not go together: every two are tried, in some seconds.
    """
    from ppl_vae import grid, zoo
    from ppl_vae.checks import CHECKS
    from ppl_vae.data import known_names
    from ppl_vae.recipes import recipes

    table = grid.axes()
    for kind, members in {"recipes": recipes(), "checks": CHECKS}.items():
        table[kind] = {name: zoo.first_line(member) for name, member in members.items()}
    if json:
        refused = [asdict(refusal) for refusal in grid.refusals()] if not quick else None
        print(json_.dumps({**table, "data": list(known_names()), "refused": refused}, indent=2))
        return
    for kind, lines in table.items():
        print(f"{kind}:")
        for name, line in lines.items():
            print(f"  {name:<26} {line}")
    print(f"data:\n  {', '.join(known_names())}")
    if not quick:
        print("a model, a guide, a prior, a likelihood and an objective go together, but not:")
        for (one, why), same in itertools.groupby(grid.refusals(), lambda r: (r.one, r.why)):
            print(f"  {one} with {', '.join(r.other for r in same)}: {why}", flush=True)


def show_command(model: str, graph: Path | None = None) -> None:
    """Show a model: its story, with sites, plates, shapes and supports.

    Args:
        model: name, as ``ppl-vae list`` gives it.
        graph: write the graph to this picture file (.png, .svg or .pdf).
    """
    from ppl_vae import zoo
    from ppl_vae.show import graph as draw
    from ppl_vae.show import story

    instance = zoo.find("model", model, zoo.models()).toy()
    print(story(instance))
    if graph is not None:
        draw(instance).savefig(graph, bbox_inches="tight", dpi=150)


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


def evaluate_command(
    run: Path,
    samples: int = 100,
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
    memory: int = 512,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Evaluate a run: ELBO, NLL, KL, active units, withheld labels, on every row of a split.

    Args:
        run: folder of the run, or of replicas: then mean and standard error over the seeds.
        samples: importance draws a row.
        split: which rows.
        seed: of the draws.
        memory: MiB that intermediate tensors may take.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.atomic import write_atomically
    from ppl_vae.evaluation import evaluate, finite_or_none
    from ppl_vae.recipes import load
    from ppl_vae.replicas import Spread, run_folders

    folders, each = run_folders(run), []
    for folder in folders:
        fitted = load(folder, device=device)
        each.append(
            evaluate(
                fitted.model,
                fitted.guide,
                fitted.data,
                samples=samples,
                split=split,
                seed=seed,
                memory=memory,
            )
        )
        own = json_.dumps(each[-1].to_json(), indent=2)
        write_atomically(folder / f"evaluation-{split}.json", own.encode() + b"\n")
    figures = each[0].to_json()
    text = json_.dumps(figures, indent=2)
    errors: dict[str, Any] = {"elbo": each[0].elbo_se, "nll": each[0].nll_se}
    errors["labels"] = {
        source: {"accuracy": scores["accuracy_se"]}
        for source, scores in figures.get("labels", {}).items()
    }
    title = f"{split}: {figures['rows']} rows, {samples} importance samples a row, nats per datum"
    if len(each) > 1:
        spread = Spread.of(each)
        figures, errors = finite_or_none(spread.mean), finite_or_none(spread.standard_error)
        over = {"mean": figures, "standard_error": errors, "seeds": len(each)}
        text = json_.dumps(over | {"each": [one.to_json() for one in each]}, indent=2)
        write_atomically(run / f"evaluation-{split}.json", text.encode() + b"\n")
        title += f"; mean and standard error over {len(each)} seeds"
    if json:
        print(text)
        return

    def show(label: str, digits: int, value: float | None, error: float | None) -> None:
        shown = "-" if value is None else f"{value:.{digits}f}"
        print(f"  {label:<18}{shown:>10}" + ("" if error is None else f" +- {error:.{digits}f}"))

    print(title)
    for name, label, digits in (
        ("elbo", "ELBO", 3),
        ("reconstruction", "reconstruction", 3),
        ("kl", "KL", 3),
        ("nll", "NLL", 3),
        ("bits_per_dim", "bits per dim", 4),
        ("active_units", "active units", 0 if len(each) == 1 else 1),
    ):
        show(label, digits, figures[name], errors.get(name))
    for source, scores in figures.get("labels", {}).items():
        of = {"classifier": "the classifier q(y | x)", "importance": "importance sampling p(y | x)"}
        print(f"labels, by {of[source]}")
        for name in ("accuracy", "log_loss", "brier", "calibration_error"):
            show(name.replace("_", " "), 4, scores[name], errors["labels"][source].get(name))


def check_command(
    run: Path,
    only: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    level: float = 0.05,
    options: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Check a run: does the model fit, can the guide be believed, how large is the evidence?

    Writes report/index.html, one page with verdicts first; report/idata.nc, draws and importance
    weights as ArviZ's DataTree; report/check.json, all figures; and report/figures.

    Args:
        run: folder of the run; the report goes to its folder ``report``.
        only: names of checks, parted by commas. Default: all that apply.
        split: the rows to check against.
        level: probability that the report as a whole fails a pair without a fault.
        options: further arguments of checks, in JSON: {"evidence": {"rows": 1000}}.
        seed: of the draws.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.checks import check
    from ppl_vae.recipes import load

    given = _arguments(options)
    fitted = load(run, device=device)
    report = check(
        fitted.model,
        fitted.guide,
        fitted.data,
        only=_parted(only),
        split=split,
        level=level,
        seed=seed,
        progress=not json,
        out=run / "report",
        **given,
    )
    if json:
        print(json_.dumps(report.to_json(), indent=2))
    else:
        print(report)
        print(run / "report" / "index.html")


def _arguments(options: str | None) -> dict[str, dict[str, Any]]:
    """Arguments by check, from JSON."""
    expected = 'expected JSON such as {"evidence": {"rows": 1000}}'
    try:
        given = json_.loads(options or "{}")
    except json_.JSONDecodeError as error:
        raise ValueError(f"--options {options}: {error}; {expected}") from None
    if not isinstance(given, dict) or not all(isinstance(own, dict) for own in given.values()):
        raise ValueError(f"--options {options}: {expected}")
    return given


def sample_command(run: Path, n: int = 64, seed: int = 0, device: Device = "auto") -> None:
    """Draw new rows from a run's model, as a picture and as numbers.

    A conditional model is given the covariates of test rows, chosen at random.

    Args:
        run: folder of the run; writes figures/samples.png and samples.npz, every site's draws, and
            what they were given.
        n: number of rows.
        seed: of the draws.
        device: where to compute.
    """
    import numpy as np
    import torch

    from ppl_vae import plots
    from ppl_vae.draws import some_covariates
    from ppl_vae.recipes import load
    from ppl_vae.sites import aside

    if n < 1:
        raise ValueError(f"--n {n}: expected at least 1")
    fitted = load(run, device=device)
    given = some_covariates(fitted.model, fitted.data, n, seed=seed)
    with aside():
        torch.manual_seed(seed)
        drawn = fitted.model.simulate(n, **given)
    draws = {name: value.cpu().numpy() for name, value in drawn.items()}
    np.savez_compressed(run / "samples.npz", **draws)  # pyright: ignore[reportArgumentType]
    shape = fitted.data.image_shape
    figure = plots.samples(fitted.model, shape, n=n, seed=seed, covariates=given)
    figure.savefig(run / "figures" / "samples.png")
    print(run / "samples.npz")
    print(run / "figures" / "samples.png")


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
            models=_parted(models),
            estimators=_parted(estimators) or [],
            labels=_numbers("labels", labels),
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


def _parted(text: str | None) -> list[str] | None:
    """Words parted by commas."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str | None) -> list[int] | None:
    words = _parted(text)
    if words is not None and not (words and all(word.isdecimal() for word in words)):
        raise ValueError(f"--{option} {text}: expected whole numbers, parted by commas")
    return None if words is None else [int(word) for word in words]


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_command,
    "show": show_command,
    "fit": fit_command,
    "evaluate": evaluate_command,
    "check": check_command,
    "sample": sample_command,
    "experiment": experiment_command,
    "reproduce": reproduce_command,
    "load": load_command,
}
