"""What a contender is: a training step of one program, from given weights, on given batches."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sizes import Size, Weights

LEARNING_RATE = 1e-3
"""Of Adam, which all contenders run with its usual moments."""


class Absent(Exception):
    """A contender that cannot run, and why."""


@dataclass(frozen=True)
class Task:
    """What each contender is given.

    Args:
        weights: where training starts.
        batches: each ``(size.batch, pixels)``, on the device; step i takes the i-th, in a cycle.
    """

    size: Size
    device: torch.device
    weights: Weights
    batches: list[Tensor]

    @classmethod
    def make(cls, size: Size, device: str = "cpu", *, batches: int = 4, seed: int = 0) -> Task:
        data = [x.to(device) for x in size.data(batches, seed)]
        return cls(size, torch.device(device), size.weights(seed), data)

    def nets(self) -> nn.ModuleDict:
        """Nets with the weights, on the device: a contender's own."""
        nets = self.size.build()
        nets.load_state_dict(self.weights)
        return nets.to(self.device)


@dataclass(frozen=True)
class Contender:
    """A training step, ready to be timed.

    Args:
        step: takes one gradient step on a batch; returns a loss, which may still be computed.
        load: starts over from these weights, optimizer included; compiled code stays.
        batches: the task's batches, as ``step`` takes them.
        read: waits for a loss and gives its nats per row.
        active: what steps run in, entered once for many steps.
    """

    step: Callable[[Any], Any]
    load: Callable[[Weights], None]
    batches: list[Any]
    read: Callable[[Any], float]
    active: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self, steps: int) -> float:
        """Take steps over the batches in turn; the last one's loss in nats per row."""
        loss = None
        with self.active():
            for i in range(steps):
                loss = self.step(self.batches[i % len(self.batches)])
            return self.read(loss)


def loader(
    nets: nn.ModuleDict, optimizers: Collection[torch.optim.Optimizer]
) -> Callable[[Weights], None]:
    """A contender's ``load`` in PyTorch: in place, since compiled code may hold on to tensors."""

    def load(weights: Weights) -> None:
        nets.load_state_dict(weights)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for held in state.values():
                    held.zero_()

    return load


CONTENDERS = {
    "ours": "benchmarks.pyro_:ours",
    "ours eager": "benchmarks.pyro_:ours_eager",
    "pyro": "benchmarks.pyro_:pyro_svi",
    "pyro unvalidated": "benchmarks.pyro_:pyro_unvalidated",
    "pyro jit": "benchmarks.pyro_:pyro_jit",
    "hand": "benchmarks.hand_steps:eager",
    "hand compiled": "benchmarks.hand_steps:compiled",
    "hand compiled+adam": "benchmarks.hand_steps:compiled_with_optimizer",
    "hand compiled grad": "benchmarks.hand_steps:compiled_gradient",
    "hand graph": "benchmarks.hand_steps:cuda_graph",
    "numpyro": "benchmarks.numpyro_:jitted",
    "pythae": "benchmarks.pythae_:trainer",
}
"""Name = where it is made: a function of a Task. A module is imported only if it is asked for."""


def make(name: str, task: Task) -> Contender:
    """Make a contender.

    Raises:
        Absent: it is not installed, or has no such program, or not on this device.
    """
    module, function = CONTENDERS[name].split(":")
    package = module.removeprefix("benchmarks.").removesuffix("_")
    if module.endswith("_") and importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    return getattr(importlib.import_module(module), function)(task)
