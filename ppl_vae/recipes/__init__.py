"""Recipes: runnable experiments, one typed function each.

A recipe builds an :class:`Experiment` from plain keyword arguments; its docstring names the paper,
the protocol and the figure to reach. Every public function of a module here that returns an
Experiment is one, under its name with dashes; so is ``path/to/file.py:function``.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppl_vae.averaging import averaged
from ppl_vae.begin import described
from ppl_vae.checkpoints import CorruptCheckpoint
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.fitting import Fitted, fit, torch_device
from ppl_vae.loop import load_weights
from ppl_vae.model import GenerativeModel
from ppl_vae.names import nearest
from ppl_vae.replicas import run_folders
from ppl_vae.run import Run
from ppl_vae.sites import aside
from ppl_vae.zoo import collect, find, modules


@dataclass
class Experiment:
    """A model, a guide and data, and how to fit them: arguments of :func:`ppl_vae.fit`.

    Attributes:
        before: what is fitted first, in the run's folder ``before``: a pair that shares parts with
            this one.
        begin: is called between the two, to take over what was learned; data that it returns stand
            in for ``data`` in the fit.
    """

    model: GenerativeModel
    guide: nn.Module
    data: Dataset
    fit: dict[str, Any] = field(default_factory=dict)
    before: Experiment | None = None
    begin: Callable[[], Dataset | None] | None = None


Recipe = Callable[..., Experiment]


def recipes() -> dict[str, Recipe]:
    """The package's recipes by name."""
    return collect(
        (name.replace("_", "-"), function)
        for module in modules(__name__)
        for name, function in _experiments(module)
    )


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or a function of a user's file by ``path/to/file.py:function``.

    Raises:
        ValueError: no such recipe, file or function, and names the nearest; or a file that Python
            cannot run, and names the line.
    """
    file, function = _file_and_function(name)
    if file is None:
        return find("recipe", name, recipes())
    if not file.is_file():
        raise ValueError(f"recipe {name!r}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"ppl_vae_recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and PyroModules look their module up
    with _explained(name, file):
        spec.loader.exec_module(module)
    known = dict(_experiments(module))
    if function not in known:
        raise ValueError(
            f"recipe {name!r}: {file} has no function {function!r} annotated to return an "
            f"Experiment; {nearest(function, known)}"
        )
    return known[function]


def build(recipe: str, arguments: Mapping[str, Any], seed: int) -> Experiment:
    """The experiment of a recipe, its initial weights drawn with ``seed``; leaves torch's random
    state as it was.

    Raises:
        ValueError: an argument that the recipe does not take, and names the nearest; or a user's
            recipe that fails, and names the line.
    """
    function = find_recipe(recipe)
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known:
            raise ValueError(f"recipe {recipe!r} takes no {name!r}; {nearest(name, known)}")
    # run.json holds a path as text.
    given = {
        name: Path(value) if "Path" in str(known[name].annotation) and value else value
        for name, value in arguments.items()
    }
    with aside(), _explained(recipe, _file_and_function(recipe)[0]):
        torch.manual_seed(seed)
        made = function(**given)
    if not isinstance(made, Experiment):
        raise ValueError(f"recipe {recipe!r} returned {type(made).__name__}, not an Experiment")
    return made


def run_recipe(
    recipe: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    seeds: int | None = None,
    **options: Any,
) -> Fitted:
    """Build and fit a recipe. ``options`` are arguments of :func:`ppl_vae.fit`; they win over the
    recipe's own, and None among them stands for the recipe's. Of ``seeds``, each has initial
    weights of its own."""
    file, function = _file_and_function(recipe)
    name = recipe if file is None else f"{file}:{function}"  # found from any folder later on
    given = dict(arguments or {})
    built = [build(name, given, seed + number) for number in range(seeds or 1)]
    chosen = {option: value for option, value in options.items() if value is not None}
    record = {
        "recipe": name,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in given.items()},
    }
    return _fit(built, chosen, out=out, seed=seed, seeds=seeds, record=record)


# What a stage before has of the options: where and how to compute, not what.
_OF_ALL_STAGES = (
    "device",
    "devices",
    "num_nodes",
    "precision",
    "matmul_precision",
    "compile",
    "checkpoint_seconds",
    "progress",
)


def _fit(
    built: list[Experiment],
    chosen: Mapping[str, Any],
    *,
    out: str | Path | None,
    seed: int,
    seeds: int | None,
    record: Mapping[str, Any],
) -> Fitted:
    """Fit an experiment, or one for each seed, after what comes before it."""
    experiment = built[0]
    folder = None if out is None else Path(out) / "before"
    begun = folder is not None and run_folders(folder)[0].joinpath("run.json").exists()
    # A run that goes on has what came before in its own checkpoint.
    if experiment.before is not None and (begun or not chosen.get("resume")):
        shared = {option: chosen[option] for option in _OF_ALL_STAGES if option in chosen}
        stages = [one.before for one in built if one.before is not None]
        _fit(
            stages,
            shared | {"resume": begun},
            out=folder,
            seed=seed,
            seeds=seeds,
            record={},  # no recipe makes it by itself
        )
    data = experiment.data
    for one in built:
        made = None if one.begin is None else one.begin()
        if made is not None and len(built) > 1:
            raise ValueError(
                "a stage of this recipe makes data of its own for each seed: fit seeds one by one"
            )
        data = made or data
    return fit(
        experiment.model if seeds is None else [one.model for one in built],
        experiment.guide if seeds is None else [one.guide for one in built],
        data,
        out=out,
        seed=seed,
        seeds=seeds,
        record=record,
        **(experiment.fit | dict(chosen)),
    )


def resume(folder: str | Path, **options: Any) -> Fitted:
    """Go on with the run of a recipe, or with the replicas in a folder, with the settings they
    were begun with.

    Args:
        options: arguments of :func:`ppl_vae.fit` that do not make another run of it, such as more
            ``epochs``; None stands for what the run was begun with.

    Raises:
        ValueError: an option that would make another run; a run that no recipe made.
    """
    found = run_folders(folder)
    run = Run.open(found[0])
    seeds = None if found[0] == Path(folder) else len(found)
    recipe, arguments, seed = _recipe_of(run), run.record["arguments"], run.record["seed"]
    chosen = {option: value for option, value in options.items() if value is not None}
    if chosen.pop("seed", seed) != seed:
        raise ValueError(f"{run.folder} was begun with seed={seed}: leave --seed out")
    own = build(recipe, arguments, seed).fit
    # A setting that is no plain value, such as a schedule, is recorded by name: the recipe has it.
    begun_with = {
        name: own[name] if name in own and described(own[name]) == value else value
        for name, value in run.record["fit"].items()
    }
    return run_recipe(
        recipe,
        arguments,
        out=folder,
        seed=seed,
        seeds=seeds,
        resume=True,
        **(begun_with | chosen),
    )


def load(
    folder: str | Path,
    model: GenerativeModel | None = None,
    guide: nn.Module | None = None,
    data: Any = None,
    *,
    device: str = "cpu",
) -> Fitted:
    """A fitted run from its folder.

    A recipe's run is rebuilt from the recipe; a run that was fitted from Python needs the pair,
    built as it was, since no code is kept in a run's folder. Weights are the best on validation
    data where the run stops early by patience, else the last ones; where the best are damaged, the
    last ones, with a warning. Of a trained model that came with the package, rows drawn from it
    stand in for data that are not at hand, with a warning.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a run without a recipe, and no pair given; another pair's weights; "cuda" for
            ``device`` where there is none.
        CorruptCheckpoint: no checkpoint is intact.
    """
    run = Run.open(folder)
    if "pretrained" in run.record and model is None and guide is None and data is None:
        from ppl_vae.pretrained.loading import opened  # which imports this module

        return opened(run, device)
    if model is None or guide is None:
        experiment = build(_recipe_of(run), run.record["arguments"], run.record["seed"])
        model, guide = experiment.model, experiment.guide
        data = experiment.data if data is None else data
    if data is None:
        raise ValueError(f"give the data that {run.folder} was fitted to: load(..., data=...)")
    checkpoint = None
    if run.record["weights"] == "best":
        try:
            checkpoint = run.load("best")
        except CorruptCheckpoint as error:
            text = f"{error}; falling back to the last weights"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    checkpoint = checkpoint or run.latest()
    if checkpoint is None:
        raise ValueError(f"{run.folder} has no checkpoint yet: the run was stopped at its start")
    dtype = torch.float64 if run.record["fit"]["precision"] == "64-true" else torch.float32
    place = torch_device(device)
    model.to(place, dtype)
    guide.to(place, dtype)
    load_weights(model, guide, averaged(checkpoint.tensors))
    return Fitted(model, guide, as_dataset(data), run.metrics(), run)


def _file_and_function(recipe: str) -> tuple[Path | None, str]:
    """The file, absolute, and the function of ``path/to/file.py:function``; (None, recipe) else."""
    path, colon, function = recipe.rpartition(":")
    return (Path(path).absolute(), function) if colon and path.endswith(".py") else (None, recipe)


@contextmanager
def _explained(recipe: str, file: Path | None) -> Iterator[None]:
    """Errors of a user's file, in one sentence with the line; those of our own recipes as are."""
    try:
        yield
    except Exception as error:
        if file is None:
            raise
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        raise ValueError(
            f"recipe {recipe!r} failed at line {line} of {file}: {type(error).__name__}: {error}"
        ) from error


def _experiments(module: Any) -> Iterator[tuple[str, Recipe]]:
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_":
            returned = value.__annotations__.get("return")
            if getattr(returned, "__name__", str(returned)).rpartition(".")[2] == "Experiment":
                yield name, value


def _recipe_of(run: Run) -> str:
    if "recipe" not in run.record:
        raise ValueError(
            f"{run.folder} was fitted from Python, not by a recipe: give the model and the guide, "
            "built as they were: ppl_vae.load(folder, model, guide, data)"
        )
    return run.record["recipe"]
