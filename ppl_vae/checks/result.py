"""What every check returns, and what several make together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from xarray import Dataset, DataTree


@dataclass(frozen=True, eq=False)
class CheckResult:
    """The outcome of one check of a fitted model.

    Attributes:
        name: what the check is called in reports and file names.
        verdict: "fail" where the check found a fault.
        error_rate: the probability that the check fails a model without a fault is at most this,
            over all of its statistics together (family-wise).
        statistics: the table of figures, one record a row, all with the same keys.
        meaning: what the outcome means and what to try, for people.
        settings: what the figures were computed with: seed, split, rows.
        groups: what the check adds to the DataTree, by group name.
        draw: makes the figure of this result.
        further: makes more figures of it, by name.
    """

    name: str
    verdict: Literal["pass", "fail"]
    error_rate: float
    statistics: tuple[Mapping[str, Any], ...]
    meaning: str
    settings: Mapping[str, Any]
    groups: Mapping[str, Dataset] = field(repr=False)
    draw: Callable[[CheckResult], Figure] = field(repr=False)
    further: Mapping[str, Callable[[CheckResult], Figure]] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"

    def plot(self) -> Figure:
        return self.draw(self)

    def to_json(self) -> dict[str, Any]:
        """All but the draws, in JSON types; a number that is not finite becomes None."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "error_rate": self.error_rate,
            "meaning": self.meaning,
            "settings": _jsonable(self.settings),
            "statistics": _jsonable(self.statistics),
        }


@dataclass(frozen=True, eq=False)
class Report:
    """Several checks of one fitted pair.

    Attributes:
        results: one a check, in the order in which they ran.
        idata: posterior, predictive, prior and data (:func:`ppl_vae.arviz.to_arviz`), and each
            check's groups.
        settings: model, guide, split, seed and versions.
    """

    results: tuple[CheckResult, ...]
    idata: DataTree = field(repr=False)
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed. Each has an error rate of its own."""
        return all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "settings": _jsonable(self.settings),
            "checks": [result.to_json() for result in self.results],
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
            figures = {result.name: result.draw} | {
                f"{result.name}-{name}": draw for name, draw in result.further.items()
            }
            for name, draw in figures.items():
                figure = draw(result)
                path = folder / "figures" / f"{name}.png"
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


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
