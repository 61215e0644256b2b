"""A model shown to people: its story with sites, plates and shapes, in text and as a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import daft
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pyro.infer.inspect import get_model_relations

from ppl_vae.model import ROWS, GenerativeModel, own_parameters
from ppl_vae.sites import aside, read_sites, support_name


def story(model: GenerativeModel) -> str:
    """The docstring, and the sites of a toy: plates, shapes, families, supports."""
    rows = [("site", "", "plates", "event shape", "family", "support")]
    given = model.example_covariates(2)
    for name, value in given.items():
        rows.append((name, "covariate", ROWS, str(tuple(value.shape[1:])), "-", "-"))
    for site in read_sites(model, n=2, **given).values():
        kind = "observable" if site.name in model.observables else "latent"
        rows.append(
            (
                site.name,
                kind,
                ", ".join(site.plates) or "-",
                str(tuple(site.event_shape)),
                site.family,
                support_name(site.support),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return f"{type(model).__name__}: {inspect.getdoc(model)}\n\nSites of a small instance:\n{table}"


def graph(model: GenerativeModel) -> Figure:
    """A toy's graph: observed sites shaded, a plate as a box (drawn with daft).

    Covariates are no random variables, and have no node.
    """
    with own_parameters(model), aside():
        observed = model.observed(model.simulate(2, **model.example_covariates(2)))
        relations = get_model_relations(model, model_kwargs=observed)
    parents: Mapping[str, list[str]] = relations["sample_sample"]
    depth: dict[str, int] = {}
    for name, above in parents.items():  # in the order of sampling: parents come first
        depth[name] = max((depth[p] + 1 for p in above), default=0)
    placed = _positions(depth, relations["plate_sample"])
    pgm: Any = daft.PGM(node_unit=1.2, grid_unit=2.2)
    for name, (x, y) in placed.items():
        pgm.add_node(name, f"${name}$", x, y, observed=name in relations["observed"])
    for name, above in parents.items():
        for parent in above:
            pgm.add_edge(parent, name)
    for plate, inside in relations["plate_sample"].items():
        if not inside:
            continue
        xs, ys = zip(*(placed[name] for name in inside), strict=True)
        left, bottom = min(xs) - 0.5, min(ys) - 0.6
        pgm.add_plate(
            [left, bottom, max(xs) - left + 0.5, max(ys) - bottom + 0.5], label=plate, shift=-0.1
        )
    figure = pgm.render().figure
    assert isinstance(figure, Figure)
    plt.close(figure)  # daft opens it through pyplot, which would keep it, and show it again
    return figure


def _positions(
    depth: Mapping[str, int], plates: Mapping[str, list[str]]
) -> dict[str, tuple[float, float]]:
    """Parents above children; sites outside every plate to the right of those inside."""
    inside = {name for names in plates.values() for name in names}
    deepest = max(depth.values(), default=0)
    columns: dict[tuple[int, bool], int] = {}
    width = max(
        (sum(d == level and n in inside for n, d in depth.items()) for level in range(deepest + 1)),
        default=0,
    )
    placed: dict[str, tuple[float, float]] = {}
    for name, level in depth.items():
        key = (level, name in inside)
        column = columns.get(key, 0)
        columns[key] = column + 1
        # Half a step per column, so that an edge between levels never runs through a node.
        x = column + (0.0 if name in inside else width + 0.3)
        placed[name] = (1.2 * x, 1.2 * (deepest - level))
    return placed
