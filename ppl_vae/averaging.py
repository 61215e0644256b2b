"""Weights averaged over epochs, by which a fit is validated and with which it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "mean."
"""Of the averages, among the tensors of a checkpoint."""


class WeightAverage:
    """Running means of a pair's parameters, taken at the end of each epoch.

    Means of weights along a trajectory can generalize better than the weights at its end
    (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407). These are exponential:
    an epoch moves them by 1/window of the way to its own weights. While a quarter of the epochs is
    less than the window, it stands in its place, so that the first epochs are soon forgotten.
    Buffers, such as the statistics of a batch norm, stay those of the last step.

    Args:
        window: epochs.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, window: int) -> None:
        self.window = window
        self.epochs = 0
        self._parameters = {
            f"{role}.{name}": parameter
            for role, module in (("model", model), ("guide", guide))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        """Take in the weights as they are now."""
        self.epochs += 1
        share = 1 / min(self.window, math.ceil(self.epochs / 4))
        for name, parameter in self._parameters.items():
            if name in self._means:
                self._means[name].lerp_(parameter, share)
            else:
                self._means[name] = parameter.detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The pair has its averages meanwhile."""
        held = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.put()
        try:
            yield
        finally:
            self._copy(held)

    def put(self) -> None:
        """Give the pair its averages, where an epoch has ended."""
        self._copy(self._means)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        # In place, since compiled steps and optimizers hold the parameters.
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """As a checkpoint holds it."""
        return {PREFIX + name: mean for name, mean in self._means.items()}

    def restore(self, tensors: Mapping[str, Tensor], epochs: int) -> None:
        """Go on from a checkpoint, after so many epochs."""
        self.epochs = epochs
        for name, parameter in self._parameters.items():
            if (mean := tensors.get(PREFIX + name)) is not None:
                self._means[name] = mean.to(parameter).clone()


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the averaged weights, where it has them, in place of the
    others."""
    means = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)} | means
