"""Loading a trained model: without its data, with other data, and from damaged files."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ppl_vae
from ppl_vae import pretrained
from ppl_vae.checkpoints import CorruptCheckpoint
from ppl_vae.data import DataNotFoundError, load_data
from ppl_vae.data.stand_ins import stand_in, standing_in
from ppl_vae.loop import weights
from ppl_vae.pretrained.files import read_facts, write
from ppl_vae.pretrained.storing import packed_bytes
from ppl_vae.recipes import build

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
    facts = read_facts("vae-digits") | {
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
