"""How batches reach a step: gathered inside it from data on its device, or streamed there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.augmentation import Augmentation
from ppl_vae.data import Rows
from ppl_vae.model import GenerativeModel

Feed = dict[str, Any]


class _Rows:
    """Makes rows, as they are stored, into the programs' arguments.

    Args:
        model: says which columns it observes.
        rows: of the training split.
        device, dtype: of the model.
        labeled: how many rows of a batch have labels, the first ones; None: all.
        augment: changes `x`, as images of ``image_shape``.
    """

    def __init__(
        self,
        model: GenerativeModel,
        rows: Rows,
        device: torch.device,
        dtype: torch.dtype,
        labeled: int | None = None,
        augment: Augmentation | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self._model, self._rows = model, self._placed(rows, device)
        self._device, self._dtype = device, dtype
        self._labeled, known = labeled, rows.labeled
        self._sizes = {"total": len(rows)}
        if labeled is not None and known is not None:
            self._sizes["labeled"] = len(known)
        self._augment, self._image_shape = augment, image_shape
        self._share = torch.zeros((), device=device)  # in a tensor, which a recorded step follows

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start (fractions count)."""
        if self._augment is not None:
            self._share.fill_(self._augment.at(epoch))

    def _placed(self, rows: Rows, device: torch.device) -> Rows:
        """The rows, where they are to lie."""
        return rows

    def _arguments(self, batch: dict[str, Tensor]) -> Feed:
        columns = self._model.observed(batch)
        if self._augment is not None and self._image_shape is not None:
            x = columns["x"]
            images = self._augment(x.reshape(len(x), *self._image_shape), self._share)
            columns["x"] = images.reshape(x.shape)
        if self._labeled is not None:
            columns["y"] = columns["y"][: self._labeled]
        return {**columns, **self._sizes}


class Resident(_Rows):
    """Rows that lie on the device: a batch is their numbers, gathered and binarized in the step."""

    def _placed(self, rows: Rows, device: torch.device) -> Rows:
        return rows.to(device)

    def batches(self, numbers: Sequence[Tensor]) -> Iterator[Tensor]:
        """What a step takes, for each batch's row numbers."""
        if self._device.type == "cpu" or not numbers:
            yield from numbers
            return
        sizes = [len(part) for part in numbers]
        # One transfer an epoch.
        yield from torch.cat(list(numbers)).to(self._device).split(sizes)

    def __call__(self, numbers: Tensor) -> Feed:
        """The programs' arguments; inside the step."""
        return self._arguments(self._rows.batch(numbers, self._device, self._dtype))


class Streamed(_Rows):
    """Rows that the device has no room for: gathered on the host, a batch ahead of the step.

    On CUDA, batches travel as they are stored, bytes for grey images, from pinned memory and on a
    stream of their own, and become floats, or bits, in the step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self._device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, numbers: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        """What a step takes, for each batch's row numbers."""
        ahead = None
        for part in numbers:
            behind, ahead = ahead, self._send(part)
            if behind is not None:
                yield self._arrived(behind)
        if ahead is not None:
            yield self._arrived(ahead)

    def __call__(self, gathered: dict[str, Tensor]) -> Feed:
        """The programs' arguments; inside the step."""
        return self._arguments(self._rows.ready(gathered, self._device, self._dtype))

    def _send(self, numbers: Tensor) -> dict[str, Tensor]:
        gathered = self._rows.gather(numbers)
        if self._stream is None:
            return gathered
        pinned = {name: value.pin_memory() for name, value in gathered.items()}
        with torch.cuda.stream(self._stream):
            return {k: v.to(self._device, non_blocking=True) for k, v in pinned.items()}

    def _arrived(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in batch.values():
                value.record_stream(current)  # its memory is not reused before the step has run
        return batch


ROOM = 0.5
"""Share of the device's free memory that data may take."""


def feed_for(
    model: GenerativeModel,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
    labeled: int | None = None,
    **augmentation: Any,
) -> Resident | Streamed:
    """The feed for training rows: resident where they fit the device's memory."""
    if device.type == "cuda":
        size = sum(value.numel() * value.element_size() for value in rows.stored.values())
        if size > ROOM * torch.cuda.mem_get_info(device)[0]:
            return Streamed(model, rows, device, dtype, labeled, **augmentation)
    return Resident(model, rows, device, dtype, labeled, **augmentation)
