"""Checkpoints on disk: whole or absent, verified before they are read, never unpickled.

    step-000000012.safetensors  tensors
    step-000000012.json         state and the tensors' SHA-256: the commit mark
    best.safetensors, best.json the same, under a name

A checkpoint exists from the moment its JSON file is renamed into place, which is after its tensors
reached the disk. The JSON begins with a digest of the rest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ppl_vae.atomic import write_atomically
from ppl_vae.lossless_json import loads, to_plain

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_STEP = re.compile(r"step-([0-9]{9,})")


class CorruptCheckpoint(ValueError):
    """A checkpoint was written, but what is on the disk now is not what was written."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint as read: tensors on the CPU, plain state, and the JSON file it came from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    step: int | None
    path: Path


class Checkpoints:
    """The checkpoints in a folder. One process writes; any number may read meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, step: int, keep: int = 2
    ) -> None:
        """Write the checkpoint of ``step``; remove those before the newest ``keep`` sound ones.

        Tensors are written bit for bit, as contiguous copies that share nothing.

        Raises:
            TypeError, ValueError: a tensor or the state cannot be written as it is.
            OSError: the disk refuses (full: ENOSPC, EFBIG, EDQUOT); whatever was saved before is
                then intact.
        """
        if step < 0 or keep < 1:
            raise ValueError(f"need step >= 0 and keep >= 1, not step={step} and keep={keep}")
        self._commit(_numbered_name(step), tensors, state, step)
        sound = 0
        for earlier, name in self._numbered():
            if sound >= keep:
                # The commit mark goes first: tensors without one are left-overs, no damage.
                self._mark_path(name).unlink(missing_ok=True)
                self._tidy(name)
            elif earlier <= step and self._looks_sound(name):
                sound += 1  # later steps than this one are of a future that was given up

    def save_as(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint under ``name``, replacing an earlier one atomically.

        Raises:
            ValueError: ``name`` is not made of letters, digits, ``-`` and ``_``, or could be that
                of a numbered checkpoint.
            TypeError, OSError: as `save` does.
        """
        if _STEP.fullmatch(_checked(name)):
            raise ValueError(f"{name!r} is the name of a numbered checkpoint: use `save`")
        self._commit(name, tensors, state, None)

    def latest(self) -> Checkpoint | None:
        """The intact numbered checkpoint of the highest step; None if there never was one.

        Damaged checkpoints are passed over with a RuntimeWarning that names the file and the
        reason.

        Raises:
            CorruptCheckpoint: there are checkpoints but none is intact.
        """
        damage = []
        for _, name in self._numbered():
            try:
                checkpoint = self._read(name)
            except CorruptCheckpoint as error:
                damage.append(str(error))
                continue
            if checkpoint is None:
                return self.latest()  # pruned while we looked: its writer has newer ones by now
            for reason in damage:
                text = f"{reason}; falling back to {checkpoint.path.name}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)  # at the caller of `Run.latest`
            return checkpoint
        if damage:
            raise CorruptCheckpoint("no checkpoint is intact: " + "; ".join(damage))
        return None

    def steps(self) -> list[int]:
        """The steps of the numbered checkpoints, the highest first."""
        return [step for step, _ in self._numbered()]

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step; None if it was never written.

        Raises:
            CorruptCheckpoint: it is damaged.
        """
        return self._read(_numbered_name(step))

    def load(self, name: str) -> Checkpoint | None:
        """The checkpoint ``name``, such as "best"; None if it was never written.

        Raises:
            ValueError: ``name`` is not made of letters, digits, ``-`` and ``_``.
            CorruptCheckpoint: it is damaged.
        """
        return self._read(_checked(name))

    def _mark_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _numbered(self) -> list[tuple[int, str]]:
        """Step and name of every numbered checkpoint that was committed, highest step first."""
        matches = (_STEP.fullmatch(path.stem) for path in self.folder.glob("step-*.json"))
        return sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True)

    # -- writing -------------------------------------------------------------------------------

    def _commit(
        self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], step: int | None
    ) -> None:
        data = _tensor_bytes(tensors)
        digest = hashlib.sha256(data).hexdigest()
        mark = {"format": FORMAT, "step": step, "state": to_plain(state, "state")}
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)  # a killed save's
        self._tidy("step-*")
        self._tidy(name)
        # Tensors that an earlier commit points to must stay until the new commit stands.
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            file = self.folder / f"{name}.{digest[:16]}.safetensors"
        mark["tensors"] = {"file": file.name, "bytes": len(data), "sha256": digest}
        try:
            write_atomically(file, data)
            write_atomically(self._mark_path(name), _sealed(json.dumps(mark).encode()))
        finally:
            # Committed: drops the tensors before. Failed: drops the new ones. Decided by what the
            # disk says, since an error can come after the rename (a folder's fsync, Ctrl-C).
            self._tidy(name)

    def _tidy(self, names: str) -> None:
        """Remove the tensor files of ``names`` (a pattern) that no commit mark points to."""
        for file in self.folder.glob(f"{names}.*safetensors"):
            try:
                if file.name == self._mark(file.name.partition(".")[0])["tensors"]["file"]:
                    continue
            except FileNotFoundError:
                pass
            except CorruptCheckpoint:
                continue  # somebody may still rescue the tensors by hand
            file.unlink(missing_ok=True)

    def _looks_sound(self, name: str) -> bool:
        """Whether the JSON is intact and the tensor file has its length: cheap, for pruning."""
        try:
            written = self._mark(name)["tensors"]
            return (self.folder / written["file"]).stat().st_size == written["bytes"]
        except (OSError, CorruptCheckpoint):
            return False

    # -- reading -------------------------------------------------------------------------------

    def _read(self, name: str) -> Checkpoint | None:
        tried = None
        while True:
            try:
                mark = self._mark(name)
            except FileNotFoundError:
                return None
            try:
                tensors = self._tensors(mark["tensors"])
            except CorruptCheckpoint:
                # A writer may have replaced the pair between our two reads: then look again.
                if mark["tensors"] == tried:
                    raise
                tried = mark["tensors"]
            else:
                return Checkpoint(tensors, mark["state"], mark["step"], self._mark_path(name))

    def _mark(self, name: str) -> dict[str, Any]:
        """The commit mark of checkpoint ``name``, verified; FileNotFoundError if there is none."""
        path = self._mark_path(name)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        text = b"{" + raw[len(_sealed(b"{")) :]
        if raw != _sealed(text):
            raise CorruptCheckpoint(f"{path} is damaged: its digest does not match")
        mark = loads(text)
        # The tensors' file is named by a file: it must be this checkpoint's, in this folder.
        ours = rf"{name}(\.[0-9a-f]{{16}})?\.safetensors"
        if mark["format"] != FORMAT or not re.fullmatch(ours, mark["tensors"]["file"]):
            raise CorruptCheckpoint(f"{path} is not a checkpoint of this name and format {FORMAT}")
        return mark

    def _tensors(self, written: Mapping[str, Any]) -> dict[str, Tensor]:
        path = self.folder / written["file"]
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{path} is missing") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != written["bytes"]:
            raise CorruptCheckpoint(f"{path} has {len(data)} bytes and not {written['bytes']}")
        if hashlib.sha256(data).hexdigest() != written["sha256"]:
            raise CorruptCheckpoint(f"{path} is damaged: its SHA-256 does not match")
        return safetensors.torch.load(data)


def _numbered_name(step: int) -> str:
    return f"step-{step:09d}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a checkpoint's name: use letters, digits, '-' and '_'")
    return name


def _sealed(text: bytes) -> bytes:
    """``text``, a JSON object, with a digest of itself as its first field."""
    return b'{"digest":"%s",' % hashlib.sha256(text).hexdigest().encode() + text[1:]


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    copies = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{name!r} is not a dense tensor with data: it cannot be saved")
        # Always a copy, since safetensors refuses tensors that share storage (tied weights).
        copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    try:
        return safetensors.torch.save(copies)
    except KeyError as error:  # a dtype that the format lacks
        raise TypeError(f"safetensors files cannot hold tensors of {error}") from error
