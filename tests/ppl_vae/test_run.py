"""A run on disk survives kills, full disks and damaged files, and gives back the same bits."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import select
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import ppl_vae.run
from ppl_vae.run import Checkpoint, CorruptCheckpoint, Run, environment, write_atomically

# -- what the tests compare with ---------------------------------------------------------------


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Everything that is to be kept of a tensor; NaNs and signed zeros by their bits."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def weights(step: int) -> dict[str, Tensor]:
    """Tensors that tell which step they are of; the child process below has the same function."""
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.rand(5000, generator=generator), "step": torch.tensor(step)}


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    """All of `checkpoint`, tensors and state, is of `step`."""
    found, expected = present(checkpoint), weights(step)
    assert found.state == {"step": step}
    assert found.tensors.keys() == expected.keys()
    assert all(bits(found.tensors[name]) == bits(expected[name]) for name in expected)


def save(run: Run, *steps: int, **options: int) -> None:
    for step in steps:
        run.save(weights(step), {"step": step}, step=step, **options)


def present(checkpoint: Checkpoint | None) -> Checkpoint:
    assert checkpoint is not None
    return checkpoint


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def pairs(*names: str) -> list[str]:
    return sorted(f"{name}.{end}" for name in names for end in ("json", "safetensors"))


def assert_tidy(run: Run) -> None:
    """Two numbered checkpoints and the best one, and nothing else."""
    names = checkpoints(run)
    assert len(names) == 6, names
    assert sum(name.endswith(".json") for name in names) == 3


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's JSON and give it a matching digest, as an attacker would."""
    body = json.loads(path.read_bytes())
    body.pop("digest")
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    seal = b'{"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'",'
    path.write_bytes(seal + text[1:])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {"recipe": "vae-digits"})


# -- the record --------------------------------------------------------------------------------


def test_record_reads_back_with_environment(tmp_path: Path) -> None:
    record = {
        "seed": 3,
        "lr": 0.1 + 0.2,
        "beta": math.inf,
        "shape": (1, 28),
        "name": "β",
        "x": None,
    }
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
    assert (run.record["status"], run.record["epochs"]) == ("done", 3)
    assert run.record["recipe"] == "vae-digits"
    before = snapshot(run.folder)
    with pytest.raises(ValueError, match="format"):
        run.update(format=2)
    with pytest.raises(TypeError, match=r"record\['model'\]\['w'\] is a Tensor"):
        run.update(model={"w": torch.zeros(1)})
    assert snapshot(run.folder) == before


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1', b"\xff", b'{"format": 2}', b"[1]", b"{}"]
)
def test_open_refuses_what_it_cannot_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        Run.open(tmp_path)


def test_open_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path / "nowhere")


def test_create_refuses_an_occupied_folder(run: Run, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"already holds a run .*run\.json.*--resume"):
        Run.create(run.folder, {})
    with pytest.raises(FileExistsError, match=r"already holds other files \(run\).*--out"):
        Run.create(tmp_path, {})
    with pytest.raises(FileExistsError, match="is a file"):
        Run.create(run.folder / "run.json", {})
    assert snapshot(tmp_path) == before
    save(run, 1)
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
    assert {path.name for path in tmp_path.iterdir()} == {
        ".gitkeep", "checkpoints", "figures", "run.json",
    }  # fmt: skip


def test_create_touches_nothing_if_the_record_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"record\['out'\]"):
        Run.create(tmp_path / "run", {"out": Path("x")})
    assert not (tmp_path / "run").exists()


# -- bits --------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit(run: Run) -> None:
    pattern = torch.randint(0, 256, (64 * 8,), dtype=torch.uint8)  # NaN payloads and all
    kinds = (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    )  # fmt: skip
    tensors = {str(kind): pattern.view(kind) for kind in kinds}
    matrix = torch.randn(6, 4)
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    tensors |= {
        "bool": pattern > 100,
        "zero-dim": torch.tensor(-0.0),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
        "empty matrix": torch.empty(3, 0, 2, dtype=torch.int64),
        "shared": matrix,
        "shared whole": matrix,
        "transposed": matrix.T,
        "part": matrix[1:5:2, 1],
        "expanded": torch.tensor([1.5]).expand(7),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(matrix),
        "conjugate": conjugate,
        "negated": conjugate.imag,
        "rng": torch.get_rng_state(),
    }
    expected = {name: bits(tensor.resolve_conj().resolve_neg()) for name, tensor in tensors.items()}
    run.save(tensors, {}, step=7)
    run.save_as("best", tensors, {})
    for checkpoint, step in ((present(run.latest()), 7), (present(run.load("best")), None)):
        assert checkpoint.step == step
        assert {name: bits(tensor) for name, tensor in checkpoint.tensors.items()} == expected
    matrix.zero_()
    assert bits(present(run.latest()).tensors["shared"]) == expected["shared"]


def test_no_tensors_at_all(run: Run) -> None:
    run.save({}, {"a": 1}, step=0)
    checkpoint = present(run.latest())
    assert (checkpoint.tensors, checkpoint.state, checkpoint.step) == ({}, {"a": 1}, 0)


def test_state_comes_back_exactly(run: Run) -> None:
    generator = random.Random(0)
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.inf, -math.inf]
    floats += [math.ldexp(generator.random(), generator.randrange(-1000, 1000)) for _ in range(200)]
    state = {
        "floats": floats,
        "int": 2**70,
        "deep": {"a": [None, True, {"b": "\ud800 é\n"}], "": 0},
    }
    run.save({}, {**state, "nan": math.nan, "tuple": (1, 2)}, step=1)
    found = present(run.latest()).state
    assert math.isnan(found.pop("nan"))
    assert found.pop("tuple") == [1, 2]
    assert repr(found) == repr(state)  # tells -0.0 from 0.0, 1 from 1.0 and True
    assert b"Infinity" not in (run.folder / "checkpoints" / "step-000000001.json").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "state", "kind", "match"),
    [
        ({}, {"a": {1: 2}}, TypeError, r"state\['a'\] has the key 1"),
        ({}, {"a": [0, {1, 2}]}, TypeError, r"state\['a'\]\[1\] is a set"),
        ({}, {"a": torch.zeros(1)}, TypeError, "go with the tensors"),
        ({}, {"$float": "nan"}, ValueError, r"\$float"),
        ({"w": 1.0}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.eye(2).to_sparse()}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.empty(2, device="meta")}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, {}, TypeError, "complex128"),
        ({"__metadata__": torch.zeros(2)}, {}, ValueError, "__metadata__"),
    ],
)
def test_what_would_not_come_back_is_refused(
    run: Run, tensors: Any, state: Any, kind: type[Exception], match: str
) -> None:
    save(run, 1)
    before = snapshot(run.folder)
    with pytest.raises(kind, match=match):
        run.save(tensors, state, step=2)
    assert snapshot(run.folder) == before


@pytest.mark.parametrize("options", [{"step": -1}, {"keep": 0}])
def test_save_refuses_nonsense(run: Run, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need step"):
        run.save({}, {}, **{"step": 1, **options})


BAD_NAMES = [
    "",
    ".",
    "..",
    "../best",
    "a/b",
    "a\\b",
    ".hidden",
    "a.b",
    "-x",
    "bést",
    "a" * 65,
    "a\n",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_cannot_leave_the_folder(run: Run, name: str) -> None:
    before = snapshot(run.folder)
    with pytest.raises(ValueError, match="not a checkpoint's name"):
        run.save_as(name, {}, {})
    with pytest.raises(ValueError, match="not a checkpoint's name"):
        run.load(name)
    assert snapshot(run.folder) == before


def test_names_cannot_pose_as_numbered(run: Run) -> None:
    with pytest.raises(ValueError, match="numbered"):
        run.save_as("step-000000012", {}, {})


# -- pruning and replacing ---------------------------------------------------------------------


def test_keeps_the_newest(run: Run) -> None:
    save(run, 1, 2, 3)
    assert checkpoints(run) == pairs("step-000000002", "step-000000003")
    save(run, 10, keep=3)
    assert checkpoints(run) == pairs("step-000000002", "step-000000003", "step-000000010")
    save(run, 2_000_000_000, keep=1)
    assert checkpoints(run) == pairs("step-2000000000")
    assert_is(run.latest(), 2_000_000_000)


def test_pruning_does_not_count_damaged_ones(run: Run) -> None:
    save(run, 1, 2)
    (run.folder / "checkpoints" / "step-000000002.safetensors").write_bytes(b"short")
    save(run, 3)
    assert "step-000000001.json" in checkpoints(run)
    save(run, 4)
    assert checkpoints(run) == pairs("step-000000003", "step-000000004")


def test_going_on_below_a_damaged_step_never_removes_what_was_just_saved(run: Run) -> None:
    save(run, 4, 8, 12)
    for step in (8, 12):  # the right length, so that only a full read can tell
        flip(run.folder / "checkpoints" / f"step-{step:09d}.safetensors", -1)
    save(run, 5, keep=1)
    with pytest.warns(RuntimeWarning, match="falling back to step-000000005"):
        assert_is(run.latest(), 5)


def test_the_same_step_again_replaces_it(run: Run) -> None:
    save(run, 1)
    for value in (1.0, 2.0, 3.0):
        run.save({"w": torch.tensor(value)}, {"value": value}, step=1)
        checkpoint = present(run.latest())
        assert (checkpoint.tensors["w"].item(), checkpoint.state) == (value, {"value": value})
        assert len(checkpoints(run)) == 2


def test_best_is_replaced_and_outlives_pruning(run: Run) -> None:
    assert run.load("best") is None
    for step in (1, 2, 3):
        run.save_as("best", weights(step), {"step": step})
        assert_is(run.load("best"), step)
    run.save_as("best", weights(3), {"step": 4})  # the same tensors under another state
    assert present(run.load("best")).state == {"step": 4}
    assert run.latest() is None
    save(run, 5, 6, 7)
    assert [name for name in checkpoints(run) if name.startswith("step")] == pairs(
        "step-000000006", "step-000000007"
    )
    assert present(run.load("best")).state == {"step": 4}
    assert sum(name.startswith("best") for name in checkpoints(run)) == 2


def test_left_overs_go_and_other_files_stay(run: Run) -> None:
    save(run, 1)
    folder = run.folder / "checkpoints"
    (folder / ".step-000000002.safetensors.0123abcd.tmp").touch()
    (folder / "step-000000002.safetensors").touch()  # killed before its commit mark
    (folder / "best.0123456789abcdef.safetensors").touch()
    (folder / "mine.safetensors").touch()
    Run.open(run.folder).save_as("best", weights(1), {"step": 1})
    assert set(checkpoints(run)) == {*pairs("step-000000001", "best"), "mine.safetensors"}


# -- damage ------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def small(run: Run, *steps: int) -> None:
    for step in steps:
        run.save({"w": torch.full((5,), float(step))}, {"step": step}, step=step)


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_every_flipped_byte_and_every_truncation_is_found(run: Run, end: str) -> None:
    small(run, 1, 2)
    path = run.folder / "checkpoints" / f"step-000000002.{end}"
    raw = path.read_bytes()
    damaged = [raw[:length] for length in range(len(raw))] + [raw + b"\0", raw + b"\n"]
    for position in range(len(raw)):
        damaged += [raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]]
    for content in damaged:
        path.write_bytes(content)
        short = end == "safetensors" and len(content) != len(raw)
        reason = f"has {len(content)} bytes and not {len(raw)}" if short else "is damaged"
        with pytest.warns(RuntimeWarning, match=rf"step-000000002\.{end} {reason}"):
            checkpoint = present(run.latest())
        assert (checkpoint.step, checkpoint.state) == (1, {"step": 1})
        assert checkpoint.tensors["w"].tolist() == [1.0] * 5
    path.write_bytes(raw)
    assert present(run.latest()).step == 2


def test_a_missing_tensor_file_is_found(run: Run) -> None:
    save(run, 1, 2)
    (run.folder / "checkpoints" / "step-000000002.safetensors").unlink()
    with pytest.warns(RuntimeWarning, match=r"step-000000002\.safetensors is missing"):
        assert_is(run.latest(), 1)


def test_tensors_without_a_commit_mark_are_no_checkpoint(run: Run) -> None:
    save(run, 1, 2)
    (run.folder / "checkpoints" / "step-000000002.json").unlink()
    assert_is(run.latest(), 1)  # and no warning: this is what a kill leaves behind
    (run.folder / "checkpoints" / "step-000000001.json").unlink()
    assert run.latest() is None


def test_pruned_while_being_looked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that listed checkpoints which a writer then removed looks for the newer ones."""
    save(run, 1, 2)
    real, waiting = Run._read, [8]

    def late(self: Run, name: str) -> Checkpoint | None:
        if waiting:
            save(Run.open(run.folder), waiting.pop(), keep=1)
        return real(self, name)

    monkeypatch.setattr(Run, "_read", late)
    assert_is(run.latest(), 8)


def test_all_damaged(run: Run) -> None:
    save(run, 1, 2)
    flip(run.folder / "checkpoints" / "step-000000001.json", 100)
    flip(run.folder / "checkpoints" / "step-000000002.safetensors", 100)
    with pytest.raises(CorruptCheckpoint, match=r"(?s)000002\.safetensors.*000001\.json"):
        run.latest()


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_damaged_best_is_an_error_until_written_anew(run: Run, end: str) -> None:
    run.save_as("best", weights(1), {"step": 1})
    flip(run.folder / "checkpoints" / f"best.{end}", 100)
    with pytest.raises(CorruptCheckpoint, match=rf"best\.{end}"):
        run.load("best")
    run.save_as("best", weights(2), {"step": 2})
    assert_is(run.load("best"), 2)
    assert len(checkpoints(run)) == 2


def test_a_checkpoint_under_another_name_is_refused(run: Run) -> None:
    save(run, 1)
    folder = run.folder / "checkpoints"
    shutil.copy(folder / "step-000000001.json", folder / "step-000000009.json")
    shutil.copy(folder / "step-000000001.safetensors", folder / "step-000000009.safetensors")
    with pytest.warns(RuntimeWarning, match=r"step-000000009\.json is not a checkpoint of this"):
        assert_is(run.latest(), 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["tensors"].update(file="../../secret.safetensors"),
        lambda body: body["tensors"].update(file="step-000000001.safetensors"),
        lambda body: body["tensors"].update(file=3),
        lambda body: body["tensors"].update(bytes="all"),
        lambda body: body["tensors"].pop("sha256"),
        lambda body: body.update(tensors=[]),
        lambda body: body.pop("state"),
        lambda body: body.update(format=2),
    ],
)
def test_forged_json_with_a_matching_digest_leads_nowhere(
    run: Run, change: Callable[[dict[str, Any]], object]
) -> None:
    save(run, 1, 2)
    secret = run.folder.parent / "secret.safetensors"
    shutil.copy(run.folder / "checkpoints" / "step-000000002.safetensors", secret)
    forge(run.folder / "checkpoints" / "step-000000002.json", lambda body: None)
    assert_is(run.latest(), 2)  # the forger knows the format
    forge(run.folder / "checkpoints" / "step-000000002.json", change)
    with pytest.warns(RuntimeWarning, match=r"step-000000002\.json is not a checkpoint"):
        assert_is(run.latest(), 1)


def test_forged_tensors_with_matching_digests_are_not_parsed_as_anything_else(run: Run) -> None:
    save(run, 1, 2)
    data = b"\x80\x04cos\nsystem\n."  # the beginning of a pickle
    (run.folder / "checkpoints" / "step-000000002.safetensors").write_bytes(data)
    written = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path = run.folder / "checkpoints" / "step-000000002.json"
    forge(path, lambda body: body["tensors"].update(written))
    with pytest.warns(RuntimeWarning, match="is not a safetensors file"):
        assert_is(run.latest(), 1)


# -- full disks --------------------------------------------------------------------------------


def write(run: Run, name: str) -> None:
    if name == "best":
        run.save_as(name, weights(9), {"step": 9})
    else:
        run.save(weights(9), {"step": 9}, step=int(name[-1]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("function", "call"),
    [(name, call) for name in ("open", "fsync") for call in (1, 2, 3, 4)]
    + [("replace", 1), ("replace", 2)],
)
@pytest.mark.parametrize("name", ["step-000000003", "step-000000002", "best"])
def test_a_full_disk_loses_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: int, function: str, call: int, name: str
) -> None:
    """The disk fills up at every point of a save in turn; of a new step, of one there, of best."""
    save(run, 1, 2)
    run.save_as("best", weights(1), {"step": 1})
    before = snapshot(run.folder)
    real, calls = getattr(os, function), 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match=r"\d bytes .* free some space") as caught:
            write(run, name)
    assert caught.value.errno == code
    assert Path(caught.value.filename).name.startswith(name)
    if call == 4:  # the sync of the folder after the last rename: too late to take it back
        assert_is(run.load(name), 9)
    else:
        assert snapshot(run.folder) == before
    save(run, 4)
    assert_is(run.latest(), 4)
    assert_tidy(run)


def test_a_full_disk_leaves_record_and_metrics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log({"epoch": 1, "nll": 2.0})
    before = snapshot(run.folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (
            lambda: run.log({"epoch": 2, "nll": 1.0}),
            lambda: run.update(status="done"),
            lambda: run.rewind(0),
        ):
            with pytest.raises(OSError, match="free some space") as caught:
                write()
            assert caught.value.errno == errno.ENOSPC
            assert snapshot(run.folder) == before
    run.log({"epoch": 2, "nll": 1.0})
    assert run.metrics() == [{"epoch": 1, "nll": 2.0}, {"epoch": 2, "nll": 1.0}]


def test_other_errors_keep_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", {})

    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        save(run, 1)
    assert checkpoints(run) == []


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    mask = os.umask(0o027)
    try:
        write_atomically(path, b"old")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert snapshot(tmp_path) == {"file": b"old"}


# -- kills -------------------------------------------------------------------------------------

# A child that has imported torch once and forks a process for every kill: forking takes
# milliseconds where starting Python with torch takes seconds. It loads run.py by its path, so that
# it imports nothing else of the package.
CHILD = """
import importlib.util, json, os, resource, signal, sys, time

spec = importlib.util.spec_from_file_location("run", sys.argv[1])
module = sys.modules["run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch

torch.set_num_threads(1)  # threads do not survive a fork

def weights(step):
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.rand(5000, generator=generator), "step": torch.tensor(step)}

def die_at(call):
    left = call
    def counted(real):
        def function(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return function
    for name in ("open", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

def write(job, acknowledge):
    run = module.Run.open(job["folder"])
    step = job["step"]
    die_at(job.get("call", 0))
    for step in range(step + 1, step + 1 + job["saves"]):
        run.save(weights(step), {"step": step}, step=step)
        os.write(acknowledge, b"s")
        run.save_as("best", weights(step), {"step": step})
        os.write(acknowledge, b"b")

def fill(job):
    run = module.Run.open(job["folder"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"],) * 2)
    try:
        for epoch in range(job.get("rows", 0)):
            run.log({"epoch": epoch, "nll": 0.125})
        run.save({"w": torch.zeros(job["floats"])}, {"pad": "x" * job["pad"]}, step=2)
    except OSError as error:
        return {"errno": error.errno, "text": str(error)}
    return {}

for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if "limit" in job:
                os.write(writing, json.dumps(fill(job)).encode())
            else:
                write(job, writing)
        finally:
            os._exit(0)
    os.close(writing)
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(child, signal.SIGKILL)
    said = b"".join(iter(lambda: os.read(reading, 65536), b""))
    os.close(reading)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(json.dumps({"said": said.decode(), "killed": killed}), flush=True)
"""


class Child:
    """Sends jobs to the process above."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(ppl_vae.run.__file__)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, job: Mapping[str, object]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def busy(self) -> bool:
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], 0)[0]

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, **job: object) -> dict[str, Any]:
        self.start(job)
        return self.result()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.communicate()  # closes its input, on which it ends


def assert_survived(run: Run, step: int, best: int, said: str) -> tuple[int, int]:
    """Check what a process left behind that began after `step` with `best`; what they are now.

    It said "s" and "b" after each `save` and `save_as`; a last one may have got through unsaid.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may look damaged
        found = run.latest(), run.load("best")
        for path in (run.folder / "checkpoints").glob("*.json"):
            assert run.load(path.stem) is not None  # nor one that was being pruned
    saves, bests = said.count("s"), said.count("b")
    expected = (
        {step + saves, step + saves + 1},
        {step + bests if bests else best, step + bests + 1},
    )
    steps = []
    for checkpoint, possible in zip(found, expected, strict=True):
        steps.append(checkpoint.state["step"] if checkpoint is not None else 0)
        assert steps[-1] in possible
        if steps[-1] > 0:
            assert_is(checkpoint, steps[-1])
    return steps[0], steps[1]


def test_a_kill_before_every_single_system_call(run: Run, child: Child) -> None:
    step = best = call = 0
    result: dict[str, Any] = {"killed": True}
    while result["killed"]:
        call += 1
        result = child.do(folder=str(run.folder), step=step, saves=3, call=call)
        step, best = assert_survived(run, step, best, result["said"])
    assert result["said"] == "sbsbsb"
    assert call > 60  # 3 × 2 checkpoints × 2 files × 5 calls: each was a moment to die
    assert_tidy(run)


def test_kills_at_random_moments(run: Run, child: Child) -> None:
    generator, step, best = random.Random(0), 0, 0
    for _ in range(15):
        seconds = generator.uniform(0.005, 0.1)
        result = child.do(folder=str(run.folder), step=step, saves=10**6, seconds=seconds)
        assert result["killed"]
        step, best = assert_survived(run, step, best, result["said"])
    assert step > 5
    result = child.do(folder=str(run.folder), step=step, saves=2)
    assert assert_survived(run, step, best, result["said"]) == (step + 2, step + 2)
    assert_tidy(run)


def test_a_reader_beside_a_writer_sees_whole_checkpoints(run: Run, child: Child) -> None:
    child.start({"folder": str(run.folder), "step": 0, "saves": 10**6, "seconds": 1.5})
    seen = {"best": [0], "latest": [0]}
    while child.busy():
        for name, checkpoint in (("best", run.load("best")), ("latest", run.latest())):
            if checkpoint is not None:
                assert_is(checkpoint, checkpoint.state["step"])
                seen[name].append(checkpoint.state["step"])
    assert child.result()["said"].count("b") > 5
    for steps in seen.values():
        assert len(set(steps)) > 5
        assert steps == sorted(steps)  # never back to an older one


@pytest.mark.parametrize(
    ("floats", "pad", "file"),
    [(100_000, 0, "step-000000002.safetensors"), (10, 400_000, "step-000000002.json")],
)
def test_a_file_size_limit_is_a_full_disk(
    run: Run, child: Child, floats: int, pad: int, file: str
) -> None:
    """A real refusal by the kernel, in the middle of a write: EFBIG after 64 KiB."""
    save(run, 1)
    before = snapshot(run.folder)
    result = child.do(folder=str(run.folder), limit=65536, floats=floats, pad=pad)
    error = json.loads(result["said"])
    assert error["errno"] == errno.EFBIG
    assert file in error["text"]
    assert "bytes" in error["text"]
    assert "free some space, then go on with --resume" in error["text"]
    assert snapshot(run.folder) == before
    assert_is(run.latest(), 1)


def test_a_row_that_the_disk_cuts_short_is_taken_back(run: Run, child: Child) -> None:
    # The header's 10 bytes and ten rows of 8, then rows of 9: the second of those fits in part.
    error = json.loads(child.do(folder=str(run.folder), limit=103, rows=20)["said"])
    assert error["errno"] == errno.EFBIG
    assert "metrics.csv" in error["text"]
    rows = b"".join(b"%d,0.125\n" % epoch for epoch in range(11))
    assert (run.folder / "metrics.csv").read_bytes() == b"epoch,nll\n" + rows


# -- metrics -----------------------------------------------------------------------------------


def test_metrics_come_back_exactly(run: Run) -> None:
    assert run.metrics() == []
    generator = random.Random(0)
    rows: list[dict[str, float]] = [
        {"epoch": epoch, "nll": math.ldexp(generator.random(), -epoch), "val/kl": -0.0}
        for epoch in range(50)
    ]
    rows.append({"epoch": 2**60 + 1, "nll": math.inf, "val/kl": -math.inf})
    for row in rows:
        run.log(dict(reversed(row.items())) if row["epoch"] == 7 else row)
    assert repr(Run.open(run.folder).metrics()) == repr(rows)
    run.log({"epoch": 0, "nll": math.nan, "val/kl": 0})
    assert math.isnan(run.metrics()[-1]["nll"])


def test_metrics_take_numpy_and_torch_numbers(run: Run) -> None:
    value = torch.tensor(0.1, dtype=torch.float64)
    row: dict[str, Any] = {"epoch": np.int64(0), "nll": np.float64(0.1), "kl": value}
    run.log(row)
    assert repr(run.metrics()) == repr([{"epoch": 0, "nll": 0.1, "kl": 0.1}])


def test_metrics_refuse_other_columns(run: Run) -> None:
    for key in ("", "a,b", "a\nb", 'a"b', "a b"):
        with pytest.raises(ValueError, match="need names"):
            run.log({"epoch": 1, key: 2})
    with pytest.raises(ValueError, match="need names"):
        run.log({})
    assert run.metrics() == []
    run.log({"epoch": 1, "nll": 2.0})
    for row in ({"epoch": 2}, {"epoch": 2, "nll": 1.0, "kl": 1.0}, {"epoch": 2, "kl": 1.0}):
        with pytest.raises(ValueError, match="columns"):
            run.log(row)
    assert run.metrics() == [{"epoch": 1, "nll": 2.0}]


@pytest.mark.parametrize("action", ["log", "rewind", "log by another"])
def test_a_half_written_line_is_dropped(run: Run, action: str) -> None:
    rows = [{"epoch": epoch, "β": epoch + 0.125} for epoch in range(3)]
    for row in rows:
        run.log(row)
    path = run.folder / "metrics.csv"
    whole = path.read_bytes()
    assert whole.decode() == "epoch,β\n0,0.125\n1,1.125\n2,2.125\n"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        complete = max(whole[:length].count(b"\n") - 1, 0)
        assert run.metrics() == rows[:complete]
        if action == "rewind":
            run.rewind(10)
            expected = whole[:length].rpartition(b"\n")
            assert path.read_bytes() == (
                expected[0] + expected[1] if expected[1] else whole[:length]
            )
        for row in rows[complete:]:
            (Run.open(run.folder) if action == "log by another" else run).log(row)
        assert path.read_bytes() == whole


def test_rewind_keeps_earlier_epochs_byte_for_byte(run: Run) -> None:
    run.rewind(3)  # nothing yet: nothing to do
    for epoch in range(1, 6):
        run.log({"epoch": epoch, "nll": 1 / epoch})
    lines = (run.folder / "metrics.csv").read_bytes().splitlines(keepends=True)
    run.rewind(3)
    assert (run.folder / "metrics.csv").read_bytes() == b"".join(lines[:4])
    run.log({"epoch": 4, "nll": 0.0})
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3, 4]
    run.rewind(0)
    assert run.metrics() == []
    run.log({"epoch": 1, "nll": 0.5})
    assert run.metrics() == [{"epoch": 1, "nll": 0.5}]


def test_rewind_is_atomic(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in range(3):
        run.log({"epoch": epoch})
    before = snapshot(run.folder)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.rewind(1)
    assert snapshot(run.folder) == before


def test_metrics_name_a_broken_line(run: Run) -> None:
    run.log({"step": 1, "nll": 2.0})
    with pytest.raises(ValueError, match="no column 'epoch'"):
        run.rewind(1)
    path = run.folder / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"2,spam\n3,1.0\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 3"):
        run.metrics()


def test_nothing_is_pickled(run: Run) -> None:
    save(run, 1)
    run.save_as("best", weights(1), {"step": 1})
    run.log({"epoch": 1})
    for name, content in snapshot(run.folder).items():
        match Path(name).suffix:
            case ".json":
                json.loads(content)
            case ".csv":
                assert content == b"epoch\n1\n"
            case suffix:
                assert suffix == ".safetensors"
                safetensors.torch.load(content)
