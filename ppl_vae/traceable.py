"""Pyro made recordable: what its objectives ask of a tensor's value, answered without looking.

Pyro reads its losses as numbers, warns of NaN and leaves out terms of probability 0. Each of
these looks at a tensor's value, which a recorded graph cannot do. For the time of a recording
they are replaced by what gives the same result for every value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro
import pyro.util as pyro_util
import torch
from pyro.infer import util as infer_util
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def traceable() -> Iterator[None]:
    """Run Pyro's objectives inside as :func:`ppl_vae.graphs.record` can record them.

    Losses come out as tensors where Pyro would return numbers. Arguments of distributions are
    not validated. A question of the user's program about a value is passed on, and refused.
    """
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(_Answers())
        # A hook of the backward pass asks too, where no function mode hears it.
        for question in ("torch_isnan", "torch_isinf"):
            stack.enter_context(mock.patch.object(pyro_util, question, return_value=False))
        dot = infer_util._fulldot
        stack.enter_context(
            mock.patch.object(infer_util, "_fulldot", lambda prob, cost: _dot(dot, prob, cost))
        )
        yield


def _dot(dot: Callable[[Tensor, Tensor], Tensor], prob: Tensor, cost: Tensor) -> Tensor:
    """The sum of prob * cost over the entries of positive probability.

    Pyro selects those entries, whose number depends on the values; the cost of the others may be
    infinite, so they must not be multiplied.
    """
    counts = prob > 0
    return dot(torch.where(counts, prob, 0.0), torch.where(counts, cost, 0.0))


class _Answers(TorchFunctionMode):
    """Answers what objectives ask of a tensor's value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item and _asker()[0].startswith("pyro.infer."):
            # A loss: a number to its reader, a tensor to the graph. A number has double precision.
            return args[0].detach().double()
        if func is Tensor.__bool__ and _asker() == (infer_util.__name__, "compute_expectation"):
            return True  # "are all probabilities positive": then nothing is selected; see _dot
        return func(*args, **(kwargs or {}))


def _asker() -> tuple[str, str]:
    """Module and name of the function that called a tensor's method."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith("torch.") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name
