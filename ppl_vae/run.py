"""A training run on disk: what was asked for, how it went, and where to go on after a kill.

    DIR/run.json                                what was run, with which versions, on what hardware
    DIR/metrics.csv                             one row an epoch
    DIR/checkpoints/step-000000012.safetensors  tensors
    DIR/checkpoints/step-000000012.json         state and the tensors' SHA-256: the commit mark
    DIR/checkpoints/best.*                      the same, under a name
    DIR/figures/

A checkpoint exists from the moment its JSON file is renamed into place, which is after its tensors
reached the disk. Every file is verified before it is parsed, and nothing is ever unpickled.

JSON knows no infinities and no NaN: they are written as `{"$float": "inf"}` and read back as
floats (a NaN comes back as *the* NaN, without its payload). Tuples come back as lists.

One process writes a run at a time; any number may read it meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["Checkpoint", "CorruptCheckpoint", "Run", "environment", "write_atomically"]

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_STEP = re.compile(r"step-([0-9]{9,})")
_SEAL = b'{"digest":"%s",'
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class CorruptCheckpoint(RuntimeError):
    """A checkpoint was written, but what is on the disk now is not what was written."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint as read: tensors on the CPU, plain state, and the JSON file it came from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    step: int | None
    path: Path


class Run:
    """A run's folder. Make one with `Run.create` or `Run.open`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self._record = record

    @classmethod
    def create(cls, folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Run:
        """Make `folder` and its `run.json`: `record`, with format, time and `environment()` added.

        Raises FileExistsError if `folder` is a file or has anything in it (hidden files and what a
        killed `create` leaves behind apart), TypeError or ValueError if `record` does not fit JSON,
        and OSError if it cannot be written.
        """
        folder = Path(folder).absolute()
        if "format" in record:
            raise ValueError("a run's record cannot set 'format': it is the layout's own number")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"format": FORMAT, "created": created, **environment(), **record}
        data = _record_bytes(record)  # before anything is touched
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, not a folder: give another --out")
        if found := _content(folder):
            holds = "a run" if "run.json" in found else "other files"
            listed = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
            raise FileExistsError(
                f"{folder} already holds {holds} ({listed}): give another --out"
                + (", or go on with it by --resume" if holds == "a run" else "")
            )
        for part in ("checkpoints", "figures"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        _write(folder / "run.json", data)  # last: a folder without it is not yet a run
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """Open the run in `folder`, to read it or to go on with it; changes nothing on disk.

        Raises FileNotFoundError if there is no `run.json`, and ValueError if it is not valid JSON
        or has a format that this version does not know.
        """
        folder = Path(folder).absolute()
        return cls(folder, _read_record(folder))

    @property
    def record(self) -> Mapping[str, Any]:
        """What `run.json` held when last read or updated. Read-only: change it by `update`."""
        return MappingProxyType(self._record)

    def update(self, **fields: Any) -> None:
        """Replace top-level fields of `run.json`, atomically; the other fields stay.

        Raises TypeError or ValueError if a value does not fit JSON, and OSError if it cannot be
        written; `run.json` is then as it was.
        """
        if "format" in fields:
            raise ValueError("a run's record cannot set 'format': it is the layout's own number")
        # From the disk, since another process may have updated other fields.
        data = _record_bytes({**_read_record(self.folder), **fields})
        _write(self.folder / "run.json", data)
        self._record = _read_record(self.folder)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, step: int, keep: int = 2
    ) -> None:
        """Write the checkpoint of `step`, then remove those before the newest `keep` sound ones.

        Tensors are written bit for bit, as contiguous copies that share nothing. Raises TypeError
        or ValueError if a tensor or the state cannot be written as it is, and OSError (a full
        disk: ENOSPC, EFBIG, EDQUOT) if the disk refuses; whatever was saved before is then intact.
        """
        step = operator.index(step)
        if step < 0 or keep < 1:
            raise ValueError(f"need step >= 0 and keep >= 1, not step={step} and keep={keep}")
        self._commit(f"step-{step:09d}", tensors, state, step)
        sound = 0
        for earlier, name in self._numbered():
            if sound >= keep:
                # The commit mark goes first: tensors without one are left-overs, no damage.
                (self._checkpoints / f"{name}.json").unlink(missing_ok=True)
                self._tidy(name)
            elif earlier <= step and self._looks_sound(name):
                sound += 1  # later steps than this one are of a future that was given up

    def save_as(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint under `name`, replacing an earlier one atomically.

        Raises ValueError if `name` is not made of letters, digits, `-` and `_` or could be that of
        a numbered checkpoint, and whatever `save` raises.
        """
        if _STEP.fullmatch(_checked(name)):
            raise ValueError(f"{name!r} is the name of a numbered checkpoint: use `save`")
        self._commit(name, tensors, state, None)

    def latest(self) -> Checkpoint | None:
        """The intact numbered checkpoint of the highest step; None if there never was one.

        Tensors are on the CPU. Damaged checkpoints are passed over with a RuntimeWarning that names
        the file and the reason.
        Raises CorruptCheckpoint if there are checkpoints but none is intact.
        """
        while found := self._numbered():
            damage: list[str] = []
            for _, name in found:
                try:
                    checkpoint = self._read(name)
                except CorruptCheckpoint as error:
                    damage.append(str(error))
                    continue
                if checkpoint is not None:
                    for reason in damage:
                        text = f"{reason}; falling back to {checkpoint.path.name}"
                        warnings.warn(text, RuntimeWarning, stacklevel=2)
                    return checkpoint
            if len(damage) == len(found):
                raise CorruptCheckpoint("no checkpoint is intact: " + "; ".join(damage))
            # The others vanished while we looked: a writer pruned them, so it wrote newer ones.
        return None

    def load(self, name: str) -> Checkpoint | None:
        """The checkpoint `name`, such as "best"; None if it was never written.

        Raises ValueError for a name that `save_as` would refuse as malformed, and
        CorruptCheckpoint if it is damaged.
        """
        return self._read(_checked(name))

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _numbered(self) -> list[tuple[int, str]]:
        """Step and name of every numbered checkpoint that was committed, highest step first."""
        names = (p.stem for p in self._checkpoints.glob("step-*.json") if p.is_file())
        return sorted(((int(m[1]), m[0]) for m in map(_STEP.fullmatch, names) if m), reverse=True)

    def _commit(
        self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], step: int | None
    ) -> None:
        data = _tensor_bytes(tensors)
        digest = hashlib.sha256(data).hexdigest()
        body = {"format": FORMAT, "step": step, "state": _plain(state, "state")}
        self._checkpoints.mkdir(exist_ok=True)
        for temporary in self._checkpoints.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)  # a killed save's
        for left_over in ("step-*", name):
            self._tidy(left_over)
        # Tensors that an earlier commit points to must stay until the new commit stands.
        file = self._checkpoints / f"{name}.safetensors"
        if file.exists():
            file = self._checkpoints / f"{name}.{digest[:16]}.safetensors"
        body["tensors"] = {"file": file.name, "bytes": len(data), "sha256": digest}
        sealed = _sealed(json.dumps(body, separators=(",", ":"), allow_nan=False).encode())
        try:
            _write(file, data)
            _write(self._checkpoints / f"{name}.json", sealed)
        finally:
            # Committed: drops the tensors before. Failed: drops the new ones. Decided by what the
            # disk says, since an error can come after the rename (a folder's fsync, Ctrl-C).
            self._tidy(name)

    def _tidy(self, names: str) -> None:
        """Remove the tensor files of `names` (a pattern) that no commit mark points to."""
        for file in self._checkpoints.glob(f"{names}.*safetensors"):
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
            tensors = self._mark(name)["tensors"]
            return (self._checkpoints / tensors["file"]).stat().st_size == tensors["bytes"]
        except (OSError, CorruptCheckpoint):
            return False

    def _mark(self, name: str) -> dict[str, Any]:
        """The commit mark of checkpoint `name`, verified; FileNotFoundError if there is none."""
        path = self._checkpoints / f"{name}.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        text = b"{" + raw[len(_SEAL % bytes(64)) :]
        if raw != _sealed(text):
            raise CorruptCheckpoint(f"{path} is damaged: its digest does not match")
        try:
            mark = json.loads(text, object_hook=_floats)
            file, size = mark["tensors"]["file"], mark["tensors"]["bytes"]
            # The file's name comes from a file: it must be this checkpoint's, in this folder.
            inside = re.fullmatch(rf"{name}(\.[0-9a-f]{{16}})?\.safetensors", file)
            known = mark["format"] == FORMAT and size >= 0
            complete = {"sha256"} <= mark["tensors"].keys() and {"step", "state"} <= mark.keys()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path} is not a checkpoint: {error!r}") from error
        if not (inside and known and complete):
            raise CorruptCheckpoint(f"{path} is not a checkpoint of this name and format {FORMAT}")
        return mark

    def _read(self, name: str) -> Checkpoint | None:
        seen = None
        while True:
            try:
                mark = self._mark(name)
            except FileNotFoundError:
                return None
            try:
                tensors = self._tensors(mark["tensors"])
            except CorruptCheckpoint:
                # A writer may have replaced the pair between our two reads: then look again.
                if seen == mark["tensors"]:
                    raise
                seen = mark["tensors"]
            else:
                path = self._checkpoints / f"{name}.json"
                return Checkpoint(tensors, mark["state"], mark["step"], path)

    def _tensors(self, written: Mapping[str, Any]) -> dict[str, Tensor]:
        path = self._checkpoints / written["file"]
        try:
            size = path.stat().st_size  # before reading: never load more than was written
            data = path.read_bytes() if size == written["bytes"] else b""
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{path} is missing") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        if size != written["bytes"]:
            raise CorruptCheckpoint(f"{path} has {size} bytes and not {written['bytes']}")
        if hashlib.sha256(data).hexdigest() != written["sha256"]:
            raise CorruptCheckpoint(f"{path} is damaged: its SHA-256 does not match")
        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CorruptCheckpoint(f"{path} is not a safetensors file: {error!r}") from error

    # -- metrics -------------------------------------------------------------------------------

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append a row to `metrics.csv`; the first row's keys become the header.

        Numbers are written so that they read back as the same numbers. Raises ValueError if the
        keys are not the header's or cannot stand in one, and OSError if the row cannot be written;
        the rows before it are then as they were.
        """
        path = self.folder / "metrics.csv"
        header = next((text for text, _ in self._lines()), None)
        if header is None:
            if not row or any(not re.fullmatch(r"[^\s,\"]+", key) for key in row):
                raise ValueError(f"need names without blanks, commas and quotes, not {list(row)}")
            header = ",".join(row)
            _write(path, f"{header}\n{_csv(row, header)}\n".encode())
            return
        line = f"{_csv(row, header)}\n".encode()
        with path.open("r+b", buffering=0) as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            try:
                file.truncate(end)  # of a line that a kill cut short
                file.seek(end)
                written = 0
                while written < len(line):  # a disk that fills up takes a part before it refuses
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except BaseException as error:
                file.truncate(end)
                if isinstance(error, OSError):
                    raise _explained(error, path, len(line)) from error
                raise

    def metrics(self) -> list[dict[str, float]]:
        """The rows of `metrics.csv`, without a last one that a kill cut short.

        Raises ValueError naming the line if another one does not fit the header.
        """
        return [row for _, row in self._lines() if row is not None]

    def rewind(self, epoch: int) -> None:
        """Keep only the rows with `row["epoch"] <= epoch`, atomically: a resumed run logs the rest.

        Raises ValueError if the rows have no "epoch", and OSError if the file cannot be written.
        """
        lines = list(self._lines())
        if lines and "epoch" not in lines[0][0].split(","):
            raise ValueError(f"{self.folder / 'metrics.csv'} has no column 'epoch' to rewind by")
        kept = [text for text, row in lines if row is None or row["epoch"] <= epoch]
        if lines:
            _write(self.folder / "metrics.csv", "".join(f"{text}\n" for text in kept).encode())

    def _lines(self) -> Iterator[tuple[str, dict[str, float] | None]]:
        """Every complete line as it stands, and its row (None for the header)."""
        path = self.folder / "metrics.csv"
        raw = path.read_bytes() if path.exists() else b""
        names: list[str] = []
        for number, text in enumerate(raw[: raw.rfind(b"\n") + 1].decode().split("\n")[:-1]):
            if number == 0:
                names = text.split(",")
                yield text, None
                continue
            try:
                cells = zip(names, text.split(","), strict=True)
                yield text, {name: _number(cell) for name, cell in cells}
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1}: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds, at any moment and after any kill, the old or the new.

    Raises OSError if it cannot be written: `path` is then as it was (or new, if only the last step
    failed, which makes the rename outlast a power cut), and no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # Not `tempfile`: its files are readable by their owner alone, and stay so after the rename.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself lives in the folder; without this, a power cut may undo it.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(folder)


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can be told: what a result may depend on."""
    # PyTorch's own string, since it tells the build (+cpu, +cu…) where the package's may not.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("ppl_vae", "pyro-ppl", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        cpu = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    hardware = {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(index) for index in devices],
    }
    return {"versions": versions, "hardware": hardware}


def _content(folder: Path) -> list[str]:
    """What is in `folder`, hidden files and the empty folders that `create` begins with apart."""

    def counts(entry: Path) -> bool:
        ours = entry.name in ("checkpoints", "figures") and entry.is_dir()
        return not entry.name.startswith(".") and not (ours and not any(entry.iterdir()))

    return sorted(p.name for p in folder.iterdir() if counts(p)) if folder.is_dir() else []


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes(), object_hook=_floats)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder} holds no run: there is no run.json in it") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return record


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_plain(record, "record"), indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)  # a killed write's
    try:
        write_atomically(path, data)
    except OSError as error:
        raise _explained(error, path, len(data)) from error


def _explained(error: OSError, path: Path, size: int) -> OSError:
    full = error.errno in _DISK_FULL
    advice = "free some space" if full else "put that right"
    text = f"could not write {size} bytes ({error.strerror}); what was saved before is intact"
    # With an errno, OSError picks its own subclass (PermissionError, …) and shows the file.
    return OSError(error.errno, f"{text}: {advice}, then go on with --resume", str(path))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a checkpoint's name: use letters, digits, '-' and '_'")
    return name


def _sealed(text: bytes) -> bytes:
    """`text`, a JSON object, with a digest of itself as its first field."""
    return _SEAL % hashlib.sha256(text).hexdigest().encode() + text[1:]


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called '__metadata__': safetensors keeps that name")
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{name!r} is not a dense tensor with data: it cannot be saved")
        # Always a copy, since safetensors refuses tensors that share storage (tied weights).
        copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    try:
        return safetensors.torch.save(copies)
    except KeyError as error:  # a dtype that the format lacks
        raise TypeError(f"safetensors files cannot hold tensors of {error}") from error


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it without loss; a sentence naming the place where it cannot."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has the key {wrong[0]!r}: JSON keeps only strings as keys")
        if "$float" in value:
            raise ValueError(f"{where} has the key '$float', which stands for inf and nan here")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    kind = type(value).__name__
    raise TypeError(f"{where} is a {kind}, which JSON cannot hold; tensors go with the tensors")


def _floats(value: dict[str, Any]) -> Any:
    text = value.get("$float")
    return float(text) if isinstance(text, str) and len(value) == 1 else value


def _csv(row: Mapping[str, float | int], header: str) -> str:
    names = header.split(",")
    if set(row) != set(names):
        raise ValueError(f"metrics.csv has the columns {names}, and this row has {list(row)}")
    # By `float`, since numpy's own floats have a repr that is no number.
    values = (row[name] for name in names)
    return ",".join(repr(int(v) if isinstance(v, Integral) else float(v)) for v in values)


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
