"""Steps on trial: taken to time or to record them, and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from torch import Tensor

from ppl_vae.assumptions import buffers
from ppl_vae.graphs import Snapshot
from ppl_vae.model import baseline_averages

if TYPE_CHECKING:
    from ppl_vae.svi import SVI


@contextmanager
def trial(svi: SVI) -> Iterator[None]:
    """Take back the steps inside: parameters, moments, buffers, running figures, random state.

    The programs' parameters exist already. Nothing is reduced: other workers need not take part.
    Moments and averages that the steps make are left, but at 0, where they start.
    """
    groups = [group for optimizer in _optimizers(svi) for group in optimizer.param_groups]
    made, averages = _made_by_steps(svi), _averages(svi)
    held = buffers(svi.model, svi.guide, cast(Any, svi.loss))
    changing: list[Any] = [parameter for group in groups for parameter in group["params"]]
    changing += [*made, *(slot.tensor for slot in held), *vars(svi.loss).values()]
    before = Snapshot([value for value in changing if isinstance(value, Tensor)])
    begun, reduce, svi.reduce = svi.begun, svi.reduce, None
    try:
        yield
    finally:
        svi.begun, svi.reduce = begun, reduce
        for slot in held:
            slot.holder[slot.name] = slot.tensor
        if averages:
            _bind_averages(svi, averages)
        before.restore()
        known = set(map(id, made))
        for tensor in _made_by_steps(svi):
            if id(tensor) not in known:
                tensor.detach().zero_()


def _made_by_steps(svi: SVI) -> list[Tensor]:
    states = [state for optimizer in _optimizers(svi) for state in optimizer.state.values()]
    slots = [slot for state in states for slot in state.values() if isinstance(slot, Tensor)]
    return [*slots, *_averages(svi).values()]


def _averages(svi: SVI) -> dict[str, Tensor]:
    """Decaying averages of baselines: the SVI's own, if its programs are modules, else Pyro's."""
    return dict(svi.averages) or baseline_averages()


def _bind_averages(svi: SVI, averages: dict[str, Tensor]) -> None:
    store: dict[str, Tensor] = pyro.get_param_store()._params
    (svi.averages if svi.averages else store).update(averages)


def _optimizers(svi: SVI) -> list[Any]:
    if isinstance(svi.optim, torch.optim.Optimizer):
        return [svi.optim]
    return list(svi.optim.optim_objs.values())
