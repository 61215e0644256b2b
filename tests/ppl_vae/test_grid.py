"""Which parts go together: found by trying, told in sentences."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
from torch import nn

from ppl_vae import grid, likelihoods, mixtures, objectives, priors
from ppl_vae.objectives import Evolving


def defined(*modules: ModuleType) -> set[str]:
    """The nets that modules define, by name, but for those that others are made from."""
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and issubclass(value, nn.Module)
        and not value.__subclasses__()
        and name[0] != "_"
    }


@pytest.fixture(scope="module")
def refusals() -> dict[tuple[str, str], str]:
    return {(refusal.one, refusal.other): refusal.why for refusal in grid.refusals()}


def test_every_part_is_tried() -> None:
    assert set(grid.PRIORS) == defined(priors, mixtures)
    assert set(grid.LIKELIHOODS) == defined(likelihoods)
    ours = {
        name
        for name in objectives.__all__
        if inspect.isclass(value := getattr(objectives, name)) and issubclass(value, Evolving)
    }
    assert set(grid.OBJECTIVES) == {"ELBO", *ours} - {"RowObjective", "Evolving"}


def test_every_part_has_a_line() -> None:
    for axis, lines in grid.axes().items():
        assert lines, axis
        for name, line in lines.items():
            assert 20 < len(line) <= 100, name
            assert line.endswith((".", ":")), f"{name}: {line}"


def test_reasons_are_sentences(refusals: dict[tuple[str, str], str]) -> None:
    for pair, why in refusals.items():
        assert "\n" not in why, pair
        assert len(why.split()) > 5, pair
        assert "object has no attribute" not in why, pair


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ("Hierarchy", "BetaTC", "needs one latent site a row, found z3, z2, z1"),
        ("PPCA", "VampPrior", "no prior to choose"),
        ("PPCA", "Bernoulli", "no likelihood to choose"),
        ("FullRank", "FreeBits", "needs diagonal normals"),
        ("VampPrior", "FreeBits", "needs diagonal normals"),
        ("TopDown", "VampPrior", "no tractable posterior"),
    ],
)
def test_what_cannot_work_is_refused(
    refusals: dict[tuple[str, str], str], one: str, other: str, why: str
) -> None:
    assert why in refusals[one, other]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("VAE", "NormalizingFlow"),
        ("Hierarchy", "TopDown"),
        ("Hierarchy", "Laplace"),
        ("Hierarchy", "IWAE"),
        ("MeanField", "VampPrior"),
        ("NormalizingFlow", "IWAE"),
        ("MixtureOfGaussians", "BetaTC"),
        ("VampPrior", "DReG"),
    ],
)
def test_what_works_is_not(refusals: dict[tuple[str, str], str], one: str, other: str) -> None:
    assert (one, other) not in refusals


def test_any_parts_can_be_tried_together() -> None:
    assert grid.refused("Hierarchy", "TopDown", likelihoods="Laplace", objectives="IWAE") is None
    why = grid.refused("Hierarchy", "TopDown", likelihoods="Laplace", objectives="FactorVAE")
    assert why is not None
    assert "one latent site" in why
