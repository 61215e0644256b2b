"""What several checks of one fitted pair make together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.checks.result import CheckResult, jsonable

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass(frozen=True, eq=False)
class Report:
    """Several checks of one fitted pair.

    Attributes:
        results: one a check, in the order in which they ran.
        skipped: checks that do not apply, each with the reason.
        idata: posterior, predictive, prior and data (:func:`ppl_vae.arviz.to_arviz`), and each
            check's groups.
        settings: model, guide, split, seed and versions.
    """

    results: tuple[CheckResult, ...]
    skipped: Mapping[str, str]
    idata: DataTree = field(repr=False)
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no check found a fault."""
        return all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "settings": jsonable(self.settings),
            "checks": [result.to_json() for result in self.results],
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        return "\n".join(f"{r.name}: {r.verdict}. {r.meaning}" for r in self.results)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``figures/<check>.png``, further figures as ``<check>-<name>.png``, ``idata.nc``
        and, last, ``check.json`` into a folder.

        Each file appears whole or not at all, and replaces one of an earlier call.
        """
        folder = Path(folder)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for result in self.results:
            for name in result.pictures:
                figure = result.plot(name)
                file = name if name == result.name else f"{result.name}-{name}"
                path = folder / "figures" / f"{file}.png"
                _whole(path, lambda p, f=figure: f.savefig(p, dpi=150))
        _whole(folder / "idata.nc", lambda p: self.idata.to_netcdf(p, engine="h5netcdf"))
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        _whole(folder / "check.json", lambda p: p.write_text(text, encoding="utf-8"))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, then move into place, so that a half-written file is never seen."""
    part = path.with_name(f".{os.getpid()}-{path.name}")  # its suffix tells writers the format
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
