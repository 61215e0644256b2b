"""SVI: one stochastic-gradient step on an objective, for any pair of Pyro programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor

from ppl_vae.model import own_parameters
from ppl_vae.objectives import Objective, backward
from ppl_vae.steps import Steps

Feed = Callable[..., Mapping[str, Any]]
Reduce = Callable[[Any, list[Tensor]], tuple[Any, list[Tensor]]]


class NonFiniteLoss(FloatingPointError):
    """A loss that is NaN or infinite, found before the step that it would have spoiled."""


class SVI:
    """Drop-in for ``pyro.infer.SVI``: ``step`` and ``evaluate_loss``, in the same units.

    Takes PyroModules, which run on the parameters they hold (a second model of the same class
    in one process is safe), and plain functions with ``pyro.module`` and ``pyro.param``, which
    run on Pyro's parameter store as usual.

    A step is recorded once for each shape of its arguments, with the backward pass and the
    optimizer, as a flat graph that TorchInductor compiles; from then on the programs' Python does
    not run. Random draws are those of the eager step. What the programs read besides their
    arguments (attributes that are numbers, the training mode, tensors bound to names) is looked
    over before each step, and a change leads to a new recording; Python that has other effects,
    such as drawing from ``random``, is noticed where it matters, since the recording is compared
    with an eager step; both are taken back. What cannot be recorded or compiled runs eagerly, with
    one warning that says where and why.

    Args:
        model, guide: Pyro programs with the same arguments.
        optim: a ``torch.optim.Optimizer`` over the parameters, or a ``PyroOptim``.
        loss: the objective.
        max_grad_norm: gradients longer than this are shortened to it (torch optimizers only;
            a ``PyroOptim`` has ``clip_args``).
        compile: True compiles as soon as it can, which takes seconds once; False never; "auto"
            when the time that it saves in the steps to come, as many as there have been so far, is
            expected to exceed what it costs.
        feed: makes the programs' keyword arguments from those of ``step``, inside the recorded
            step, so that data are gathered and binarized there.
        reduce: stands between gradients and optimizer of each step, outside of a recorded one:
            takes the loss and the parameters that have a gradient, may change gradients in place,
            and returns the loss and the parameters to go on with. For several workers, it adds
            theirs up.

    Attributes:
        begun: whether a step has been taken.
        averages: the decaying averages of a module's baselines, which no module holds.
        compile_seconds: what recording and compiling have cost so far.
        refused: whether a step could not be compiled, so that all run eagerly.

    Raises:
        TypeError: an optimizer of neither kind, or ``max_grad_norm`` with a ``PyroOptim``.
        ValueError: ``compile`` is none of the three.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer | PyroOptim,
        loss: Objective,
        *,
        max_grad_norm: float | None = None,
        compile: bool | Literal["auto"] = "auto",
        feed: Feed | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if not isinstance(optim, torch.optim.Optimizer | PyroOptim):
            raise TypeError(
                f"SVI: optim is {type(optim).__name__}; expected a torch.optim.Optimizer, such as "
                "torch.optim.Adam(parameters), or a pyro.optim one, such as pyro.optim.Adam({})"
            )
        if max_grad_norm is not None and isinstance(optim, PyroOptim):
            raise TypeError(
                "SVI: max_grad_norm goes with a torch optimizer; PyroOptim clips itself"
            )
        if compile not in (True, False, "auto"):
            raise ValueError(f"SVI: compile={compile!r}; expected True, False or 'auto'")
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_grad_norm = max_grad_norm
        self.compile = compile
        self.feed = feed
        self.reduce = reduce
        self.begun = False
        self.averages: dict[str, Tensor] = {}
        self._steps = Steps(self)

    @property
    def compile_seconds(self) -> float:
        return self._steps.seconds

    @property
    def refused(self) -> bool:
        return self._steps.refused

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one gradient step; arguments go to model and guide. Returns the loss.

        Raises:
            NonFiniteLoss: parameters and optimizer are then as they were before the step.
        """
        loss = as_numbers(self.update(*args, **kwargs))
        if not is_finite(loss):
            raise NonFiniteLoss(f"the loss is {loss}")
        return loss

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take one gradient step without waiting for it. Returns the loss, which a compiled step
        gives as a tensor ``()``.

        A loss that is not finite changes neither parameters nor optimizer, and raises nothing.
        """
        if self.compile is False:
            return self.eager_step(*args, **kwargs)
        return self._steps(args, kwargs)

    def prepare(
        self,
        *args: Any,
        steps: int,
        compile: bool | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> bool:
        """Settle, before training, whether steps with such arguments are compiled, and compile
        them if so, by trial steps that are taken back. Returns whether they are compiled.

        Training then leads to the same bits wherever it is interrupted and resumed.

        Args:
            args, kwargs: as those of ``step``.
            steps: how many are to come; "auto" weighs what they save.
            compile: for these steps, instead of the SVI's own.
        """
        how = self.compile if compile is None else compile
        return self.compile is not False and self._steps.prepare(args, kwargs, steps, how)

    def pays(self, *args: Any, steps: int, **kwargs: Any) -> bool:
        """Whether ``prepare`` would compile: to find out, steps are timed that are taken back."""
        return self.compile is not False and self._steps.pays(args, kwargs, steps, self.compile)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step; arguments go to model and guide."""
        with torch.no_grad(), own_parameters(self.model, self.guide):
            return self.loss.loss(self.model, self.guide, *args, **kwargs)

    def eager_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step by the programs' own Python: ``update`` without the graph."""
        with self.parameters():
            loss = self.finish(*self.gradients(*args, **kwargs))
        self.begun = True
        return loss

    def parameters(self) -> AbstractContextManager[None]:
        """Where ``gradients`` and ``apply`` are called: the programs run on their parameters."""
        return own_parameters(self.model, self.guide, averages=self.averages)

    def gradients(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The loss, and the parameters that it has put a gradient on, in a fixed order."""
        if isinstance(self.optim, torch.optim.Optimizer):
            self.optim.zero_grad()
        if self.feed is not None:
            args, kwargs = (), dict(self.feed(*args, **kwargs))
        with poutine.trace(param_only=True) as capture:
            loss = backward(self.loss, self.model, self.guide, *args, **kwargs)
        if isinstance(self.optim, torch.optim.Optimizer):
            held = [p for group in self.optim.param_groups for p in group["params"]]
        else:
            held = [_unconstrained(node) for node in capture.trace.nodes.values()]
        return loss, [p for p in dict.fromkeys(held) if p.grad is not None]

    def clip(self, used: list[Tensor]) -> None:
        """Shorten the gradients to ``max_grad_norm``."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(used, self.max_grad_norm)

    def finish(self, loss: Any, used: list[Tensor]) -> Any:
        """Let the optimizer step on the gradients if the loss is finite, and drop them.

        Returns the loss, reduced where there is a ``reduce``.
        """
        if self.reduce is not None:
            loss, used = self.reduce(loss, used)
        self.clip(used)
        if is_finite(as_numbers(loss)):
            self.optim(used) if isinstance(self.optim, PyroOptim) else self.optim.step()
        for parameter in used:
            parameter.grad = None
        return loss


def parameters(*programs: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Trainable parameters of modules, each once, in a fixed order: what an optimizer takes."""
    held = (p for program in programs for p in program.parameters() if p.requires_grad)
    return list(dict.fromkeys(held))


def as_numbers(loss: Any) -> Any:
    """A loss, or a tuple of them, as Python numbers; waits for the device."""
    if isinstance(loss, tuple):
        return tuple(map(as_numbers, loss))
    return loss.item() if isinstance(loss, Tensor) else loss


def is_finite(loss: Any) -> bool:
    """Whether a loss, or each of a tuple, is a finite number."""
    return all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,)))


def _unconstrained(node: Any) -> Tensor:
    value = node["value"]
    # pyro.param hands out a constrained view that remembers the leaf under it.
    return value.unconstrained() if hasattr(value, "unconstrained") else value
