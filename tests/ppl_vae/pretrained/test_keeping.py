"""From a run to a trained model, and back to a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ppl_vae
from ppl_vae import pretrained
from ppl_vae.cli import main
from ppl_vae.loop import weights
from ppl_vae.pretrained.files import read_facts
from ppl_vae.recipes import run_recipe
from ppl_vae.reproduction.published import find_published
from ppl_vae.reproduction.record import Reproduction, as_json, made_record
from ppl_vae.run import Run

NAMES = pretrained.names()


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short run, and its record."""
    folder = tmp_path_factory.mktemp("reproduced")
    fitted = run_recipe(
        "vae-digits", out=folder / "run", epochs=2, progress=False, compile=False, device="cpu"
    )
    figure = replace(find_published("vae-digits"), samples=10)
    record = made_record(Reproduction(figure, "recipe", 0), fitted, device="cpu")
    (folder / "record.json").write_bytes(as_json(record))
    return folder / "run", folder / "record.json"


def test_a_run_is_kept_with_what_its_record_says(
    reproduced: tuple[Path, Path], tmp_path: Path
) -> None:
    run, record = reproduced
    facts = pretrained.keep(run, record, "short", folder=tmp_path, rows=20)
    assert pretrained.names(tmp_path) == ("short",)
    recorded = json.loads(record.read_text())
    assert facts["figures"] == recorded["figures"]
    stored = facts["stored"]
    assert (stored["bits"], stored["rows"], stored["samples"]) == (16, 20, 10)
    assert stored["difference"] == pytest.approx(stored["nll_after"] - stored["nll_before"])
    assert 0 < abs(stored["difference"]) < 0.1
    assert 0 < stored["difference_se"] < 0.1
    found, was = pretrained.load("short", folder=tmp_path), ppl_vae.load(run)
    held = weights(found.model, found.guide)
    for name, tensor in weights(was.model, was.guide).items():
        assert torch.allclose(held[name], tensor, rtol=2**-11, atol=2**-25)
    assert "# short\n" in pretrained.card("short", folder=tmp_path)
    assert pretrained.keep(run, record, "short", folder=tmp_path, rows=20)["stored"] == stored


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "not the record of .*: seed is 1 there and 0 here"),
        ({"created": "2020-01-01"}, "created is '2020-01-01' there"),
        ({"format": 0}, "is no record of format 1"),
    ],
)
def test_another_runs_record_is_refused(
    reproduced: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    run, record = reproduced
    (tmp_path / "other.json").write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        pretrained.keep(run, tmp_path / "other.json", "short", folder=tmp_path)
    assert not list(tmp_path.glob("short*"))


def test_the_command_makes_a_run_that_others_go_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["load", "vae-digits", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said == f"{pretrained.card('vae-digits')}\n\n{out}\n"
    record, facts = Run.open(out).record, read_facts("vae-digits")
    for field in ("recipe", "arguments", "seed", "data", "fit", "versions", "created"):
        assert record[field] == facts[field]
    assert (record["status"], record["weights"]) == ("finished", "best")
    found, shipped = ppl_vae.load(out), pretrained.load("vae-digits")
    held = weights(shipped.model, shipped.guide)
    for name, tensor in weights(found.model, found.guide).items():
        assert torch.equal(tensor, held[name])
    assert main(["evaluate", str(out), "--samples=2", "--json"]) == 0
    elbo = json.loads(capsys.readouterr().out)["elbo"]
    assert elbo == pytest.approx(-facts["figures"]["negative_elbo"], abs=1.0)
    assert main(["sample", str(out), "--n=4"]) == 0
    capsys.readouterr()

    assert main(["load", "vae-digits", "--out", str(out)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    kept = (out / "run.json").read_bytes()
    assert main(["fit", "--resume", str(out), "--quiet"]) == 1
    assert "its weights without the optimizer's state: its fit cannot go on" in (
        capsys.readouterr().err
    )
    assert (out / "run.json").read_bytes() == kept
    assert {path.name for path in (out / "checkpoints").iterdir()} == {
        "best.json",
        "best.safetensors",
    }


def test_the_command_lists_models_and_refuses_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["load"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert f"{read_facts('vae-digits')['figures']['nll']:.2f}" in "".join(lines)
    assert main(["load", "vae-digit", "--out", str(tmp_path / "run")]) == 1
    assert "did you mean 'vae-digits'?" in capsys.readouterr().err
    assert main(["load", "--out", str(tmp_path / "run")]) == 1
    assert "give one NAME with it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
