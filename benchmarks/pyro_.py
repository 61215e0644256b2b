"""Contenders that run the Pyro program: ours, and ``pyro.infer.SVI`` as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro
import pyro.infer
import pyro.optim
import torch

from benchmarks.contender import LEARNING_RATE, Contender, Task, loader
from benchmarks.programs import Pair, pair
from ppl_vae.svi import SVI, parameters


def ours(task: Task) -> Contender:
    return _ours(task, compile=True)


def ours_eager(task: Task) -> Contender:
    return _ours(task, compile=False)


def pyro_svi(task: Task) -> Contender:
    return _pyro(task, jit=False, validated=True)


def pyro_unvalidated(task: Task) -> Contender:
    return _pyro(task, jit=False, validated=False)


def pyro_jit(task: Task) -> Contender:
    return _pyro(task, jit=True, validated=True)


def _ours(task: Task, *, compile: bool) -> Contender:
    nets = task.nets()
    programs = _on_device(pair(task.size, nets), task)
    optim = torch.optim.Adam(parameters(programs.model, programs.guide), LEARNING_RATE, fused=True)
    svi = SVI(programs.model, programs.guide, optim, programs.elbo(), compile=compile)
    return Contender(
        step=svi.update,
        load=loader(nets, [optim]),
        batches=task.batches,
        read=lambda loss: float(loss) / task.size.batch,
    )


def _pyro(task: Task, *, jit: bool, validated: bool) -> Contender:
    nets = task.nets()
    programs = _on_device(pair(task.size, nets), task)
    elbo = programs.jit_elbo() if jit else programs.elbo()
    optim = cast(Any, pyro.optim).Adam({"lr": LEARNING_RATE})
    svi = pyro.infer.SVI(programs.model, programs.guide, optim, elbo)
    store: Any = {"params": {}, "constraints": {}}

    @contextmanager
    def active() -> Iterator[None]:
        # Pyro matches parameters by name, so contenders of one process need a store each.
        with pyro.get_param_store().scope(store), pyro.validation_enabled(validated):
            yield

    return Contender(
        step=svi.step,
        load=loader(nets, optim.optim_objs.values()),  # Pyro keeps one a parameter
        batches=task.batches,
        read=lambda loss: loss / task.size.batch,
        active=active,
    )


def _on_device(programs: Pair, task: Task) -> Pair:
    programs.model.to(task.device)  # its buffers; parameters are there already
    programs.guide.to(task.device)
    return programs
