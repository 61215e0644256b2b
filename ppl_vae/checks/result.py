"""What every check returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from xarray import Dataset


Progress = Callable[[float], None]
"""Told, from time to time, the fraction of the work that is done."""


def silent(done: float) -> None:
    """The progress of a check that shows none."""


class NotApplicable(ValueError):
    """A check has nothing to say of this model, guide or data; the message says why."""


class Picture(NamedTuple):
    """A figure of a check.

    Attributes:
        draw: makes it, from the result that it belongs to.
        caption: one sentence, for people: what is to be seen, and what to try if it looks wrong.
    """

    draw: Callable[[CheckResult], Figure]
    caption: str


@dataclass(frozen=True, eq=False)
class CheckResult:
    """The outcome of one check of a fitted model.

    Attributes:
        name: what the check is called in reports and file names.
        verdict: "fail" where the check found a fault; "measured" where it only measures, since no
            value of its figures is a fault by itself.
        error_rate: the probability that the check fails a pair without a fault is at most this,
            over all of its statistics together (family-wise); 0 where chance plays no part.
        p: the p-value of the whole check, corrected for its number of statistics: the smallest
            level at which it fails; None where nothing is tested.
        statistics: the table of figures, one record a row, all with the same keys.
        meaning: what the outcome means and what to try, for people.
        settings: what the figures were computed with: seed, split, rows.
        groups: what the check adds to the DataTree, by group name.
        pictures: by name; the first is the check's own, and has its name.
    """

    name: str
    verdict: Literal["pass", "fail", "measured"]
    error_rate: float
    p: float | None
    statistics: tuple[Mapping[str, Any], ...]
    meaning: str
    settings: Mapping[str, Any]
    groups: Mapping[str, Dataset] = field(repr=False)
    pictures: Mapping[str, Picture] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether no fault was found."""
        return self.verdict != "fail"

    def plot(self, picture: str | None = None) -> Figure:
        """A picture of this result; the check's own, if no other is asked for."""
        return self.pictures[self.name if picture is None else picture].draw(self)

    def to_json(self) -> dict[str, Any]:
        """All but the draws, in JSON types; a number that is not finite becomes None."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "error_rate": self.error_rate,
            "p": jsonable(self.p),
            "meaning": self.meaning,
            "settings": jsonable(self.settings),
            "statistics": jsonable(self.statistics),
        }


def jsonable(value: Any) -> Any:
    """In JSON types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
