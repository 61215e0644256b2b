"""The log-probabilities of a pair's sites, row by row, at latents that do not change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import paired_traces

Terms = dict[str, Tensor]
"""Log-probabilities by site: ``(rows,)`` of a local one, ``()`` of a global one."""

Coordinate = tuple[str, int]
"""A column and the number of an entry of its rows, flattened."""


@dataclass(eq=False)
class FixedLatents:
    """A pair with the latents that the guide has drawn for some rows, fixed.

    Attributes:
        model, guide: the pair.
        columns: what it is given of the rows, ``(rows, event)`` each.
        rows: their number.
        seed: of what a program draws besides its sites.
        latents: a value of every latent site of both, those included that the model enumerates.
        row_dims: the dim of the rows in the value of a local one.
        unplated: sites that were met with a dim of as many values as rows, outside of the plate.
    """

    model: GenerativeModel
    guide: torch.nn.Module
    columns: dict[str, Tensor]
    rows: int
    seed: int

    def __post_init__(self) -> None:
        model_trace, guide_trace = paired_traces(self.model, self.guide, **self.columns)
        # Of the model alone: sites that it enumerates, drawn like others here.
        nodes = dict(sample_nodes(model_trace)) | dict(sample_nodes(guide_trace))
        self.latents: dict[str, Tensor] = {}
        self.row_dims: dict[str, int] = {}
        self.unplated = set[str]()
        for name, node in nodes.items():
            if node["is_observed"] or name in self.columns:
                continue
            self.latents[name] = node["value"]
            if (dim := _row_dim(node)) is not None:
                fn = node["fn"]
                self.latents[name] = node["value"].expand(fn.shape())
                self.row_dims[name] = dim - fn.event_dim

    def chosen(self, order: Tensor) -> dict[str, Tensor]:
        """The latents of some rows, in some order."""
        return {
            name: z.index_select(self.row_dims[name], order) if name in self.row_dims else z
            for name, z in self.latents.items()
        }

    def terms(
        self,
        who: str,
        columns: Mapping[str, Tensor] | None = None,
        latents: Mapping[str, Tensor] | None = None,
        **sizes: int,
    ) -> Terms:
        """Scaled log-probabilities of a program's sites, given all latents."""
        program = {"model": self.model, "guide": self.guide}[who]
        given = dict(self.latents if latents is None else latents)
        torch.manual_seed(self.seed)
        with own_parameters(self.model, self.guide):
            trace = poutine.trace(poutine.condition(program, data=given)).get_trace(
                **(self.columns if columns is None else columns), **sizes
            )
        trace.compute_log_prob()
        terms: Terms = {}
        for name, node in sample_nodes(trace):
            log_prob, dim = node["log_prob"], _row_dim(node)
            if dim is None:
                # Rows outside of the rows' plate stay apart, for `_scale` to complain of.
                apart = log_prob.dim() > 0 and log_prob.shape[-1] == self.rows
                self.unplated |= {name} if apart else set()
                terms[name] = log_prob if apart else log_prob.sum()
            else:
                terms[name] = log_prob.movedim(dim, 0).reshape(log_prob.shape[dim], -1).sum(1)
        return terms

    def permuted(self, order: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Columns and latents of some rows."""
        return {name: column[order] for name, column in self.columns.items()}, self.chosen(order)

    def swapped(self, coordinates: Collection[Coordinate]) -> dict[str, Tensor]:
        """The columns, with some coordinates of the row before."""
        columns = dict(self.columns)
        for name in {name for name, _ in coordinates}:
            column = columns[name]
            flat = column.reshape(self.rows, -1).clone()
            at = [k for other, k in coordinates if other == name]
            flat[:, at] = flat[:, at].roll(1, 0)
            columns[name] = flat.reshape(column.shape)
        return columns

    @property
    def every_row(self) -> Tensor:
        """Row numbers ``(rows,)``, on the device of the columns."""
        return torch.arange(self.rows, device=next(iter(self.columns.values())).device)


def _row_dim(node: Mapping[str, Any]) -> int | None:
    return next((frame.dim for frame in node["cond_indep_stack"] if frame.name == ROWS), None)


def differ(a: Tensor, b: Tensor) -> float:
    """How far two tensors of terms are apart, where that is more than rounding; else 0."""
    # Equal infinities are equal; their difference is no number.
    gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf).max().item()
    finite = torch.cat([a.flatten(), b.flatten()])
    size = 1 + finite[finite.isfinite()].abs().amax().item() if finite.isfinite().any() else 1.0
    return gap if gap > torch.finfo(a.dtype).eps ** 0.45 * size else 0.0
