"""What a recorded step takes for granted of the programs, cheap to look over before each call.

A recorded graph reads tensors by reference, so training goes on in it. But it cannot notice that a
module was put into evaluation mode, that an attribute that is a number was changed, or that a
tensor was replaced by another one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, type(None))
_ABSENT = object()


class Assumptions:
    """Values that programs reach by themselves: numbers, texts, flags, modules' tensors.

    Found in modules (their attributes, parameters and buffers, of all submodules), in functions
    (free variables, and the globals that they name), in methods, partial functions and Pyro's
    handlers. What stands deeper, in lists or in objects of other kinds, is not seen.

    Attributes:
        modules: all that were found, submodules too.
    """

    def __init__(self, programs: Iterable[Any]) -> None:
        self.modules: list[nn.Module] = []
        self._seen: set[int] = set()
        self._plain: list[tuple[str, Mapping[str, Any], str, Any]] = []
        self._tensors: list[tuple[str, Mapping[str, Any], str, Tensor, bool]] = []
        self._cells: list[tuple[str, types.CellType, Any]] = []
        for program in programs:
            self._add(getattr(program, "__name__", type(program).__name__), program)

    def changed(self) -> str | None:
        """The name of a value that is no longer what it was; None if all are."""
        for name, mapping, key, value in self._plain:
            now = mapping.get(key, _ABSENT)
            if now is not value and now != value:
                return name
        for name, mapping, key, tensor, trained in self._tensors:
            if mapping.get(key) is not tensor or tensor.requires_grad is not trained:
                return name
        for name, cell, value in self._cells:
            now = cell.cell_contents
            if now is not value and not (isinstance(value, _PLAIN) and now == value):
                return name
        return None

    def hold(self, name: str, tensors: Mapping[str, Tensor | None]) -> None:
        """Assume that a dict goes on holding the tensors that it holds."""
        for key, tensor in tensors.items():
            if tensor is not None:
                self._tensors.append((f"{name}.{key}", tensors, key, tensor, tensor.requires_grad))

    def _add(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                if id(module) in self._seen and module is not value:
                    continue
                self._seen.add(id(module))
                self.modules.append(module)
                full = f"{name}.{path}" if path else name
                self._add_attributes(full, vars(module))
                self.hold(full, module._parameters)
                self.hold(full, module._buffers)
        elif isinstance(value, types.FunctionType):
            self._add_function(name, value)
        elif isinstance(value, types.MethodType):
            self._add(name, value.__self__)
            self._add(name, value.__func__)
        elif isinstance(value, functools.partial):
            self._add(name, value.func)
            for part in (*value.args, *value.keywords.values()):
                self._add(name, part)
        elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
            self._add_attributes(name, vars(value))
            for key, part in vars(value).items():
                if isinstance(part, nn.Module | types.FunctionType | functools.partial):
                    self._add(f"{name}.{key}", part)

    def _add_attributes(self, name: str, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            if isinstance(value, _PLAIN):
                self._plain.append((f"{name}.{key}", attributes, key, value))
            elif isinstance(value, Tensor):
                self._tensors.append((f"{name}.{key}", attributes, key, value, value.requires_grad))

    def _add_function(self, name: str, function: types.FunctionType) -> None:
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._cells.append((variable, cell, value))
            self._add(variable, value)
        names = [n for n in function.__code__.co_names if n in function.__globals__]
        used = {n: function.__globals__[n] for n in names}
        for variable, value in used.items():
            if isinstance(value, _PLAIN):
                self._plain.append((variable, function.__globals__, variable, value))
            elif isinstance(value, Tensor):
                trained = value.requires_grad
                self._tensors.append((variable, function.__globals__, variable, value, trained))
            elif isinstance(value, nn.Module):
                self._add(variable, value)
        if wrapped := getattr(function, "__wrapped__", None):
            self._add(name, wrapped)


@dataclass(frozen=True)
class Buffer:
    """A buffer of a module: the tensor, and the dict that holds it under a name."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor


def buffers(*programs: Callable[..., Any]) -> list[Buffer]:
    """The buffers of the modules that programs are, or use."""
    return [
        Buffer(module._buffers, name, tensor)
        for module in Assumptions(programs).modules
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
