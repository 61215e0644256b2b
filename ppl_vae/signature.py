"""The arguments of a step as a recorded graph sees them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Signature:
    """Arguments apart by kind: tensors, numbers that may vary, and all else, which is fixed.

    Attributes:
        tensors, floats: in the order in which they stand.
        key: equal for arguments that one recorded graph serves: shapes, dtypes and devices of
            tensors, places of floats, and the rest by value (by identity where it has no hash).
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._leaves: list[Any] = [*args, *kwargs.values()]
        self._spec: Any = (len(args), *kwargs)
        if any(isinstance(leaf, list | tuple | dict) for leaf in self._leaves):
            self._leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.floats = [leaf for leaf in self._leaves if isinstance(leaf, float)]
        self.key = (self._spec, *map(_kind, self._leaves))

    def arguments(self, *given: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with the given tensors in the places of the own.

        Args:
            given: as many as there are tensors, or tensors ``()`` for the floats besides.
        """
        tensors = iter(given[: len(self.tensors)])
        floats = iter(given[len(self.tensors) :] or self.floats)
        filled = [
            next(tensors if isinstance(leaf, Tensor) else floats)
            if isinstance(leaf, Tensor | float)
            else leaf
            for leaf in self._leaves
        ]
        if isinstance(self._spec, pytree.TreeSpec):
            return pytree.tree_unflatten(filled, self._spec)
        count, *names = self._spec
        return tuple(filled[:count]), dict(zip(names, filled[count:], strict=True))


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, float):
        return float
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), id(leaf)
    return type(leaf), leaf
