"""Every recipe: what it says, that it builds, and that it learns from its data."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from ppl_vae.data import Dataset
from ppl_vae.data.sources import DataNotFoundError, data_home
from ppl_vae.fitting import fit
from ppl_vae.recipes import Experiment, build, recipes

RECIPES = recipes()


def experiment(name: str, arguments: dict[str, int]) -> Experiment:
    # Offline, a set that is not on the disk would be a download that fails after a time-out.
    if not name.endswith(("digits", "sprites")) and not data_home().is_dir():
        pytest.skip(f"needs data in {data_home()}; set PPL_VAE_DATA")
    try:
        return build(name, arguments, seed=0)
    except DataNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_its_source_and_its_figure(name: str) -> None:
    said = inspect.getdoc(RECIPES[name]) or ""
    assert re.search(r"nats|[Nn]o published figure|not be compared", said)
    for parameter in inspect.signature(RECIPES[name]).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty
        assert f"{parameter.name}: " in said


def some_rows(made: Experiment) -> tuple[Dataset, dict[str, int]]:
    """250 training rows at most, and how they are fitted: where only some have labels, all those,
    at most 50."""
    rows = {"train": torch.arange(200), "validation": torch.arange(50), "test": torch.arange(50)}
    names = {"x", *made.model.covariates}
    options: dict[str, int] = {}
    known = made.data.split("train").labeled
    if known is not None and "y" in made.model.observables:
        others = torch.ones(len(made.data.split("train")), dtype=torch.bool)
        others[known] = False
        rows["train"] = torch.cat([known[:50], others.nonzero().squeeze(1)[:200]])
        names.add("y")
        options["labeled_batch"] = 25
    few = {s: {name: made.data.splits[s][name][n] for name in names} for s, n in rows.items()}
    data = Dataset(
        made.data.name,
        few,
        image_shape=made.data.image_shape,
        classes=made.data.classes if "y" in names else None,
        unit=made.data.unit,
        binarization=made.data.binarization,
    )
    return data, options


CONVOLUTIONAL = {name for name in RECIPES if name.startswith(("conv-hvae", "conv-flow"))}


def form(name: str) -> str:
    """What a recipe has in common with those that differ from it by their data alone."""
    return re.sub(r"-(static-mnist|mnist|fashion|caltech|omniglot|omniglot-iwae)$", "", name)


# Of those that differ by their data alone, one is fast.
FAST = {form(name): name for name in RECIPES if name not in CONVOLUTIONAL}


@pytest.mark.parametrize(
    "name",
    [
        name if FAST.get(form(name)) == name else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_recipe_learns_from_some_of_its_rows(name: str) -> None:
    # Each pseudo-input costs as much as a row of the batch.
    made = experiment(name, {"components": 20} if name in CONVOLUTIONAL and "vamp" in name else {})
    data, more = some_rows(made)
    options = {**made.fit, "epochs": 4, "warmup": 0, "batch_size": 50, "progress": False, **more}
    history = fit(made.model, made.guide, data, **options).history
    assert history[-1]["elbo"] > history[0]["elbo"] + 5
    assert history[-1]["validation_elbo"] > history[0]["validation_elbo"]


def test_seed_decides_the_initial_weights() -> None:
    one, same, other = (build("vae-digits", {}, seed=s).model for s in (1, 1, 2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="takes no 'hiden'; did you mean 'hidden'"):
        build("vae-digits", {"hiden": 3}, seed=0)
