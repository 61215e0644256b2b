"""Recipes: runnable experiments, one typed function each.

A recipe builds an :class:`Experiment` from plain keyword arguments; its docstring names the paper,
the protocol and the figure to reach. Every public function of a module here that returns an
Experiment is one, under its name with dashes; so is ``path/to/file.py:function``.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppl_vae.data import Dataset
from ppl_vae.fitting import Fitted, fit, torch_device
from ppl_vae.loop import load_weights
from ppl_vae.model import GenerativeModel
from ppl_vae.names import nearest
from ppl_vae.run import Run
from ppl_vae.zoo import collect, find, modules


@dataclass
class Experiment:
    """A model, a guide and data, and how to fit them: arguments of :func:`ppl_vae.fit`."""

    model: GenerativeModel
    guide: nn.Module
    data: Dataset
    fit: dict[str, Any] = field(default_factory=dict)


Recipe = Callable[..., Experiment]

_PLAIN = (bool, int, float, str, type(None))
# Options that decide to which bits a run leads: a resumed run takes them up again.
_KEPT = (
    "batch_size",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "schedule",
    "max_grad_norm",
    "warmup",
    "patience",
    "device",
    "precision",
)


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
        ValueError: no such recipe, file or function; names the nearest.
    """
    path, colon, function = name.rpartition(":")
    if not (colon and path.endswith(".py")):
        return find("recipe", name, recipes())
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"recipe {name!r}: there is no file {file.absolute()}")
    spec = importlib.util.spec_from_file_location(f"ppl_vae_recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and PyroModules look their module up
    spec.loader.exec_module(module)
    known = dict(_experiments(module))
    if function not in known:
        raise ValueError(
            f"recipe {name!r}: {file} has no function {function!r} annotated to return an "
            f"Experiment; {nearest(function, known)}"
        )
    return known[function]


def build(recipe: str, arguments: Mapping[str, Any], seed: int) -> Experiment:
    """The experiment of a recipe, its initial weights drawn with ``seed``.

    Raises:
        ValueError: an argument that the recipe does not take; names the nearest.
    """
    function = find_recipe(recipe)
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known:
            raise ValueError(f"recipe {recipe!r} takes no {name!r}; {nearest(name, known)}")
    torch.manual_seed(seed)
    return function(**arguments)


def run_recipe(
    recipe: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Build and fit a recipe. ``options`` are arguments of :func:`ppl_vae.fit`; they win over the
    recipe's own, and None among them stands for the recipe's."""
    given = dict(arguments or {})
    chosen = {name: value for name, value in options.items() if value is not None}
    experiment = build(recipe, given, seed)
    resolved = experiment.fit | chosen
    return fit(
        experiment.model,
        experiment.guide,
        experiment.data,
        out=out,
        seed=seed,
        record={
            "recipe": recipe,
            "arguments": given,
            "options": {k: v for k, v in chosen.items() if k in _KEPT},
            "fit": {k: v if isinstance(v, _PLAIN) else repr(v) for k, v in resolved.items()},
        },
        **resolved,
    )


def resume(folder: str | Path, *, epochs: int | None = None, **options: Any) -> Fitted:
    """Go on with the run of a recipe, to ``epochs`` epochs (None: as many as it was begun with)."""
    run = Run.open(folder)
    begun_with = run.record["options"] | {"epochs": run.record["epochs"]}
    given = {name: value for name, value in options.items() if value is not None}
    if changed := [n for n in given if n in _KEPT and given[n] != begun_with.get(n)]:
        raise ValueError(
            f"{run.folder} was begun with {changed[0]}={begun_with.get(changed[0])}; going on with "
            f"{given[changed[0]]} would be another run: leave it out, or give another --out"
        )
    return run_recipe(
        _recipe_of(run),
        run.record["arguments"],
        out=run.folder,
        seed=run.record["seed"],
        resume=True,
        **(begun_with | given | ({} if epochs is None else {"epochs": epochs})),
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
    data where the run stopped early, else the last ones.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a run without a recipe, and no pair given; another pair's weights; "cuda" for
            ``device`` where there is none.
        CorruptCheckpoint: no intact checkpoint.
    """
    run = Run.open(folder)
    if model is None or guide is None:
        experiment = build(_recipe_of(run), run.record["arguments"], run.record["seed"])
        model, guide, data = experiment.model, experiment.guide, data or experiment.data
    checkpoint = run.load("best") if run.record["weights"] == "best" else None
    checkpoint = checkpoint or run.latest()
    if checkpoint is None:
        raise ValueError(f"{run.folder} has no checkpoint yet: the run was stopped at its start")
    if "64" in str(run.record.get("fit", {}).get("precision", "")):
        model.double()
        guide.double()
    load_weights(model, guide, checkpoint.tensors)
    place = torch_device(device)
    model.to(place)
    guide.to(place)
    return Fitted(model, guide, data, run.metrics(), run)


def _experiments(module: Any) -> Iterator[tuple[str, Recipe]]:
    for name, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__
        if own and name[0] != "_" and typing.get_type_hints(value).get("return") is Experiment:
            yield name, value


def _recipe_of(run: Run) -> str:
    if "recipe" not in run.record:
        raise ValueError(
            f"{run.folder} was fitted from Python, not by a recipe: give the model and the guide, "
            "built as they were: ppl_vae.load(folder, model, guide, data)"
        )
    return run.record["recipe"]
