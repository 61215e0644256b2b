"""Published figures that recipes are held against, with the protocols under which they were made.

A protocol is what makes figures comparable: the data's split and bits, how the evidence is
estimated. How the authors optimized is kept beside it, as ``paper``: a recipe may get to the same
model sooner, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from ppl_vae.names import nearest
from ppl_vae.reproduction import other_protocols as other
from ppl_vae.reproduction import vamp_protocol as vamp
from ppl_vae.reproduction.figure import Group as Group
from ppl_vae.reproduction.figure import Measure as Measure
from ppl_vae.reproduction.figure import Published as Published


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


_GROUPS = (
    vamp.static_mnist,
    other.importance_weighted,
    other.doubly_reparameterized,
    other.importance_weighted_static,
    other.flows,
    other.semi_supervised,
    vamp.mnist,
    other.ladders,
    other.deep_ladders,
    vamp.caltech,
    vamp.fashion,
    other.belief_networks,
    other.wake_sleep,
    other.planar_maps,
    other.quadrants,
    vamp.omniglot,
    vamp.frey_faces,
    other.embedded,
)


def each_figure() -> Iterator[tuple[Group, Published]]:
    """Every figure, with its group."""
    return ((group, figure) for group in groups() for figure in group.figures)
