"""Replicas of a recorded step as one: the same operations over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.graphs import Graph, Snapshot, Untraceable, record


def vectorize(graphs: Sequence[Graph], *inputs: Tensor) -> Callable[..., Any]:
    """One compiled program that does what each of the graphs does, on its own tensors.

    The tensors that the graphs hold become slices of stacked ones: they stay the same objects, and
    the program writes to them. Those that all graphs share, such as data, stay single. Each replica
    draws noise of its own, from torch's one random state.

    Args:
        graphs: of the same step of programs that differ in their tensors' values alone.
        inputs: example inputs, stacked: ``(replicas, ...)`` each.

    Returns:
        A function of stacked inputs; its results are stacked.

    Raises:
        Untraceable: the graphs differ in more than values, or an operation has no rule to run
            over a stack.
    """
    first = graphs[0]
    if any(graph.shapes() != first.shapes() for graph in graphs):
        raise Untraceable("replicas take different operations")
    held = [_stack(tensors) for tensors in zip(*(g.captured for g in graphs), strict=True)]
    dims = [None if single else 0 for _, single in held] + [0] * len(inputs)
    stacked = [tensor for tensor, _ in held]
    zeros = torch.zeros(len(graphs), device=inputs[0].device)
    before = Snapshot([*stacked, zeros])
    # Without writes in between, which a rule over a stack may not have; they come at the end.
    example = [tensor.clone() for tensor in (*first.captured, *(given[0] for given in inputs))]
    pure = make_fx(functionalize(first.module))(*example)

    def run(*given: Tensor) -> Any:
        step = torch.vmap(_Stacked(pure).of_replica, in_dims=(0, *dims), randomness="different")
        return step(zeros, *stacked, *given)

    try:
        with torch.no_grad():
            _, graph = record(run, *inputs)
    finally:
        before.restore()
    return graph.compile(*inputs)


def _stack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """Tensors stacked, each of them then a slice of the stack; or the one that all of them are."""
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first, True
    # Another program, of another batch size, may have stacked them before, and writes there.
    shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    if _are_slices(tensors):
        return first.detach().as_strided(shape, strides, first.storage_offset()), False
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked, False


def _are_slices(tensors: tuple[Tensor, ...]) -> bool:
    """Whether tensors follow one another in one memory."""
    first = tensors[0]
    return all(
        tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + number * first.numel()
        and tensor.is_contiguous()
        for number, tensor in enumerate(tensors)
    )


_FILLS = {
    f"aten::{name}": getattr(torch.ops.aten, f"{written}_")
    for name, written in {
        "normal_functional": "normal",
        "uniform": "uniform",
        "bernoulli": "bernoulli",
        "exponential": "exponential",
        "cauchy": "cauchy",
        "geometric": "geometric",
        "log_normal": "log_normal",
    }.items()
}
"""How to draw into a tensor, for operations that give a new one filled with draws."""


class _Stacked(fx.Interpreter):
    """Runs a graph over a stack, with each replica's draws apart.

    An operation on a tensor that the replicas share, such as one of zeros to be filled with noise,
    would draw once for all of them: its tensors are first made one a replica. The first input is
    a zero of each replica's own.
    """

    def of_replica(self, zero: Tensor, *inputs: Tensor) -> Any:
        """What the graph gives, for one replica's inputs."""
        self._zero = zero
        return self.run(*inputs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.copy.default:  # has no rule over a stack
            return args[1].to(args[0].dtype).expand(args[0].shape)
        if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
            return super().call_function(target, args, kwargs)
        args = tuple(self._own(argument) for argument in args)
        fill = _FILLS.get(target._schema.name)
        if fill is None or target is torch.ops.aten.bernoulli.default:
            return super().call_function(target, args, kwargs)
        return fill(args[0].clone(), *args[1:], **kwargs)

    def _own(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return argument + self._zero.to(argument.dtype)
