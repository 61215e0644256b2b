"""When SVI compiles a step, and when it takes it eagerly."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.graphs import Untraceable
from ppl_vae.recorded import A_NUMBER, RecordedStep
from ppl_vae.signature import Signature
from ppl_vae.trial import trial

if TYPE_CHECKING:
    from ppl_vae.svi import SVI

# For "auto". On 2 CPU cores, being compiled takes from 0.4 (784-400-20, batch 128) to 0.8
# (784-64-20, batch 16) of an eager step's time away; recording and compiling take some seconds,
# and more for more operations.
SAVED = 0.4
SECONDS, SECONDS_AN_OPERATION = 4.0, 0.02

TRIAL = 1.0
"""Seconds that eager steps are tried out for, to time them."""

CHANGES = 3
"""How many recordings of a signature may be lost to changes of what they took for granted."""


class Steps:
    """The steps of an SVI, each by the way that its signature has come to.

    Attributes:
        seconds: spent on recording and compiling.
        refused: whether all steps are eager, since one could not be compiled.
    """

    def __init__(self, svi: SVI) -> None:
        self._svi = svi
        self._ways: dict[Any, _Way] = {}
        self.seconds = 0.0
        self.refused = False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.refused:
            return self._svi.eager_step(*args, **kwargs)
        signature = Signature(args, kwargs)
        return self._way(signature)(signature)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int, compile: bool | str
    ) -> bool:
        """Settle how steps with such arguments are taken; whether they are compiled."""
        if self.refused:
            return False
        signature = Signature(args, kwargs)
        way = self._way(signature)
        way.prepare(signature, steps, compile)
        return way.step is not None

    def pays(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int, compile: bool | str
    ) -> bool:
        """Whether so many steps with such arguments are to be compiled."""
        signature = Signature(args, kwargs)
        return self._way(signature).pays(signature, steps, compile)

    def compiled(self, signature: Signature, *, varying: bool) -> RecordedStep | None:
        """A compiled step; None where there can be none."""
        started = time.perf_counter()
        try:
            step = RecordedStep(self._svi, signature, varying=varying)
            step.compile(signature)
            return step
        except Untraceable as error:
            self.refuse(error)
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def refuse(self, why: Exception) -> None:
        """Take steps eagerly from now on, and say why."""
        self.refused = True
        self._ways.clear()
        warnings.warn(
            f"steps run eagerly, since they cannot be compiled: {why}. Results are the same; "
            "compile=False leaves out the attempt",
            RuntimeWarning,
            stacklevel=_levels_to_caller(),
        )

    def _way(self, signature: Signature) -> _Way:
        way = self._ways.get(signature.key)
        if way is None:
            way = self._ways[signature.key] = _Way(self._svi, self)
        return way


class _Way:
    """How the steps of one signature are taken: eagerly, or by ``step``, once it is compiled."""

    def __init__(self, svi: SVI, steps: Steps) -> None:
        self._svi, self._steps = svi, steps
        self._done = self._changes = self._operations = 0
        self._seconds: list[float] = []  # of eager steps
        self._varying = self._eagerly = False
        self.step: RecordedStep | None = None

    def __call__(self, signature: Signature) -> Any:
        self._done += 1
        if self.step is not None:
            if (changed := self.step.changed(signature)) is None:
                return self.step(signature)
            self._forget(changed)
        if self._due():
            self.step = self._steps.compiled(signature, varying=self._varying)
            if self.step is not None:
                return self.step(signature)
        return self._eager(signature)

    def prepare(self, signature: Signature, steps: int, compile: bool | str) -> None:
        """Settle the way, if so many steps are to come."""
        self._eagerly = not self.pays(signature, steps, compile)
        if not self._eagerly:
            self.step = self._steps.compiled(signature, varying=False)

    def pays(self, signature: Signature, steps: int, compile: bool | str) -> bool:
        """Whether so many steps are to be compiled; by steps on trial, which make moments."""
        if compile is False:
            return False
        with trial(self._svi):
            self._eager(signature)
            started = time.perf_counter()
            while compile == "auto" and len(self._seconds) < 5:
                self._eager(signature)
                if time.perf_counter() - started > TRIAL:
                    break
        return compile is True or self._saves(steps)

    def _due(self) -> bool:
        """Whether this step is the one to compile at."""
        # Parameters and moments must exist, which a first step makes.
        if self._steps.refused or self._eagerly or (self._done == 1 and not self._svi.begun):
            return False
        return self._svi.compile is True or self._saves(self._done)

    def _saves(self, steps: int) -> bool:
        """Whether so many steps are expected to save what compiling costs."""
        if not self._seconds:
            return False
        saved = SAVED * statistics.median(self._seconds) * steps
        return saved > SECONDS + SECONDS_AN_OPERATION * self._operations

    def _eager(self, signature: Signature) -> Any:
        args, kwargs = signature.arguments(*signature.tensors)
        if self._svi.begun and not self._operations:
            with _Operations() as counter:
                loss = self._svi.eager_step(*args, **kwargs)
            self._operations = counter.count
            return loss
        started = time.perf_counter()
        loss = self._svi.eager_step(*args, **kwargs)
        if self._operations and len(self._seconds) < 100:
            self._seconds.append(time.perf_counter() - started)
        return loss

    def _forget(self, changed: str) -> None:
        """Compile anew, unless the change is one of many."""
        self.step = None
        if changed == A_NUMBER:
            self._varying = True
            return
        self._changes += 1
        if self._changes > CHANGES:
            self._steps.refuse(Untraceable(f"{changed} changes again and again"))


class _Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _levels_to_caller() -> int:
    """The stack level, for a warning, of the first caller outside of this package."""
    here, level, frame = Path(__file__).parent, 1, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == here:
        frame, level = frame.f_back, level + 1
    return level
