"""SVI: one stochastic-gradient step on an objective, for any pair of Pyro programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from ppl_vae.model import own_parameters
from ppl_vae.objectives import Objective, backward


class NonFiniteLoss(FloatingPointError):
    """A loss that is NaN or infinite, found before the step that it would have spoiled."""


class SVI:
    """Drop-in for ``pyro.infer.SVI``: ``step`` and ``evaluate_loss``, in the same units.

    Takes PyroModules, which run on the parameters they hold (a second model of the same class
    in one process is safe), and plain functions with ``pyro.module`` and ``pyro.param``, which
    run on Pyro's parameter store as usual.

    Args:
        model, guide: Pyro programs with the same arguments.
        optim: a ``torch.optim.Optimizer`` over the parameters, or a ``PyroOptim``.
        loss: the objective.
        max_grad_norm: gradients longer than this are shortened to it (torch optimizers only;
            a ``PyroOptim`` has ``clip_args``).

    Raises:
        TypeError: an optimizer of neither kind, or ``max_grad_norm`` with a ``PyroOptim``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer | PyroOptim,
        loss: Objective,
        *,
        max_grad_norm: float | None = None,
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
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_grad_norm = max_grad_norm

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one gradient step; arguments go to model and guide. Returns the loss.

        Raises:
            NonFiniteLoss: parameters and optimizer are then as they were before the step.
        """
        with own_parameters(self.model, self.guide):
            if isinstance(self.optim, PyroOptim):
                with poutine.trace(param_only=True) as capture:
                    loss = backward(self.loss, self.model, self.guide, *args, **kwargs)
                used = {_unconstrained(node) for node in capture.trace.nodes.values()}
                if _is_finite(loss):
                    self.optim(list(used))
                zero_grads(used)
            else:
                self.optim.zero_grad()
                loss = backward(self.loss, self.model, self.guide, *args, **kwargs)
                if self.max_grad_norm is not None:
                    held = [p for group in self.optim.param_groups for p in group["params"]]
                    torch.nn.utils.clip_grad_norm_(held, self.max_grad_norm)
                if _is_finite(loss):
                    self.optim.step()
        if not _is_finite(loss):
            raise NonFiniteLoss(f"the loss is {loss}")
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step; arguments go to model and guide."""
        with torch.no_grad(), own_parameters(self.model, self.guide):
            return self.loss.loss(self.model, self.guide, *args, **kwargs)


def parameters(*programs: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Trainable parameters of modules, each once, in a fixed order: what an optimizer takes."""
    held = (p for program in programs for p in program.parameters() if p.requires_grad)
    return list(dict.fromkeys(held))


def _is_finite(loss: Any) -> bool:
    return all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,)))


def _unconstrained(node: Any) -> Tensor:
    value = node["value"]
    # pyro.param hands out a constrained view that remembers the leaf under it.
    return value.unconstrained() if hasattr(value, "unconstrained") else value
