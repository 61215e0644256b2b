"""A published figure, and the table that it stands in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Measure = Literal["nll", "negative_elbo", "error"]
"""What is compared: the NLL by importance sampling, the negative ELBO, in nats per datum; or the
classifier's error on the test rows, in percent. The lower the better."""


@dataclass(frozen=True)
class Published:
    """A published figure, and what makes ours.

    Attributes:
        name: of the reproduction, by which it is asked for.
        recipe: that makes the model.
        value: the published figure; None where there is none.
        arguments: of the recipe.
        error: the published standard error, or deviation over runs.
        measure: see :data:`Measure`.
        samples: importance draws a test row.
        paper: how the authors optimized, as arguments of :func:`ppl_vae.fit`; None where the recipe
            does as they did.
        seen: whether the figure was read in the paper or its authors' code; else it is recalled.
        note: what else there is to know.
    """

    name: str
    recipe: str
    value: float | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None
    measure: Measure = "nll"
    samples: int = 5000
    paper: Mapping[str, Any] | None = None
    seen: bool = True
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Figures of one protocol.

    Attributes:
        title: of the table.
        source: author, year, arXiv id, and table.
        protocol: what makes the figures comparable, in a sentence or two.
        figures: in the order of the table.
        missing: why none of them can be made as yet, such as data that are not to be had.
    """

    title: str
    source: str
    protocol: str
    figures: Sequence[Published]
    missing: str = ""
