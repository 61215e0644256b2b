"""A step of SVI as one graph: objective, backward pass and optimizer, without their Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppl_vae.assumptions import Assumptions, buffers
from ppl_vae.graphs import Graph, Snapshot, Untraceable, record, unrecorded
from ppl_vae.optimizers import OptimizerStep, recordable
from ppl_vae.signature import Signature
from ppl_vae.traceable import traceable
from ppl_vae.trial import trial

if TYPE_CHECKING:
    from ppl_vae.svi import SVI


class RecordedStep:
    """A step of ``svi`` as a graph, for arguments of one signature.

    Making it takes two steps by way of trial, one that is recorded and one that is computed both
    ways and compared, and takes them back. An optimizer that cannot be recorded, or whose gradients
    are reduced first, steps by its own Python, on gradients that the graph gives.

    Args:
        svi: has taken a step before, so that its parameters and the optimizer's moments exist.
        varying: whether floats among the arguments come in as tensors ``()``.

    Raises:
        Untraceable: the step cannot be recorded, or comes to another result than an eager one.
    """

    def __init__(self, svi: SVI, signature: Signature, *, varying: bool) -> None:
        self._svi, self._varying, self._floats = svi, varying, signature.floats
        self._like = _example(svi, signature)
        self._optimizer: OptimizerStep | None = None
        self._reduced = svi.reduce is not None
        with trial(svi):
            with traceable():
                (loss, _), self._graph = record(
                    lambda *tensors: self._step(signature, *tensors), *self.inputs(signature)
                )
            self._losses = len(pytree.tree_leaves(loss))
            self._check(signature)
        self._assumed = Assumptions([svi.model, svi.guide, svi.loss])
        if isinstance(svi.model, torch.nn.Module) and isinstance(svi.guide, torch.nn.Module):
            self._assumed.hold("a baseline's average", svi.averages)
        else:
            self._assumed.hold("Pyro's parameter", pyro.get_param_store()._params)

    def compile(self, signature: Signature) -> None:
        """Compile the graph, before the first call.

        Raises:
            Untraceable: the compiler refused it, or there is none.
        """
        self._program = self.graph().compile(*self.inputs(signature))

    def graph(self) -> Graph:
        """The step's operations. Gradients come out only where the optimizer stands outside."""
        return self._graph if self._optimizer is None else self._graph.first(self._losses)

    def __call__(self, signature: Signature) -> Any:
        """Take a step. Returns the loss."""
        outputs = self._program(*self.inputs(signature))
        if self._optimizer is not None:
            return outputs[0] if self._losses == 1 else outputs
        loss, gradients = outputs
        for parameter, gradient in zip(self._used, gradients, strict=True):
            parameter.grad = gradient
        with self._svi.parameters():
            return self._svi.finish(loss, self._used)

    def changed(self, signature: Signature) -> str | None:
        """What the recording took for granted and is no longer so; None if all is."""
        if not self._varying and signature.floats != self._floats:
            return A_NUMBER
        if (changed := self._assumed.changed()) is not None:
            return changed
        return None if self._optimizer is None else self._optimizer.changed()

    def _step(self, signature: Signature, *tensors: Tensor) -> tuple[Any, list[Tensor | None]]:
        """What is recorded: (loss, gradients)."""
        svi = self._svi
        args, kwargs = signature.arguments(*tensors)
        with svi.parameters(), _in_place(svi):
            loss, self._used = svi.gradients(*args, **kwargs)
            loss = pytree.tree_map(lambda x: torch.as_tensor(x, device=self._like.device), loss)
            gradients = [parameter.grad for parameter in self._used]
            # A reduction stands between gradients and optimizer, and has to be outside.
            found = None if self._reduced else recordable(svi.optim, self._used)
            if found is not None:
                with unrecorded():  # or its learning rates would be constants of the graph
                    self._optimizer = OptimizerStep(found)
                svi.clip(self._used)
                _step_if_finite(self._optimizer, loss)
        for parameter in self._used:
            parameter.grad = None
        return loss, gradients

    def _check(self, signature: Signature) -> None:
        """Compare the graph with an eager step, on other draws than those of the recording."""
        before = Snapshot([*self._graph.mutated, self._like])
        loss, gradients = self._graph(*self.inputs(signature))
        before.restore()
        args, kwargs = signature.arguments(*signature.tensors)
        with self._svi.parameters():
            eager_loss, used = self._svi.gradients(*args, **kwargs)
            if self._optimizer is not None:
                self._svi.clip(used)
            pairs = zip([eager_loss, *(p.grad for p in used)], [loss, *gradients], strict=False)
            same = list(map(id, used)) == list(map(id, self._used)) and all(
                _agree(*pair) for pair in pairs
            )
        for parameter in used:
            parameter.grad = None
        if not same:
            raise Untraceable(
                "a recorded step comes to another result than the eager one, as when a program "
                "draws from Python's or numpy's random state, or counts its calls"
            )

    def inputs(self, signature: Signature) -> list[Tensor]:
        """What the graph takes."""
        if not self._varying:
            return signature.tensors
        dtype, device = self._like.dtype, self._like.device
        numbers = (torch.tensor(x, dtype=dtype, device=device) for x in signature.floats)
        return [*signature.tensors, *numbers]


A_NUMBER = "a number among the arguments"


def _step_if_finite(optimizer: OptimizerStep, loss: Any) -> None:
    """An optimizer's step that is undone where the loss is not finite, without waiting for it."""
    finite = torch.stack([x.isfinite().all() for x in pytree.tree_leaves(loss)]).all()
    before = [tensor.detach().clone() for tensor in optimizer.tensors]
    optimizer()
    with torch.no_grad():
        for tensor, old in zip(optimizer.tensors, before, strict=True):
            tensor.copy_(torch.where(finite, tensor, old))


@contextmanager
def _in_place(svi: SVI) -> Iterator[None]:
    """Turns binding a buffer, or a baseline's average, anew into writing to the old one, which is
    what the graph reads at the next step."""
    before = buffers(svi.model, svi.guide)
    store: dict[str, Tensor] = pyro.get_param_store()._params
    averages = dict(store)
    yield
    with torch.no_grad():
        for slot in before:
            slot.tensor.copy_(slot.holder[slot.name])
            slot.holder[slot.name] = slot.tensor
        for name, old in averages.items():
            if store[name] is not old:
                old.copy_(store[name])
                store[name] = old


def _example(svi: SVI, signature: Signature) -> Tensor:
    """A tensor of the step's device and dtype."""
    held = (
        parameter
        for program in (svi.model, svi.guide)
        if isinstance(program, torch.nn.Module)
        for parameter in program.parameters()
    )
    store = (value for _, value in pyro.get_param_store().named_parameters())
    floats = (t for t in (*held, *signature.tensors, *store) if t.is_floating_point())
    return next(floats, torch.zeros(()))


def _agree(one: Any, other: Any) -> bool:
    """Whether two numbers, tensors or trees of them differ by rounding only."""
    if isinstance(one, tuple):
        return all(map(_agree, one, other))
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    coarser = one.dtype if one.is_floating_point() else other.dtype
    tolerance = torch.finfo(coarser).eps ** 0.5
    one, other = one.detach().double(), other.detach().double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return True  # nothing to compare; the loss is looked at by whoever asked for it
    scale = one.norm().clamp(min=1e-12)
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * scale)
