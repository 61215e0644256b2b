"""Codes: what a guide makes of each row, as one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_vae.centers import posterior_centers
from ppl_vae.draws import rows_at_once
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import read_sites


def posterior_codes(
    model: GenerativeModel, guide: torch.nn.Module, columns: Mapping[str, Tensor]
) -> Tensor:
    """Posterior centers of all local latents, flattened and joined: ``(rows, Z)``, on the CPU.

    Latents stand in the order in which the guide draws them, then those that the model enumerates.

    Args:
        columns: what the model observes, ``(rows, event)`` by site name.

    Raises:
        ValueError: a model without local latents; a site in a plate besides that of the rows.
    """
    rows = len(next(iter(columns.values())))
    sites = read_sites(model, **{name: column[:2] for name, column in columns.items()})
    step = rows_at_once(sum(column[0].numel() for column in columns.values()))
    codes: list[Tensor] = []
    for start in range(0, rows, step):
        part = {name: column[start : start + step] for name, column in columns.items()}
        centers = posterior_centers(model, guide, part)
        local = [value.flatten(1) for name, value in centers.items() if sites[name].local]
        if not local:
            raise ValueError(f"{type(model).__name__} has no local latent: its rows have no codes")
        codes.append(torch.cat([value.double() for value in local], 1).cpu())
    return torch.cat(codes)
