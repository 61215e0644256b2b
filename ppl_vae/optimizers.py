"""An optimizer's step inside a recorded graph: torch's own update rules, without reading numbers.

What a rule reads of its settings as Python numbers would be fixed in the graph. Learning rates,
which schedules change, are therefore given to it as tensors; the others must stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import (
    SGD,
    Adadelta,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.overrides import TorchFunctionMode

RECORDABLE: tuple[type[Optimizer], ...] = (
    Adadelta,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    SGD,
)


class OptimizerStep:
    """The step of optimizers, each of which has stepped before, for a recorded graph.

    Args:
        optimizers: of classes in ``RECORDABLE``.

    Attributes:
        tensors: all that a step writes to: parameters and the optimizers' moments.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        # Loading a state makes new ones.
        self._states = [(o, o.state, o.param_groups) for o in self._optimizers]
        self._groups = [group for o in self._optimizers for group in o.param_groups]
        self._settings = [
            (group, name, value)
            for group in self._groups
            for name, value in group.items()
            if name not in ("params", "lr", "initial_lr")
        ]
        self._rates = [float(group["lr"]) for group in self._groups]
        self._rate_tensors = [
            torch.tensor(rate, dtype=group["params"][0].dtype, device=group["params"][0].device)
            for rate, group in zip(self._rates, self._groups, strict=True)
        ]
        for optimizer in self._optimizers:
            for parameter, slots in optimizer.state.items():
                # Some count steps on the host, from where a device's graph cannot read.
                if isinstance(count := slots.get("step"), Tensor):
                    slots["step"] = count.to(parameter.device)
        self._slots = [
            (o, parameter, dict(sorted(o.state[parameter].items())))
            for o in self._optimizers
            for group in o.param_groups
            for parameter in group["params"]
            if parameter in o.state
        ]
        self.tensors = [
            tensor
            for _, parameter, slots in self._slots
            for tensor in (parameter, *slots.values())
            if isinstance(tensor, Tensor)
        ]

    def __call__(self) -> None:
        """Take the step, as it is recorded."""
        compiling = mock.patch("torch.compiler.is_compiling", return_value=True)
        with self._in_graph(), compiling, _TensorFactors():
            for optimizer in self._optimizers:
                step = type(optimizer).step
                # Without the profiler's wrapping, which would be recorded too.
                cast(Any, getattr(step, "__wrapped__", step))(optimizer)

    def changed(self) -> str | None:
        """What the recorded step took for granted and no longer holds; None if all does.

        Takes over the learning rates of the moment.
        """
        for optimizer, state, groups in self._states:
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return "the optimizer's state"
        for group, name, value in self._settings:
            if group[name] is not value and group[name] != value:
                return f"the optimizer's {name}"
        for i, group in enumerate(self._groups):
            if group["lr"] != self._rates[i]:
                self._rates[i] = float(group["lr"])
                self._rate_tensors[i].fill_(self._rates[i])
        return None

    @contextmanager
    def _in_graph(self) -> Iterator[None]:
        """Settings under which torch's rules keep to tensors, for the time of a step."""
        before = [dict(group) for group in self._groups]
        wanted = {"capturable": True, "foreach": False, "fused": False}
        counts: list[tuple[Tensor, dict[str, Any]]] = []
        for optimizer, parameter, slots in self._slots:
            if "step" in slots:
                # A fused optimizer counts in single precision, too coarse for others' corrections.
                counts.append((slots["step"], optimizer.state[parameter]))
                counts[-1][1]["step"] = slots["step"].to(parameter.dtype)
        try:
            for group, rate in zip(self._groups, self._rate_tensors, strict=True):
                group |= {name: value for name, value in wanted.items() if name in group}
                group["lr"] = rate
            yield
        finally:
            for group, settings in zip(self._groups, before, strict=True):
                group.update(settings)
            for count, state in counts:
                count.copy_(state["step"])
                state["step"] = count


class _TensorFactors(TorchFunctionMode):
    """Lets a factor be a tensor where torch takes a Python number, and would read it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.add_ and isinstance(factor := kwargs.get("alpha"), Tensor):
            return args[0].add_(args[1] * factor)
        if func is Tensor.addcdiv_ and isinstance(factor := kwargs.get("value"), Tensor):
            return args[0].add_(args[1] / args[2] * factor)
        return func(*args, **kwargs)


def recordable(
    optim: Optimizer | PyroOptim, parameters: Sequence[nn.Parameter | Tensor]
) -> list[Optimizer] | None:
    """The torch optimizers whose step is that of ``optim`` for these parameters; None if it
    cannot be recorded: a class that is not known to keep to tensors, a schedule or clipping of
    Pyro's."""
    if isinstance(optim, PyroOptim):
        if any(optim.grad_clip.get(p) is not None for p in parameters):
            return None
        found = [optim.optim_objs.get(p) for p in parameters]
    else:
        found = [optim]
    if not all(type(o) in RECORDABLE for o in found):
        return None
    return cast(list[Optimizer], found)
