"""Training images changed at random in each batch, so that fewer details are learnt by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Augmentation(Protocol):
    """What ``fit(augment=...)`` takes: plain data, so that ``run.json`` says which one it was."""

    def at(self, epoch: float) -> float:
        """The share of changed images at a point of training, in epochs from the start."""
        ...

    def __call__(self, images: Tensor, share: Tensor) -> Tensor:
        """Images as they are trained on, anew at each call.

        It runs inside the step, which may be compiled: it draws from torch's global generator, and
        takes no decision by values.

        Args:
            images: ``(B, C, H, W)``, as the model takes them, bits drawn already.
            share: ``()``, as of ``at``, in a tensor that a compiled step follows.

        Returns:
            Images of the same shape.
        """
        ...


@dataclass(frozen=True)
class Shifts:
    """Images moved by whole pixels; what leaves the frame is lost, and zeros come in.

    For decoders that learn the training bits by heart: moved rows are new to them, and bits stay
    bits. Places where no image lies are unlearnt after ``epochs``.

    Args:
        pixels: the farthest along an axis.
        share: of the images that move along an axis, of either by itself; all distances from 1 to
            ``pixels``, and both directions, are alike.
        epochs: so many first ones have shifts; None: all.

    Raises:
        ValueError: pixels below 1, a share that is none, a negative number of epochs.
    """

    pixels: int = 1
    share: float = 0.5
    epochs: float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.pixels, int) and self.pixels >= 1):
            raise ValueError(f"{self}: expected pixels to be a whole number, at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self}: expected a share from 0 to 1")
        if self.epochs is not None and not self.epochs >= 0:
            raise ValueError(f"{self}: expected epochs of at least 0, or None")

    def at(self, epoch: float) -> float:
        """The share in an epoch, the first of which is 0.

        >>> [Shifts(epochs=2).at(epoch) for epoch in (0, 1.9, 2)]
        [0.5, 0.5, 0.0]
        """
        return self.share if self.epochs is None or epoch < self.epochs else 0.0

    def __call__(self, images: Tensor, share: Tensor) -> Tensor:
        for dim in (2, 3):
            images = self._moved(images, dim, share)
        return images

    def _moved(self, images: Tensor, dim: int, share: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, each moved along a dimension by a distance of its own."""
        rows, device = len(images), images.device
        far = torch.randint(1, self.pixels + 1, (rows,), device=device)
        sign = torch.randint(0, 2, (rows,), device=device) * 2 - 1
        moves = torch.rand(rows, device=device) < share
        size = images.shape[dim]
        source = torch.arange(size, device=device) - (far * sign * moves)[:, None]
        shape = [rows, 1, 1, 1]
        shape[dim] = size
        inside = ((source >= 0) & (source < size)).view(shape)
        taken = source.clamp(0, size - 1).view(shape).expand_as(images)
        return images.gather(dim, taken) * inside
