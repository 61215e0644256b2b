"""A training run on disk: what was asked for, how it went, and where to go on after a kill.

    DIR/run.json      what was run, with which versions, on what hardware
    DIR/metrics.csv   one row an epoch: see `ppl_vae.metrics`
    DIR/checkpoints/  see `ppl_vae.checkpoints`
    DIR/figures/

One process writes a run at a time; any number may read it meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ppl_vae.atomic import write_atomically
from ppl_vae.checkpoints import Checkpoint, Checkpoints, CorruptCheckpoint
from ppl_vae.lossless_json import loads, to_plain
from ppl_vae.metrics import Metrics

__all__ = ["Checkpoint", "CorruptCheckpoint", "Run", "environment", "write_atomically"]

FORMAT = 1


class Run:
    """A run's folder. Make one with `Run.create` or `Run.open`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self._record = record
        self._checkpoints = Checkpoints(folder / "checkpoints")
        self._metrics = Metrics(folder / "metrics.csv")

    @classmethod
    def create(cls, folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Run:
        """Make ``folder`` and its ``run.json``: ``record``, with format, time and `environment`.

        Raises:
            FileExistsError: ``folder`` is a file or has anything in it (hidden files, what a killed
                `create` leaves behind, and the run of an earlier stage in ``before`` apart).
            TypeError, ValueError: ``record`` does not fit JSON.
            OSError: it cannot be written.
        """
        folder = Path(folder).absolute()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        # Before anything is touched, since it refuses what does not fit.
        data = _record_bytes({"created": created, **environment()}, record)
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
        write_atomically(folder / "run.json", data)  # last: a folder without it is not yet a run
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """Open the run in ``folder``, to read it or to go on with it; changes nothing on disk.

        Raises:
            FileNotFoundError: there is no ``run.json``.
            ValueError: it is not valid JSON, or has a format that this version does not know.
        """
        folder = Path(folder).absolute()
        return cls(folder, _read_record(folder))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training this run meanwhile; a killed one keeps it no longer.

        Raises:
            BlockingIOError: another process has it.
        """
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = "another process is training this run: wait for it, or stop it"
                raise BlockingIOError(error.errno, text, str(self.folder)) from None
            yield

    @property
    def record(self) -> Mapping[str, Any]:
        """What ``run.json`` held when last read or updated. Read-only: change it by `update`."""
        return MappingProxyType(self._record)

    def update(self, **fields: Any) -> None:
        """Replace top-level fields of ``run.json``, atomically; the other fields stay.

        Raises:
            TypeError, ValueError: a value does not fit JSON.
            OSError: it cannot be written; ``run.json`` is then as it was.
        """
        # From the disk, since another process may have updated other fields.
        data = _record_bytes(_read_record(self.folder), fields)
        write_atomically(self.folder / "run.json", data)
        self._record = _read_record(self.folder)

    def save(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, step: int, keep: int = 2
    ) -> None:
        """Write the checkpoint of ``step``, and prune: see `Checkpoints.save`."""
        self._checkpoints.save(tensors, state, step=step, keep=keep)

    def save_as(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write or replace the checkpoint ``name``, such as "best": see `Checkpoints.save_as`."""
        self._checkpoints.save_as(name, tensors, state)

    def latest(self, step: int | None = None) -> Checkpoint | None:
        """The newest intact checkpoint, or that of a step; None if there never was one: see
        `Checkpoints.latest`."""
        return self._checkpoints.latest() if step is None else self._checkpoints.at(step)

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, the highest first."""
        return self._checkpoints.steps()

    def load(self, name: str) -> Checkpoint | None:
        """The checkpoint ``name``, None if it was never written: see `Checkpoints.load`."""
        return self._checkpoints.load(name)

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append a row to ``metrics.csv``: see `Metrics.log`."""
        self._metrics.log(row)

    def metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``: see `Metrics.rows`."""
        return self._metrics.rows()

    def rewind(self, epoch: int) -> None:
        """Drop the rows of ``metrics.csv`` after ``epoch``: see `Metrics.rewind`."""
        self._metrics.rewind(epoch)


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
    """What is in ``folder``, hidden files, the empty folders that `create` begins with and the run
    that came ``before`` apart."""

    def counts(entry: Path) -> bool:
        if entry.name == "before" and entry.is_dir():
            return False
        ours = entry.name in ("checkpoints", "figures") and entry.is_dir()
        return not entry.name.startswith(".") and not (ours and not any(entry.iterdir()))

    return sorted(p.name for p in folder.iterdir() if counts(p)) if folder.is_dir() else []


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder} holds no run: there is no run.json in it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return record


def _record_bytes(record: Mapping[str, Any], fields: Mapping[str, Any]) -> bytes:
    if "format" in fields:
        raise ValueError("a run's record cannot set 'format': it is the layout's own number")
    plain = to_plain({"format": FORMAT, **record, **fields}, "record")
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
