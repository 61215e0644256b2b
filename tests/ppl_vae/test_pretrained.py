"""Trained models: how they are stored, that they are what their cards say, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ppl_vae
from ppl_vae import pretrained
from ppl_vae.checkpoints import CorruptCheckpoint
from ppl_vae.cli import main
from ppl_vae.data import DataNotFoundError, load_data
from ppl_vae.data.stand_ins import stand_in, standing_in
from ppl_vae.fitting import Fitted
from ppl_vae.loop import weights
from ppl_vae.pretrained.files import write
from ppl_vae.pretrained.storing import LIMIT, pack, packed_bytes, unpack
from ppl_vae.recipes import build, run_recipe
from ppl_vae.reproduction import score
from ppl_vae.reproduction.published import find_published
from ppl_vae.reproduction.record import Reproduction, as_json, made_record
from ppl_vae.run import Run

NAMES = pretrained.names()


def facts_of(name: str) -> dict[str, Any]:
    return json.loads((pretrained.FOLDER / f"{name}.json").read_text("utf-8"))


@pytest.fixture
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data sets."""
    home = tmp_path / "data"
    home.mkdir()
    monkeypatch.setenv("PPL_VAE_DATA", str(home))
    return home


# Storing


def some_weights() -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 40, generator=stream) * torch.tensor([[1e-3, 0.1, 1, 8, 1e-7, 0]]).T
    return {
        "model.matrix": matrix,
        "model.conv": torch.randn(4, 3, 5, 5, generator=stream),
        "model.vector": torch.randn(40, generator=stream),
        "model.scalar": torch.tensor(0.3),
        "guide.mask": torch.rand(3, 3, generator=stream),
        "guide.order": torch.randperm(9, generator=stream),
    }


def test_16_bits_give_weights_back_within_half_a_step() -> None:
    given = some_weights()
    found = unpack(pack(given, {"guide.mask"}, bits=16))
    assert found.keys() == given.keys()
    for name in ("model.matrix", "model.conv", "model.vector", "model.scalar"):
        exponent = torch.frexp(given[name]).exponent.clamp(min=-13)  # below, steps are alike
        half = torch.ldexp(torch.ones_like(given[name]), exponent - 12)
        assert found[name].dtype == torch.float32
        assert ((found[name] - given[name]).abs() <= half).all()
        assert not torch.equal(found[name], given[name])


def test_8_bits_give_a_row_back_within_half_its_step() -> None:
    given = some_weights()
    packed = pack(given, {"guide.mask"}, bits=8)
    found = unpack(packed)
    assert packed["model.conv:8"].dtype == torch.int8
    assert found["model.conv"].shape == given["model.conv"].shape
    assert torch.equal(found["model.vector"], given["model.vector"].half().float())
    for name in ("model.matrix", "model.conv"):
        error = (found[name] - given[name]).flatten(1).abs().amax(1)
        exact = given[name].flatten(1).abs().amax(1) / 127
        # A step is rounded up, to the next float16.
        step = exact * (1 + 2**-10) + 2**-24
        assert (error <= step / 2 * (1 + 1e-6)).all()
        assert (error > 0.3 * exact)[:4].all()  # it is 8 bits, no more
    assert (found["model.matrix"][5] == 0).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_no_parameter_keeps_its_type_and_bits(bits: Any) -> None:
    given = some_weights()
    found = unpack(pack(given, {"guide.mask"}, bits=bits))
    for name in ("guide.mask", "guide.order"):
        assert found[name].dtype == given[name].dtype
        assert torch.equal(found[name], given[name])


def test_bits_are_chosen_by_size() -> None:
    given = {"model.w": torch.randn(100, 100)}
    data, bits = packed_bytes(given, limit=20_500)
    assert bits == 16
    assert len(data) <= 20_500
    data, bits = packed_bytes(given, limit=19_999)
    assert bits == 8
    assert len(data) <= 11_000
    with pytest.raises(ValueError, match=r"10,000 weights take 10,\d+ bytes in 8 bits; .* 9,999"):
        packed_bytes(given, limit=9_999)


@pytest.mark.parametrize("name", ["model.w:scale", "guide.w:8", "guide.w:16"])
def test_a_name_that_clashes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no name for a weight"):
        pack({"model.w": torch.ones(2, 2), name: torch.ones(2)}, bits=8)


@pytest.mark.parametrize("wrong", [7e4, float("nan"), float("inf")])
def test_a_weight_that_float16_cannot_hold_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"model\.w has a weight of .*: expected at most 65504"):
        pack({"model.w": torch.tensor([1.0, wrong])}, bits=16)


# The models of the package


def test_there_is_a_model() -> None:
    assert "vae-digits" in NAMES


def test_all_files_are_small() -> None:
    for path in pretrained.FOLDER.glob("*.*"):
        assert path.stat().st_size < LIMIT == 3_000_000, path.name


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_and_draws_without_the_data(name: str, no_data: Path) -> None:
    facts = facts_of(name)
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
    facts, said = facts_of(name), pretrained.card(name)
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
    recorded = facts_of("vae-digits")["figures"]
    nll, negative_elbo = figures(pretrained.load("vae-digits"), samples=recorded["samples"])
    assert nll == pytest.approx(recorded["nll"], abs=0.4)
    assert negative_elbo == pytest.approx(recorded["negative_elbo"], abs=0.03)


def test_a_matrix_that_is_a_little_off_shows() -> None:
    """With noise of a quarter of its own deviation on any one matrix. By 400 draws, the ELBO
    has a standard deviation of 0.013 nats."""
    fitted = pretrained.load("vae-digits")
    recorded = facts_of("vae-digits")["figures"]["negative_elbo"]
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


# Without the data, and with other data


MNIST = {
    "name": "mnist",
    "rows": {"train": 50_000, "validation": 10_000, "test": 10_000},
    "columns": {
        "x": {"shape": [784], "dtype": "uint8"},
        "y": {"shape": [], "dtype": "int64"},
    },
    "image_shape": [1, 28, 28],
    "classes": 10,
    "unit": 255.0,
    "binarization": "none",
}
STATIC = MNIST | {"name": "static_mnist", "unit": 1.0, "binarization": "static"}


def stored_tiny(recipe: str, source: dict[str, Any], folder: Path, **arguments: Any) -> str:
    """Store the first weights of a recipe, as if they were trained."""
    with standing_in({source["name"]: stand_in(source)}):
        made = build(recipe, arguments, 3)
    data, bits = packed_bytes(weights(made.model, made.guide))
    facts = facts_of("vae-digits") | {
        "name": "tiny",
        "recipe": recipe,
        "arguments": arguments,
        "source": source,
        "data": made.data.fingerprint(),
    }
    facts["stored"] = {"bits": bits}
    write(facts, data, folder)
    return "tiny"


@pytest.mark.parametrize("source", [MNIST, STATIC])
def test_a_stand_in_is_as_described(source: dict[str, Any]) -> None:
    found = stand_in(source).describe()
    assert found.pop("rows") == {"train": 5000, "validation": 500, "test": 500}
    assert found == {field: value for field, value in source.items() if field != "rows"}


def test_a_stand_in_takes_the_place_of_missing_files_alone(
    no_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[str] = []
    monkeypatch.setitem(
        sys.modules,
        "torchvision",
        types.SimpleNamespace(
            datasets=types.SimpleNamespace(MNIST=lambda *_, **__: downloads.append("mnist"))
        ),
    )
    noise = stand_in(MNIST)
    with standing_in({"mnist": noise, "digits": noise}) as missing:
        assert load_data("mnist") is noise
        assert load_data("digits").name == "digits"
        assert load_data("mnist", binarize="dynamic").binarization == "dynamic"
        with pytest.raises(DataNotFoundError):
            load_data("static_mnist")
    assert list(missing) == ["mnist"]
    assert str(no_data / "MNIST" / "raw") in missing["mnist"]
    assert not downloads
    with pytest.raises(DataNotFoundError):
        load_data("mnist")
    assert downloads == ["mnist"]


@pytest.mark.parametrize(
    ("recipe", "source", "arguments"),
    [
        ("vae-static-mnist", STATIC, {"hidden": 8}),
        ("vae-mnist", MNIST, {"hidden": 8}),
        ("m2-mnist-100", MNIST, {"labels": 1000}),
        ("cvae-mnist-quadrants", STATIC, {"hidden": 8}),
    ],
)
def test_without_the_files_rows_of_the_model_are_the_data(
    recipe: str, source: dict[str, Any], arguments: dict[str, Any], no_data: Path, tmp_path: Path
) -> None:
    name = stored_tiny(recipe, source, tmp_path / "models", **arguments)
    with pytest.warns(RuntimeWarning, match="drawn from the model") as told:
        fitted = pretrained.load(name, folder=tmp_path / "models")
    assert str(no_data) in str(told[0].message)
    assert told[0].filename == __file__
    assert fitted.data.name.endswith(", simulated")
    train = fitted.data.splits["train"]
    assert set(train) == {*fitted.model.observables, *fitted.model.covariates}
    assert train["x"].dtype == torch.uint8
    assert set(train["x"].unique().tolist()) == {0, int(source["unit"])}
    with pytest.warns(RuntimeWarning):
        again = pretrained.load(name, folder=tmp_path / "models")
    assert all(torch.equal(train[c], again.data.splits["train"][c]) for c in train)
    pretrained.as_run(name, tmp_path / "run", folder=tmp_path / "models")
    with pytest.warns(RuntimeWarning, match="drawn from the model") as told:
        opened = ppl_vae.load(tmp_path / "run")
    assert told[0].filename == __file__
    assert all(torch.equal(train[c], opened.data.splits["train"][c]) for c in train)
    with standing_in({source["name"]: stand_in(source)}):
        made = build(recipe, arguments, 3)
    for key, tensor in weights(fitted.model, fitted.guide).items():
        assert torch.allclose(tensor, weights(made.model, made.guide)[key], rtol=1e-3, atol=1e-6)


def test_other_data_are_told_of_by_both_digests(no_data: Path, tmp_path: Path) -> None:
    name = stored_tiny("vae-static-mnist", STATIC, tmp_path / "models", hidden=8)
    (no_data / "binarized_mnist").mkdir()
    stream = np.random.default_rng(0)
    bits = {split: stream.integers(256, size=(5, 98)) for split in ("train", "valid", "test")}
    np.savez(
        no_data / "binarized_mnist" / "binarized_mnist.npz",
        **{split: rows.astype(np.uint8) for split, rows in bits.items()},  # pyright: ignore
    )
    with pytest.warns(RuntimeWarning) as told:
        fitted = pretrained.load(name, folder=tmp_path / "models")
    assert fitted.data.name == "static_mnist"
    here = fitted.data.fingerprint()["sha256"][:12]
    recorded = json.loads((tmp_path / "models" / "tiny.json").read_text())["data"]["sha256"][:12]
    assert here != recorded
    assert here in str(told[0].message)
    assert recorded in str(told[0].message)


# Files that are not as they were written


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The files of vae-digits, to be damaged."""
    folder = tmp_path / "models"
    folder.mkdir()
    for end in ("json", "safetensors"):
        shutil.copy(pretrained.FOLDER / f"vae-digits.{end}", folder)
    return folder


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "error", "match"),
    [
        (lambda f: damage(f / "vae-digits.safetensors"), CorruptCheckpoint, "its SHA-256 is"),
        (lambda f: (f / "vae-digits.safetensors").unlink(), CorruptCheckpoint, "No such file"),
        (lambda f: (f / "vae-digits.json").write_text("{"), CorruptCheckpoint, "is damaged"),
        (lambda f: (f / "vae-digits.json").write_text("{}"), ValueError, "has format None"),
        (lambda f: (f / "vae-digits.json").unlink(), ValueError, "no trained model 'vae-digits'"),
    ],
)
def test_wrong_files_are_refused(copied: Path, break_it: Any, error: type, match: str) -> None:
    break_it(copied)
    with pytest.raises(error, match=match):
        pretrained.load("vae-digits", folder=copied)


def test_weights_of_another_model_are_refused(copied: Path) -> None:
    facts = json.loads((copied / "vae-digits.json").read_text())
    del facts["format"]
    facts["stored"] = {"bits": 16}
    write(facts, safetensors.torch.save({"model.w": torch.ones(1)}), copied)
    with pytest.raises(ValueError, match="not one of this model, VAE"):
        pretrained.load("vae-digits", folder=copied)
    with pytest.raises(ValueError, match="'A b' is no name"):
        write(facts | {"name": "A b"}, b"", copied)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no trained model 'vae-digit'; did you mean 'vae-digit"):
        pretrained.card("vae-digit")


def test_the_files_are_part_of_the_package() -> None:
    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = listed["package-data"]["ppl_vae.pretrained"]
    for name in NAMES:
        for end in ("json", "safetensors"):
            path = pretrained.FOLDER / f"{name}.{end}"
            assert path.exists()
            assert any(path.match(pattern) for pattern in patterns)
    for init in (root / "ppl_vae").glob("*/__init__.py"):
        assert f"ppl_vae.{init.parent.name}" in listed["packages"]


# From a run, and to one


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
    record, facts = Run.open(out).record, facts_of("vae-digits")
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
    assert f"{facts_of('vae-digits')['figures']['nll']:.2f}" in "".join(lines)
    assert main(["load", "vae-digit", "--out", str(tmp_path / "run")]) == 1
    assert "did you mean 'vae-digits'?" in capsys.readouterr().err
    assert main(["load", "--out", str(tmp_path / "run")]) == 1
    assert "give one NAME with it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
