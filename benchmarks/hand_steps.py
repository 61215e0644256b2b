"""Contenders that step on a loss written by hand: eager, compiled, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.by_hand import ByHand
from benchmarks.contender import LEARNING_RATE, Absent, Contender, Task, loader

Step = Callable[[Tensor], Tensor]


def eager(task: Task) -> Contender:
    """The loss, ``backward`` and the fused Adam."""
    model = ByHand(task.size.program, task.nets())
    adam = _fused_adam(model)
    return _contender(task, model, adam, _step(model, adam))


def compiled(task: Task) -> Contender:
    """As `eager`, with the loss under ``torch.compile``."""
    model = ByHand(task.size.program, task.nets())
    adam = _fused_adam(model)
    return _contender(task, model, adam, _step(torch.compile(model), adam))


def compiled_with_optimizer(task: Task) -> Contender:
    """As `compiled`, with Adam under ``torch.compile`` too, instead of the fused one."""
    model = ByHand(task.size.program, task.nets())
    # As a tensor, since a number would be compiled in.
    adam = torch.optim.Adam(model.parameters(), torch.tensor(LEARNING_RATE))
    step = _step(torch.compile(model), adam, torch.compile(adam.step))
    return _contender(task, model, adam, step)


def compiled_gradient(task: Task) -> Contender:
    """Loss and gradients as one compiled function, so that no autograd is left; fused Adam."""
    model = ByHand(task.size.program, task.nets())
    adam = _fused_adam(model)
    weights: dict[str, Tensor] = dict(model.named_parameters())

    def objective(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(model, weights, (x,))

    gradients = torch.compile(torch.func.grad(objective, has_aux=True))

    def step(x: Tensor) -> Tensor:
        found, loss = gradients(weights, x)
        for name, weight in weights.items():
            weight.grad = found[name]
        adam.step()
        return loss

    return _contender(task, model, adam, step)


def cuda_graph(task: Task) -> Contender:
    """The whole eager step, fused Adam included, captured as a CUDA graph and replayed."""
    if task.device.type != "cuda":
        raise Absent("CUDA graphs need a CUDA device")
    model = ByHand(task.size.program, task.nets())
    x = task.batches[0].clone()
    adam = _fused_adam(model, capturable=True)
    step = _step(model, adam)
    # Libraries and optimizer state are set up outside the graph, on a stream of their own:
    # see "CUDA Graphs" in PyTorch's notes on CUDA semantics.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x)

    def replay(batch: Tensor) -> Tensor:
        x.copy_(batch)
        graph.replay()
        return loss

    contender = _contender(task, model, adam, replay)
    contender.load(task.weights)  # setting up has taken steps
    return contender


def _fused_adam(model: ByHand, *, capturable: bool = False) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True, capturable=capturable)


def _step(
    loss_of: Callable[[Tensor], tuple[Tensor, Tensor]],
    adam: torch.optim.Adam,
    update: Callable[[], object] | None = None,
) -> Step:
    update = update or adam.step

    def step(x: Tensor) -> Tensor:
        adam.zero_grad()
        objective, loss = loss_of(x)
        objective.backward()
        update()
        return loss.detach()

    return step


def _contender(task: Task, model: ByHand, adam: torch.optim.Adam, step: Step) -> Contender:
    return Contender(
        step=step,
        load=loader(model.nets, [adam]),
        batches=task.batches,
        read=lambda loss: loss.item() / task.size.batch,
    )
