"""The command line: ``ppl-vae list | show | fit | evaluate | check | sample``.

Options are made from signatures with jsonargparse; a recipe's own arguments join those of
``fit``. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import inspect
import itertools
import json as json_
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from ppl_vae.names import nearest

Device = Literal["auto", "cpu", "cuda"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without ``arguments``, those of the process.

    Returns the exit code: 0; 1 for a command that failed, with one sentence that says why; 130
    for Ctrl-C, which ``fit`` answers by saving a checkpoint first. A command line that makes no
    sense exits with 2.
    """
    given = [_underscored(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    parser = _parser(given)
    chosen = parser.parse_args(given).as_dict()
    command = chosen.pop("subcommand")
    try:
        _COMMANDS[command](**chosen[command])
    except KeyboardInterrupt as interrupt:
        hint = f"; go on with: ppl-vae fit --resume {interrupt}" if interrupt.args else ""
        print(f"ppl-vae {command}: interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
        # Pyro appends tables of shapes to an error's sentence.
        print(
            f"ppl-vae {command}: {str(error).partition(' Trace Shapes:')[0].strip()}",
            file=sys.stderr,
        )
        return 1
    return 0


def list_command(json: bool = False) -> None:
    """List models, guides, recipes and data sets.

    Args:
        json: print JSON.
    """
    from ppl_vae import zoo
    from ppl_vae.data import known_names
    from ppl_vae.recipes import recipes

    members = {"models": zoo.models(), "guides": zoo.guides(), "recipes": recipes()}
    table = {
        kind: {name: zoo.first_line(member) for name, member in found.items()}
        for kind, found in members.items()
    }
    if json:
        print(json_.dumps({**table, "data": list(known_names())}, indent=2))
        return
    for kind, lines in table.items():
        print(f"{kind}:")
        for name, line in lines.items():
            print(f"  {name:<18} {line}")
    print(f"data:\n  {', '.join(known_names())}")


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
    device: Device | None = None,
    precision: Literal["32-true", "64-true", "bf16-mixed"] | None = None,
    batch_size: int | None = None,
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
        device: where to compute. Default: auto.
        precision: of the arithmetic.
        batch_size: rows a step.
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
        "precision": precision,
        "batch_size": batch_size,
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
        if recipe is not None or out is not None:
            raise ValueError(
                "--resume DIR goes on with the run in DIR: give no RECIPE and no --out"
            )
        fitted = recipes.resume(resume, seed=seed, **options)
    elif recipe is not None:
        if out is None:
            name = recipe.rpartition(":")[2]
            out = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
            print(f"run: {out}", file=sys.stderr)
        fitted = recipes.run_recipe(recipe, arguments, out=out, seed=seed or 0, **options)
    else:
        raise ValueError("give a RECIPE (ppl-vae list names them), or --resume DIR")
    assert fitted.run is not None
    for name, reason in save_gallery(fitted, fitted.run.folder / "figures").items():
        print(f"no picture {name}: {reason}", file=sys.stderr)
    print(fitted.run.folder)


def evaluate_command(
    run: Path,
    samples: int = 100,
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
    memory: int = 512,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Evaluate a run: ELBO, NLL, KL, active units, on every row of a split.

    Args:
        run: folder of the run.
        samples: importance draws a row.
        split: which rows.
        seed: of the draws.
        memory: MiB that intermediate tensors may take.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.atomic import write_atomically
    from ppl_vae.evaluation import evaluate
    from ppl_vae.recipes import load

    fitted = load(run, device=device)
    figures = evaluate(
        fitted.model,
        fitted.guide,
        fitted.data,
        samples=samples,
        split=split,
        seed=seed,
        memory=memory,
    ).to_json()
    text = json_.dumps(figures, indent=2)
    write_atomically(run / f"evaluation-{split}.json", text.encode() + b"\n")
    if json:
        print(text)
        return
    print(f"{split}: {figures['rows']} rows, {samples} importance samples a row, nats per datum")
    print(f"  ELBO            {figures['elbo']:10.3f} +- {figures['elbo_se']:.3f}")
    print(f"  reconstruction  {figures['reconstruction']:10.3f}")
    print(f"  KL              {figures['kl']:10.3f}")
    print(f"  NLL             {figures['nll']:10.3f} +- {figures['nll_se']:.3f}")
    print(f"  bits per dim    {figures['bits_per_dim']:10.4f}")
    print(f"  active units    {figures['active_units']:10d}")


def check_command(run: Path, seed: int = 0, device: Device = "auto", json: bool = False) -> None:
    """Check a run: does data from the fitted model look like held-out data?

    Args:
        run: folder of the run; the report goes to its folder ``report``.
        seed: of the draws.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.checks import check
    from ppl_vae.recipes import load

    fitted = load(run, device=device)
    report = check(fitted.model, fitted.guide, fitted.data, seed=seed)
    report.save(run / "report")
    if json:
        print(json_.dumps(report.to_json(), indent=2))
    else:
        print(report)
        print(run / "report")


def sample_command(run: Path, n: int = 64, seed: int = 0, device: Device = "auto") -> None:
    """Draw new rows from a run's model, as a picture and as numbers.

    Args:
        run: folder of the run; writes figures/samples.png and samples.npz, every site's draws.
        n: number of rows.
        seed: of the draws.
        device: where to compute.
    """
    import numpy as np
    import torch

    from ppl_vae import plots
    from ppl_vae.recipes import load
    from ppl_vae.sites import aside

    if n < 1:
        raise ValueError(f"--n {n}: expected at least 1")
    fitted = load(run, device=device)
    with aside():
        torch.manual_seed(seed)
        draws = {name: value.cpu().numpy() for name, value in fitted.model.simulate(n).items()}
    np.savez_compressed(run / "samples.npz", **draws)  # pyright: ignore[reportArgumentType]
    figure = plots.samples(fitted.model, fitted.data.image_shape, n=n, seed=seed)
    figure.savefig(run / "figures" / "samples.png")
    print(run / "samples.npz")
    print(run / "figures" / "samples.png")


# Not named like the functions of ``ppl_vae``: jsonargparse would look those up, and load them.
_COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_command,
    "show": show_command,
    "fit": fit_command,
    "evaluate": evaluate_command,
    "check": check_command,
    "sample": sample_command,
}


class _Parser(ArgumentParser):
    """Names the nearest option to one that it does not know."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            parsers = [self, *self._subparsers_by_name().values()]
            options = {o for p in parsers for a in p._actions for o in a.option_strings}
            message += f"; {nearest(unknown[1], (o for o in options if o[:2] == '--'))}"
        super().error(message, ex)

    def _subparsers_by_name(self) -> dict[str, ArgumentParser]:
        for action in self._actions:
            if isinstance(action.choices, dict):
                return action.choices
        return {}


def _parser(given: Sequence[str]) -> ArgumentParser:
    parser = _Parser(
        prog="ppl-vae",
        description="Write, fit and trust VAEs as Pyro programs.",
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description=None)
    for name, function in _COMMANDS.items():
        said = docstring_parser.parse(inspect.getdoc(function) or "")
        first_line = said.short_description or ""
        sub = _Parser(description=first_line)
        # Flags stand alone: --json, not --json true.
        parameters = inspect.signature(function).parameters.values()
        flags = {p.name for p in parameters if p.annotation == "bool"}
        for parameter in said.params:
            if parameter.arg_name in flags:
                sub.add_argument(
                    f"--{parameter.arg_name}", action="store_true", help=parameter.description
                )
        if name == "fit":
            sub.add_argument("recipe", nargs="?", help="name, or path/to/file.py:function")
            sub.add_function_arguments(function, skip={"recipe", "arguments", *flags})
            _add_recipe(parser, sub, given)
        else:
            sub.add_function_arguments(function, as_positional=True, skip={*flags})
        commands.add_subcommand(name, sub, help=first_line[:1].lower() + first_line[1:].rstrip("."))
    return parser


def _add_recipe(parser: ArgumentParser, fit_parser: ArgumentParser, given: Sequence[str]) -> None:
    """Give ``fit`` the arguments of the recipe that the command line names, if it names one."""
    if given[:1] != ["fit"] or any(word.partition("=")[0] == "--resume" for word in given):
        return
    taking = {o for a in fit_parser._actions if a.nargs != 0 for o in a.option_strings}
    # Words that are neither options nor the values of those known so far; a recipe's own options
    # are not, so their values are among the words.
    words = [
        word
        for before, word in itertools.pairwise(given)
        if not word.startswith("-") and before not in taking
    ]
    if not words:
        return
    from ppl_vae.recipes import find_recipe, recipes

    known = {*recipes(), *(word for word in words if ".py:" in word)}
    recipe = next((word for word in words if word in known), words[0])
    try:
        function = find_recipe(recipe)
    except ValueError as error:
        parser.error(str(error))
    reserved = (
        inspect.signature(function).parameters.keys() & inspect.signature(fit_command).parameters
    )
    if reserved:
        parser.error(
            f"recipe {recipe!r} has an argument {reserved.pop()!r}, which fit has: rename it"
        )
    fit_parser.add_function_arguments(function)


def _underscored(word: str) -> str:
    """``--batch-size`` as ``--batch_size``: signatures have underscores, habits have dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
