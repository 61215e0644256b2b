"""The metrics of a run: a CSV file of numbers that read back as the same numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path

from ppl_vae.atomic import write_atomically


class Metrics:
    """``metrics.csv``: one row an epoch, under a header made of the first row's keys."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append a row.

        Raises:
            ValueError: the keys are not the header's, or cannot stand in one.
            OSError: it cannot be written; the rows before it are then as they were.
        """
        lines = self._lines()
        if not lines:
            if not row or any(not re.fullmatch(r"[^\s,\"]+", key) for key in row):
                raise ValueError(f"need names without blanks, commas and quotes, not {list(row)}")
            lines = [",".join(row)]
        names = lines[0].split(",")
        if set(row) != set(names):
            raise ValueError(f"metrics.csv has the columns {names}, and this row has {list(row)}")
        self._write([*lines, ",".join(_cell(row[name]) for name in names)])

    def rows(self) -> list[dict[str, float]]:
        """All rows, without a last one that was cut short.

        Raises:
            ValueError: a line does not fit the header; says which.
        """
        lines = self._lines()
        rows = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                cells = zip(lines[0].split(","), line.split(","), strict=True)
                rows.append({name: _number(cell) for name, cell in cells})
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from error
        return rows

    def rewind(self, epoch: int) -> None:
        """Keep only the rows with ``row["epoch"] <= epoch``: a resumed run logs the rest.

        Raises:
            ValueError: the rows have no "epoch".
            OSError: the file cannot be written; it is then as it was.
        """
        lines = self._lines()
        if not lines:
            return
        if "epoch" not in lines[0].split(","):
            raise ValueError(f"{self.path} has no column 'epoch' to rewind by")
        rows = zip(lines[1:], self.rows(), strict=True)
        self._write([lines[0], *(line for line, row in rows if row["epoch"] <= epoch)])

    def _lines(self) -> list[str]:
        """The complete lines, the header first."""
        raw = self.path.read_bytes() if self.path.exists() else b""
        return raw[: raw.rfind(b"\n") + 1].decode().splitlines()

    def _write(self, lines: list[str]) -> None:
        # All of it even for one more row: files are small, and no line is ever seen in part.
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())


def _cell(value: float | int) -> str:
    # By `float`, since numpy's own floats have a repr that is no number.
    return repr(int(value) if isinstance(value, Integral) else float(value))


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
