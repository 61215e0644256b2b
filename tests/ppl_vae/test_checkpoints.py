"""Checkpoints give back the same bits, and survive full disks, damage and forgery."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_vae.checkpoints import Checkpoint, Checkpoints, CorruptCheckpoint, _sealed


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(tmp_path / "checkpoints")


def weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((5,), step)}


def save(run: Checkpoints, *steps: int, **options: int) -> None:
    for step in steps:
        run.save(weights(step), {"step": step}, step=step, **options)


def save_under(run: Checkpoints, name: str, value: int) -> None:
    if name == "best":
        run.save_as(name, weights(value), {"step": value})
    else:
        run.save(weights(value), {"step": value}, step=int(name[-1]))


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.state == {"step": step}
    assert checkpoint.tensors["w"].tolist() == [step] * 5


def names(run: Checkpoints) -> set[str]:
    return {path.name for path in run.folder.iterdir()}


def pairs(*steps: int) -> set[str]:
    return {f"step-{step:09d}.{end}" for step in steps for end in ("json", "safetensors")}


def snapshot(run: Checkpoints) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.folder.iterdir()}


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


# -- what comes back ---------------------------------------------------------------------------


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Everything that is to be kept of a tensor; NaNs and signed zeros by their bits."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def test_tensors_come_back_bit_for_bit(run: Checkpoints) -> None:
    pattern = torch.randint(0, 256, (64 * 8,), dtype=torch.uint8)  # NaN payloads and all
    kinds = (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    )  # fmt: skip
    matrix = torch.randn(6, 4)
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    tensors = {str(kind): pattern.view(kind) for kind in kinds} | {
        "bool": pattern > 100,
        "zero-dim": torch.tensor(-0.0),
        "empty": torch.empty(3, 0, 2, dtype=torch.int64),
        "shared": matrix,
        "shared whole": matrix,
        "transposed": matrix.T,
        "part": matrix[1:5:2, 1],
        "expanded": torch.tensor([1.5]).expand(7),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(matrix),
        "conjugate": conjugate,
        "negated": conjugate.imag,
        "random state": torch.get_rng_state(),
    }
    expected = {name: bits(tensor.resolve_conj().resolve_neg()) for name, tensor in tensors.items()}
    run.save(tensors, {}, step=7)
    run.save_as("best", tensors, {})
    for checkpoint, step in ((run.latest(), 7), (run.load("best"), None)):
        assert checkpoint is not None
        assert checkpoint.step == step
        assert {name: bits(tensor) for name, tensor in checkpoint.tensors.items()} == expected


@pytest.mark.parametrize(
    ("tensors", "state", "kind", "match"),
    [
        ({}, {"a": torch.zeros(1)}, TypeError, r"state\['a'\] is a Tensor"),
        ({"w": 1.0}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.eye(2).to_sparse()}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.empty(2, device="meta")}, {}, TypeError, "'w' is not a dense tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, {}, TypeError, "complex128"),
    ],
)
def test_what_would_not_come_back_is_refused(
    run: Checkpoints, tensors: Any, state: Any, kind: type[Exception], match: str
) -> None:
    save(run, 1)
    before = snapshot(run)
    with pytest.raises(kind, match=match):
        run.save(tensors, state, step=2)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "name", ["", "..", "../best", "a/b", "a\\b", ".hidden", "a.b", "-x", "bést", "a" * 65, "a\n"]
)
def test_names_cannot_leave_the_folder(run: Checkpoints, name: str) -> None:
    for action in (lambda: run.save_as(name, {}, {}), lambda: run.load(name)):
        with pytest.raises(ValueError, match="not a checkpoint's name"):
            action()
    assert names(run) == set()


def test_nonsense_is_refused(run: Checkpoints) -> None:
    for options in ({"step": -1}, {"step": 1, "keep": 0}):
        with pytest.raises(ValueError, match="need step"):
            run.save({}, {}, **options)
    with pytest.raises(ValueError, match="name of a numbered"):
        run.save_as("step-000000012", {}, {})


# -- pruning and replacing ---------------------------------------------------------------------


def test_keeps_the_newest(run: Checkpoints) -> None:
    assert run.latest() is None
    save(run, 1, 2, 3)
    assert names(run) == pairs(2, 3)
    save(run, 10, keep=3)
    assert names(run) == pairs(2, 3, 10)
    save(run, 2_000_000_000, keep=1)
    assert names(run) == pairs(2_000_000_000)
    assert_is(run.latest(), 2_000_000_000)


def test_pruning_does_not_count_damaged_ones(run: Checkpoints) -> None:
    save(run, 1, 2)
    (run.folder / "step-000000002.safetensors").write_bytes(b"short")
    save(run, 3)
    assert "step-000000001.json" in names(run)
    save(run, 4)
    assert names(run) == pairs(3, 4)


def test_going_on_below_a_damaged_step_never_removes_what_was_just_saved(run: Checkpoints) -> None:
    save(run, 4, 8, 12)
    for step in (8, 12):  # the right length, so that only a full read can tell
        flip(run.folder / f"step-{step:09d}.safetensors", -1)
    save(run, 5, keep=1)
    with pytest.warns(RuntimeWarning, match="falling back to step-000000005"):
        assert_is(run.latest(), 5)


def test_replaced_in_place(run: Checkpoints) -> None:
    assert run.load("best") is None
    for value in (1, 2, 3):
        for name in ("step-000000001", "best"):
            save_under(run, name, value)
        assert_is(run.latest(), value)
        assert_is(run.load("best"), value)
        assert len(names(run)) == 4
    save_under(run, "best", 3)  # the same tensors once more
    assert_is(run.load("best"), 3)
    save(run, 5, 6, 7)
    assert_is(run.load("best"), 3)  # never pruned


def test_left_overs_go_and_other_files_stay(run: Checkpoints) -> None:
    save(run, 1)
    for name in (
        ".step-000000002.safetensors.0123abcd.tmp",
        "step-000000002.safetensors",  # killed before its commit mark
        "best.0123456789abcdef.safetensors",
        "mine.safetensors",
    ):
        (run.folder / name).touch()
    assert_is(run.latest(), 1)  # and no warning: this is what a kill leaves behind
    save_under(run, "best", 1)
    assert names(run) == {*pairs(1), "best.json", "best.safetensors", "mine.safetensors"}


def test_a_reader_overtaken_by_a_writer_reads_the_newer(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, waiting = Checkpoints._tensors, []

    def late(self: Checkpoints, written: Any) -> dict[str, Tensor]:
        if waiting:  # another process, at work between two reads of ours
            value = waiting.pop()
            save_under(run, "best", value)
            save(run, value, keep=1)
        return real(self, written)

    save(run, 1)
    monkeypatch.setattr(Checkpoints, "_tensors", late)
    waiting.append(2)
    assert_is(run.latest(), 2)
    waiting.append(3)
    assert_is(run.load("best"), 3)


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_every_flipped_byte_and_every_truncation_is_found(run: Checkpoints, end: str) -> None:
    save(run, 1, 2)
    path = run.folder / f"step-000000002.{end}"
    raw = path.read_bytes()
    damaged = [raw[:length] for length in range(len(raw))] + [raw + b"\0", raw + b"\n"]
    for position in range(len(raw)):
        damaged += [raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]]
    for content in damaged:
        path.write_bytes(content)
        short = end == "safetensors" and len(content) != len(raw)
        reason = f"has {len(content)} bytes and not {len(raw)}" if short else "is damaged"
        with pytest.warns(RuntimeWarning, match=rf"step-000000002\.{end} {reason}.*falling back"):
            assert_is(run.latest(), 1)


def test_none_is_intact(run: Checkpoints) -> None:
    save(run, 1, 2)
    flip(run.folder / "step-000000001.json", 100)
    (run.folder / "step-000000002.safetensors").unlink()
    reasons = r"000002\.safetensors is missing; .*000001\.json is damaged"
    with pytest.raises(CorruptCheckpoint, match=reasons):
        run.latest()


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_damaged_best_is_an_error_until_written_anew(run: Checkpoints, end: str) -> None:
    save_under(run, "best", 1)
    flip(run.folder / f"best.{end}", 100)
    with pytest.raises(CorruptCheckpoint, match=rf"best\.{end}"):
        run.load("best")
    save_under(run, "best", 2)
    assert_is(run.load("best"), 2)
    assert len(names(run)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["tensors"].update(file="../secret.safetensors"),
        lambda body: body["tensors"].update(file="step-000000001.safetensors"),
        lambda body: body.update(format=2),
    ],
)
def test_forged_json_with_a_matching_digest_leads_nowhere(
    run: Checkpoints, change: Callable[[dict[str, Any]], object]
) -> None:
    save(run, 1, 2)
    shutil.copy(run.folder / "step-000000002.safetensors", run.folder / "../secret.safetensors")
    path = run.folder / "step-000000002.json"
    body = json.loads(path.read_bytes())
    body.pop("digest")
    path.write_bytes(_sealed(json.dumps(body).encode()))
    assert_is(run.latest(), 2)  # the forger knows the format
    change(body)
    path.write_bytes(_sealed(json.dumps(body).encode()))
    with pytest.warns(RuntimeWarning, match=r"step-000000002\.json is not a checkpoint"):
        assert_is(run.latest(), 1)


# -- full disks --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["step-000000003", "step-000000002", "best"])
def test_a_full_disk_loses_nothing(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: int, name: str
) -> None:
    """The disk fills up at each sync of a save in turn; of a new step, of one there, of best."""
    save(run, 1, 2)
    save_under(run, "best", 1)
    before = snapshot(run)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"\d bytes .* free some space") as caught:
            save_under(run, name, 9)
    assert Path(caught.value.filename).name.startswith(name)
    if call == 4:  # the sync of the folder after the last rename: too late to take it back
        assert_is(run.load(name), 9)
    else:
        assert snapshot(run) == before
    save(run, 4)
    assert_is(run.latest(), 4)
    assert len(names(run)) == 6


@pytest.mark.parametrize(
    ("floats", "pad", "file"),
    [(100_000, 0, "step-000000002.safetensors"), (10, 400_000, "step-000000002.json")],
)
def test_a_file_size_limit_is_a_full_disk(
    run: Checkpoints, floats: int, pad: int, file: str
) -> None:
    """A real refusal by the kernel, in the middle of a write."""
    save(run, 1)
    before = snapshot(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError, match="free some space") as caught:
            run.save({"w": torch.zeros(floats)}, {"pad": "x" * pad}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename).name == file
    assert snapshot(run) == before
