"""What several checks of one fitted pair make together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ppl_vae.atomic import write_atomically
from ppl_vae.checks.page import page
from ppl_vae.checks.result import CheckResult, jsonable

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass(frozen=True, eq=False)
class Report:
    """Several checks of one fitted pair.

    Attributes:
        results: one a check, in the order in which they ran.
        skipped: checks that do not apply, each with the reason.
        questions: what each check looks for, by its name.
        idata: posterior, predictive, prior and data (:func:`ppl_vae.arviz.to_arviz`), and each
            check's groups.
        settings: model, guide, split, seed and versions.
    """

    results: tuple[CheckResult, ...]
    skipped: Mapping[str, str]
    questions: Mapping[str, str] = field(repr=False)
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
        lines = [f"{r.name}: {r.verdict}. {r.meaning}" for r in self.results]
        return "\n".join([*lines, *(f"{n}: skipped. {why}" for n, why in self.skipped.items())])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the report into a folder.

        ``figures/<check>.png``, further figures as ``<check>-<name>.png``; ``idata.nc``;
        ``index.html``, one page with all of them; and, last, ``check.json``. Each file appears
        whole or not at all, and replaces one of an earlier call.
        """
        folder = Path(folder)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        pictures: dict[str, dict[str, bytes]] = {}
        for result in self.results:
            for name in result.pictures:
                file = name if name == result.name else f"{result.name}-{name}"
                path = folder / "figures" / f"{file}.png"
                figure = result.plot(name)
                write_atomically(path, png := _png(figure))
                pictures.setdefault(result.name, {})[name] = png
        _whole(folder / "idata.nc", lambda p: self.idata.to_netcdf(p, engine="h5netcdf"))
        write_atomically(folder / "index.html", page(self, pictures).encode())
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(folder / "check.json", text.encode())


def _png(figure: Figure) -> bytes:
    held = BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return held.getvalue()


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, then move into place, so that a half-written file is never seen."""
    part = path.with_name(f".{os.getpid()}-{path.name}")  # its suffix tells writers the format
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
