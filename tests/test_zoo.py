"""Discovery: a new file is in the zoo at once; two of one name are refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ppl_vae.guides
import ppl_vae.models
from ppl_vae import zoo
from ppl_vae.cli import main
from ppl_vae.fitting import fit
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models import _template
from ppl_vae.nn import MLP

TEMPLATE = Path(_template.__file__).read_text()


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Adds a copy of the template to the zoo, as a file beside its models would be."""
    monkeypatch.setattr(ppl_vae.models, "__path__", [*ppl_vae.models.__path__, str(tmp_path)])
    added: list[str] = []

    def add(file: str, name: str) -> None:
        source = re.sub(r"\bTemplate\b", name, TEMPLATE)
        (tmp_path / f"{file}.py").write_text(source)
        added.append(f"ppl_vae.models.{file}")

    yield add
    for module in added:
        sys.modules.pop(module, None)
        if hasattr(ppl_vae.models, module.rpartition(".")[2]):
            delattr(ppl_vae.models, module.rpartition(".")[2])


def test_a_new_file_appears_and_fits(
    add: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    add("spectra", "Spectra")
    assert main(["list", "--quick"]) == 0
    assert "Spectra" in capsys.readouterr().out
    assert main(["show", "spectra"]) == 0
    assert "w     latent      -       (4,)" in capsys.readouterr().out
    torch.manual_seed(0)
    model = zoo.find("model", "Spectra", zoo.models()).toy()
    x = model.simulate(50)["x"]
    before = MeanField(model, MLP(4, 8), x)
    history = fit(model, before, x, epochs=20, learning_rate=1e-2, progress=False).history
    assert history[-1]["elbo"] > history[0]["elbo"]


def test_two_of_one_name_are_refused(add: Callable[[str, str], None]) -> None:
    add("other", "Vae")
    with pytest.raises(zoo.NameCollision, match="are both named"):
        zoo.models()


def test_the_template_itself_is_not_listed() -> None:
    assert "Template" not in zoo.models()


@pytest.mark.parametrize("name", ["vae", "VAE", "Vae"])
def test_names_are_found_in_any_case(name: str) -> None:
    assert zoo.find("model", name, zoo.models()).__name__ == "VAE"


def test_an_unknown_name_lists_what_there_is() -> None:
    known = {"FullRank": FullRank, "MeanField": MeanField}
    with pytest.raises(ValueError, match=r"unknown guide 'Flow'; known: FullRank, MeanField"):
        zoo.find("guide", "Flow", known)


def test_members_are_attributes_of_their_package() -> None:
    assert ppl_vae.guides.MeanField is MeanField
    assert ppl_vae.models.PPCA is zoo.models()["PPCA"]
    with pytest.raises(AttributeError, match="has no attribute 'Flow'"):
        ppl_vae.guides.Flow  # noqa: B018


@pytest.mark.parametrize("folder", ["models", "guides"])
def test_no_file_shares_six_lines_with_a_sibling(folder: str) -> None:
    """What two of them have in common belongs into the library."""
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        # To name the same parts is not to repeat them.
        lines = [line for line in lines if not line.startswith(("from ", "import "))]
        # Both packages open with the same lines, and a story's template is there to be copied.
        if path.stem in ("__init__", "_template"):
            continue
        for block in zip(*(lines[start:] for start in range(6)), strict=False):
            other = seen.setdefault(block, path.name)
            assert other == path.name, f"{path.name} and {other} share {block}"
