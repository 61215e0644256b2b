"""Directions in the space of latents: what an attribute adds, and rows with more or less of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import biject_to

from ppl_vae.centers import decode, posterior_centers
from ppl_vae.data import as_dataset
from ppl_vae.draws import observed, unobserved_sites
from ppl_vae.figures import ImageShape, cell_grid, limits_for
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import Site, check_pair, evaluating
from ppl_vae.uses.pairs import as_columns

_AT_ONCE = 1000  # rows that are encoded together


@dataclass(frozen=True, eq=False)
class Direction:
    """What an attribute adds to the latents of a row.

    Attributes:
        steps: of each local continuous site, ``(event)`` in unconstrained coordinates.
        present, absent: numbers of rows with and without the attribute.
    """

    steps: Mapping[str, Tensor]
    present: int
    absent: int


def attribute_direction(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    attribute: Tensor | int,
    *,
    split: str = "train",
) -> Direction:
    """The mean posterior center of rows with an attribute, less that of rows without it.

    Sites of bounded support are moved on the unconstrained scale, on which the difference is taken.
    What else differs between the two kinds of rows is part of the direction (White 2016,
    arXiv:1609.04468, who balances the kinds; Larsen et al. 2016, arXiv:1512.09300, take plain
    means, as here). Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        attribute: bool, one a row of the split, ``(rows,)``; or the number of a class, which rows
            with this label ``y`` have.
        split: rows to take the means over.

    Raises:
        ValueError: an attribute that is not bool or of another number of rows, that all rows have
            or none, a class where there are no labels, or a model without local continuous latents.
        PairError: the guide does not fit the model.
    """
    rows = as_dataset(data).split(split)
    mask = _mask(attribute, rows.stored.get("y"), len(rows), split)
    sums: dict[str, Tensor] = {}
    with evaluating(0, model, guide):
        for part in parts(len(rows), _AT_ONCE):
            coordinates = _Coordinates(model, guide, observed(model, rows, part))
            own = mask[part].to(next(iter(coordinates.moved.values())).device)
            for name, value in coordinates.moved.items():
                value = value.double()
                both = torch.stack([value[own].sum(0), value[~own].sum(0)])
                sums[name] = sums[name] + both if name in sums else both
    present, absent = int(mask.sum()), int((~mask).sum())
    return Direction(
        steps={name: both[0] / present - both[1] / absent for name, both in sums.items()},
        present=present,
        absent=absent,
    )


def shift(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Tensor | Mapping[str, Tensor],
    direction: Direction,
    amounts: Sequence[float],
    *,
    site: str = "x",
) -> Tensor:
    """Means of x as the posterior centers of rows move along a direction: ``(amounts, rows,
    event)``.

    Amount 0 is the reconstruction, 1 adds the attribute, -1 takes it away. Discrete sites and
    covariates stay as they are. Leaves torch's random state as it was.

    Args:
        columns: the rows by name, with covariates, ``(rows, event)`` each; a tensor alone is x.

    Raises:
        ValueError: no amounts, a direction of other sites than the model's, a likelihood without
            a mean, or columns that the model cannot take.
        PairError: the guide does not fit the model.
    """
    if not len(amounts):
        raise ValueError("shift: no amounts; expected at least one")
    with evaluating(0, model, guide):
        given = as_columns(model, columns, site)
        start = _Coordinates(model, guide, given)
        if direction.steps.keys() != start.moved.keys():
            raise ValueError(
                f"the direction is of {', '.join(direction.steps)}, but "
                f"{type(model).__name__} has {', '.join(start.moved)}: take one of this pair"
            )
        steps = {name: step.to(start.moved[name]) for name, step in direction.steps.items()}
        return torch.stack(
            [
                start.decoded({n: a * step for n, step in steps.items()}, site, given)
                for a in map(float, amounts)
            ]
        )


def analogy(
    model: GenerativeModel,
    guide: torch.nn.Module,
    a: Tensor | Mapping[str, Tensor],
    b: Tensor | Mapping[str, Tensor],
    c: Tensor | Mapping[str, Tensor],
    *,
    site: str = "x",
) -> Tensor:
    """Means of x for what is to c as b is to a, ``(rows, event)``: at ``c + b - a`` in latents.

    Row by row, in unconstrained coordinates of posterior centers (Reed et al. 2015, "Deep visual
    analogy-making", NeurIPS 28). Discrete sites and covariates are those of c. Leaves
    torch's random state as it was.

    Args:
        a, b, c: rows as in :func:`shift`, as many of each, or a single a and b for all rows of c.

    Raises:
        ValueError: numbers of rows that do not go together; and as :func:`shift`.
        PairError: the guide does not fit the model.
    """
    with evaluating(0, model, guide):
        given = [as_columns(model, rows, site) for rows in (a, b, c)]
        sizes = [len(rows[site]) for rows in given]
        if any(size not in (1, sizes[2]) for size in sizes[:2]):
            raise ValueError(
                f"analogy: {sizes[0]}, {sizes[1]} and {sizes[2]} rows; expected as many of each, "
                "or one a and one b"
            )
        of_a, of_b, of_c = (_Coordinates(model, guide, rows) for rows in given)
        steps = {name: of_b.moved[name] - of_a.moved[name] for name in of_c.moved}
        return of_c.decoded(steps, site, given[2])


def shift_figure(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Tensor | Mapping[str, Tensor],
    direction: Direction,
    amounts: Sequence[float],
    image_shape: ImageShape | None,
    *,
    site: str = "x",
    title: str = "Rows with more and less of an attribute",
) -> Figure:
    """Each row of data, then its means as it moves along a direction.

    Arguments and errors: as :func:`shift`; an ``image_shape`` as in :mod:`ppl_vae.plots`.
    """
    means = shift(model, guide, columns, direction, amounts, site=site)
    x = as_columns(model, columns, site)[site]
    return _figure(
        model,
        torch.cat([x.unsqueeze(1), means.transpose(0, 1)], 1),
        image_shape,
        columns,
        site,
        title,
        ["data", *[f"{a:+.2g}" if a else "0" for a in amounts]],
    )


def analogy_figure(
    model: GenerativeModel,
    guide: torch.nn.Module,
    a: Tensor | Mapping[str, Tensor],
    b: Tensor | Mapping[str, Tensor],
    c: Tensor | Mapping[str, Tensor],
    image_shape: ImageShape | None,
    *,
    site: str = "x",
) -> Figure:
    """Rows a, b and c, then what is to c as b is to a.

    Arguments and errors: as :func:`analogy`; an ``image_shape`` as in :mod:`ppl_vae.plots`.
    """
    means = analogy(model, guide, a, b, c, site=site)
    shown = [as_columns(model, rows, site)[site].expand_as(means) for rows in (a, b, c)]
    return _figure(
        model,
        torch.stack([*shown, means], 1),
        image_shape,
        c,
        site,
        "a is to b as c is to the last",
        ["a", "b", "c", "c + b - a"],
    )


class _Coordinates:
    """Posterior centers of rows.

    Attributes:
        moved: of the local continuous sites, in unconstrained coordinates, ``(rows, event)``.

    Raises:
        ValueError: there are none.
    """

    def __init__(
        self, model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor]
    ) -> None:
        check_pair(model, guide, **columns)
        self._model = model
        self._centers = posterior_centers(model, guide, columns)
        sites = unobserved_sites(model, columns)
        self._sites = {name: sites[name] for name in self._centers}
        self.moved = {
            name: biject_to(s.support).inv(self._centers[name]) for name, s in self._continuous()
        }
        if not self.moved:
            raise ValueError(
                f"{type(model).__name__} has no local continuous latent to move, only "
                f"{', '.join(self._centers) or 'none'}"
            )

    def decoded(
        self, steps: Mapping[str, Tensor], site: str, columns: Mapping[str, Tensor]
    ) -> Tensor:
        """Means of an observable after these steps, ``(rows, event)``."""
        latents = self._centers | {
            name: biject_to(s.support)(self.moved[name] + steps[name])
            for name, s in self._continuous()
        }
        covariates = self._model.covariates_in(columns)
        return decode(self._model, latents, site, covariates)

    def _continuous(self) -> Iterator[tuple[str, Site]]:
        return (
            (name, s) for name, s in self._sites.items() if s.local and not s.support.is_discrete
        )


def _mask(attribute: Tensor | int, y: Tensor | None, rows: int, split: str) -> Tensor:
    if isinstance(attribute, int):
        if y is None:
            raise ValueError(
                f"attribute={attribute}: {split!r} has no labels 'y'; give a bool for each row"
            )
        mask = y.cpu() == attribute
    else:
        mask = attribute.cpu()
    if mask.dtype != torch.bool or mask.shape != (rows,):
        raise ValueError(
            f"attribute is {mask.dtype} of shape {tuple(mask.shape)}; expected bool, one for each "
            f"of the {rows} rows of {split!r}"
        )
    if mask.all() or not mask.any():
        raise ValueError(
            f"{int(mask.sum())} of {rows} rows have the attribute; expected some, and some not"
        )
    return mask


def _figure(
    model: GenerativeModel,
    cells: Tensor,
    image_shape: ImageShape | None,
    columns: Tensor | Mapping[str, Tensor],
    site: str,
    title: str,
    labels: Sequence[str],
) -> Figure:
    sites = unobserved_sites(model, as_columns(model, columns, site))
    return cell_grid(
        cells,
        image_shape,
        title=title,
        column_labels=labels,
        limits=limits_for(sites[site].support, cells),
    )
