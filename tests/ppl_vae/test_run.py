from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ppl_vae.run import Run, environment


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {"recipe": "vae-digits"})


def test_record_reads_back_with_environment(tmp_path: Path) -> None:
    record = {"lr": 0.1 + 0.2, "beta": math.inf, "shape": (1, 28), "name": "β", "x": None}
    run = Run.create(tmp_path / "a" / "b", record)
    again = Run.open(tmp_path / "a" / "b")
    assert again.record == run.record
    assert {key: again.record[key] for key in record} == {**record, "shape": [1, 28]}
    assert again.record["format"] == 1
    assert again.record["created"].endswith("+00:00")
    assert again.record["versions"]["torch"] == torch.__version__
    assert again.record["hardware"] == environment()["hardware"]
    assert "Infinity" not in (tmp_path / "a" / "b" / "run.json").read_text()
    view: Any = again.record
    with pytest.raises(TypeError, match="item assignment"):
        view["seed"] = 4


def test_update_merges_and_keeps_what_others_wrote(run: Run) -> None:
    other = Run.open(run.folder)
    run.update(status="running")
    other.update(epochs=3)
    assert other.record["status"] == "running"
    run.update(status="done")
    assert Run.open(run.folder).record == run.record
    expected = {"recipe": "vae-digits", "status": "done", "epochs": 3}
    assert run.record.items() >= expected.items()


def test_a_failed_write_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.log({"epoch": 1, "nll": 2.0})
    before = snapshot(run.folder)
    with pytest.raises(ValueError, match="format"):
        run.update(format=2)
    with pytest.raises(TypeError, match=r"record\['model'\]\['w'\] is a Tensor"):
        run.update(model={"w": torch.zeros(1)})
    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: run.update(status="done"),
        lambda: run.log({"epoch": 2, "nll": 1.0}),
        lambda: run.rewind(0),
    ):
        with pytest.raises(OSError, match="free some space"):
            write()
    assert snapshot(run.folder) == before
    assert "status" not in run.record


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1', b"\xff", b'{"format": 2}', b"[1]", b"{}"]
)
def test_open_refuses_what_it_cannot_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        Run.open(tmp_path)


def test_open_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no run"):
            Run.open(folder)


def test_create_refuses_an_occupied_folder(run: Run, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"already holds a run .*run\.json.*--resume"):
        Run.create(run.folder, {})
    with pytest.raises(FileExistsError, match=r"already holds other files \(run\).*--out"):
        Run.create(tmp_path, {})
    with pytest.raises(FileExistsError, match="is a file"):
        Run.create(run.folder / "run.json", {})
    assert snapshot(tmp_path) == before
    run.save({}, {}, step=1)
    (run.folder / "run.json").unlink()  # what is left holds a checkpoint: worth keeping
    with pytest.raises(FileExistsError, match="checkpoints"):
        Run.create(run.folder, {})


def test_create_over_a_killed_create(tmp_path: Path) -> None:
    for folder in ("checkpoints", "figures"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".run.json.0123abcd.tmp").write_bytes(b"{")
    (tmp_path / ".gitkeep").touch()
    Run.create(tmp_path, {"seed": 1})
    assert Run.open(tmp_path).record["seed"] == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".gitkeep", "checkpoints", "figures", "run.json"}


def test_create_touches_nothing_if_the_record_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"record\['out'\]"):
        Run.create(tmp_path / "run", {"out": Path("x")})
    assert not (tmp_path / "run").exists()


def test_everything_is_in_the_folder_and_nothing_is_pickled(run: Run) -> None:
    run.save({"w": torch.ones(2)}, {"epoch": 1}, step=1)
    run.save_as("best", {"w": torch.zeros(2)}, {"epoch": 0})
    for epoch in (1, 2):
        run.log({"epoch": epoch})
    run.rewind(1)
    again = Run.open(run.folder)
    latest, best = again.latest(), again.load("best")
    assert latest is not None
    assert best is not None
    assert (latest.step, latest.state) == (1, {"epoch": 1})
    assert (best.step, best.state) == (None, {"epoch": 0})
    assert again.metrics() == [{"epoch": 1}]
    files = snapshot(run.folder)
    assert len(files) == 6
    for name, content in files.items():
        match Path(name).suffix:
            case ".json":
                json.loads(content)
            case ".csv":
                assert content == b"epoch\n1\n"
            case suffix:
                assert suffix == ".safetensors"
                safetensors.torch.load(content)
