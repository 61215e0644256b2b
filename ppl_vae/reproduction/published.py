"""Published figures that recipes are held against, with the protocols under which they were made.

A protocol is what makes figures comparable: the data's split and bits, how the evidence is
estimated. How the authors optimized is kept beside it, as ``paper``: a recipe may get to the same
model sooner, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ppl_vae.names import nearest

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


def published() -> dict[str, Published]:
    """All published figures by name, those of most worth first."""
    return {figure.name: figure for group in groups() for figure in group.figures}


def find_published(name: str) -> Published:
    """A published figure by its name.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    known = published()
    if name not in known:
        raise ValueError(
            f"there is nothing published to reproduce by the name {name!r}; {nearest(name, known)}"
        )
    return known[name]


def groups() -> tuple[Group, ...]:
    """The tables, those of most worth first."""
    return tuple(make() for make in _GROUPS)


# Tomczak & Welling 2018 (arXiv:1705.07120), section 5.
_VAMP = {
    "epochs": 2000,
    "batch_size": 100,
    "learning_rate": 5e-4,
    "warmup": 100,
    "patience": 50,
    "schedule": None,
    "precision": "32-true",
}


def _static_mnist() -> Group:
    def figure(recipe: str, value: float, **more: Any) -> Published:
        return Published(recipe, recipe, value, paper=_VAMP, **more)

    return Group(
        "Static MNIST",
        "Tomczak & Welling 2018 (arXiv:1705.07120), tables 1 and 2",
        "Larochelle's fixed bits, 50,000 / 10,000 / 10,000; early stopping by the validation rows; "
        "NLL of all test rows by 5000 importance samples.",
        [
            figure("vae-static-mnist", 88.56, seen=False),
            figure("vamp-static-mnist", 85.57),
            figure("hvae-static-mnist", 86.05, seen=False),
            figure("hvae-vamp-static-mnist", 83.19),
        ],
    )


def _embedded() -> Group:
    return Group(
        "Embedded digits",
        "none: the data come with scikit-learn, so that anyone can make these anew in minutes",
        "8x8 counts under a Binomial, 1,197 / 300 / 300; NLL of all test rows by 5000 importance "
        "samples.",
        [
            Published(f"{family}-digits", f"{family}-digits", None)
            for family in ("vae", "vamp", "hvae", "ladder", "flow", "iwae")
        ],
    )


_GROUPS: tuple[Callable[[], Group], ...] = (_static_mnist, _embedded)


def each_figure() -> Iterator[tuple[Group, Published]]:
    """Every figure, with its group."""
    return ((group, figure) for group in groups() for figure in group.figures)
