"""The models that come with the package: that they are what their cards say."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from ppl_vae import pretrained
from ppl_vae.fitting import Fitted
from ppl_vae.pretrained.files import read_facts
from ppl_vae.pretrained.storing import LIMIT
from ppl_vae.reproduction import score

NAMES = pretrained.names()


def test_there_is_a_model() -> None:
    assert "vae-digits" in NAMES


def test_all_files_are_small() -> None:
    for path in pretrained.FOLDER.glob("*.*"):
        assert path.stat().st_size < LIMIT == 3_000_000, path.name


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_and_draws_without_the_data(name: str, no_data: Path) -> None:
    facts = read_facts(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted = pretrained.load(name)
    simulated = fitted.data.name.endswith(", simulated")
    assert len(told) == simulated
    held = fitted.data.split("test")
    assert len(held) == 100 if simulated else facts["data"]["rows"]["test"]
    shape = facts["data"]["columns"]["x"]["shape"]
    assert list(held.stored["x"].shape[1:]) == shape
    torch.manual_seed(0)
    given = {c: held.batch(slice(5))[c] for c in fitted.model.covariates}
    x = fitted.model.simulate(5, **given)["x"]
    assert list(x.shape) == [5, *shape]
    assert x.isfinite().all()
    trained = [p for m in (fitted.model, fitted.guide) for p in m.parameters() if p.requires_grad]
    assert sum(p.numel() for p in {id(p): p for p in trained}.values()) == facts["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_was_recorded(name: str) -> None:
    facts, said = read_facts(name), pretrained.card(name)
    measure = facts["published"]["measure"]
    for expected in (
        f"# {name}\n",
        f"{facts['figures'][measure]:.2f} ± {facts['figures'][f'{measure}_se']:.2f}",
        f"{facts['parameters']:,} trained weights",
        facts["data"]["sha256"],
        facts["published"]["protocol"],
        f"{facts['stored']['bytes']:,} bytes",
        f'pretrained.load("{name}")',
        "## Limits",
    ):
        assert expected in said
    if facts["published"]["value"] is not None:
        assert f"| {facts['published']['value']:.2f} " in said


def figures(fitted: Fitted, *, samples: int) -> tuple[float, float]:
    """NLL and negative ELBO of all test rows, by other draws than those of the record."""
    scores = score(fitted, samples=samples, seed=12)
    return -float(scores["log_evidence"].mean()), -float(scores["elbo"].mean())


def test_weights_have_the_figures_of_their_record() -> None:
    """Of one model, figures of other draws have a standard deviation of 0.07 nats (NLL by 5000
    draws, from five seeds) and 0.004 (ELBO); storing costs 0.0004 at most."""
    recorded = read_facts("vae-digits")["figures"]
    nll, negative_elbo = figures(pretrained.load("vae-digits"), samples=recorded["samples"])
    assert nll == pytest.approx(recorded["nll"], abs=0.4)
    assert negative_elbo == pytest.approx(recorded["negative_elbo"], abs=0.03)


def test_a_matrix_that_is_a_little_off_shows() -> None:
    """With noise of a quarter of its own deviation on any one matrix. By 400 draws, the ELBO
    has a standard deviation of 0.013 nats."""
    fitted = pretrained.load("vae-digits")
    recorded = read_facts("vae-digits")["figures"]["negative_elbo"]
    assert abs(figures(fitted, samples=400)[1] - recorded) < 0.06
    matrices = [p for m in (fitted.model, fitted.guide) for p in m.parameters() if p.dim() == 2]
    assert len(matrices) == 6
    stream = torch.Generator().manual_seed(0)
    for matrix in matrices:
        was = matrix.detach().clone()
        with torch.no_grad():
            matrix += 0.25 * was.std() * torch.randn(was.shape, generator=stream)
            assert abs(figures(fitted, samples=400)[1] - recorded) > 0.06
            matrix.copy_(was)


def test_the_files_are_part_of_the_package() -> None:
    root = Path(__file__).parents[3]
    listed = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = listed["package-data"]["ppl_vae.pretrained"]
    for name in NAMES:
        for end in ("json", "safetensors"):
            path = pretrained.FOLDER / f"{name}.{end}"
            assert path.exists()
            assert any(path.match(pattern) for pattern in patterns)
    for init in (root / "ppl_vae").glob("*/__init__.py"):
        assert f"ppl_vae.{init.parent.name}" in listed["packages"]
