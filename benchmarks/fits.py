"""Fits of a recipe over epochs, by ``ppl_vae.fit`` and by ``pyro.infer.SVI``, step for step alike.

Pyro's loop is written as in its tutorials. Both begin with the same weights, take the same batches
and draw the same noise, so they come to the same weights but for rounding; and but for a last batch
that is smaller, where there is one, since Pyro's loss is a sum over the batch.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyro
import pyro.infer
import pyro.optim
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from benchmarks import record
from benchmarks.agreement import Disagreement
from benchmarks.looks import Watch
from ppl_vae.averaging import WeightAverage
from ppl_vae.batches import Shuffled
from ppl_vae.evaluation import mean_elbo
from ppl_vae.fitting import fit
from ppl_vae.objectives import LinearWarmup
from ppl_vae.recipes import Experiment
from ppl_vae.sites import aside
from ppl_vae.svi import SVI, parameters
from ppl_vae.training import Training

ELBOS = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}

SHARED = ("epochs", "batch_size", "learning_rate", "warmup", "schedule")
"""Arguments of ``fit`` that Pyro's loop has too."""

LEFT_OUT = ("patience", "precision")
"""Arguments that a recipe may have and nobody is given: all run as many epochs."""

Settings = Mapping[str, Any]


def settings_of(made: Experiment, chosen: Settings) -> dict[str, Any]:
    """The recipe's settings of the fit, but for what is chosen; None stands for the recipe's.

    Raises:
        ValueError: the recipe has something that is not written in Pyro's loop.
    """
    defaults = inspect.signature(fit).parameters
    own = {name: value for name, value in made.fit.items() if name not in LEFT_OUT}
    strange = [f"{name}={value!r}" for name, value in own.items() if name not in SHARED]
    strange += [name for name in ("before", "begin") if getattr(made, name) is not None]
    if strange:
        raise ValueError(
            f"the recipe has {strange[0]}, which is not written in Pyro's loop here; take a recipe "
            f"whose fit has {', '.join(SHARED)} alone"
        )
    if "validation" not in made.data.splits:
        raise ValueError(f"{made.data.name} has no validation split, at which to look")
    made_of = {name: defaults[name].default for name in SHARED} | own
    made_of |= {name: value for name, value in chosen.items() if value is not None}
    if isinstance(made_of["warmup"], int | float):
        made_of["warmup"] = LinearWarmup(made_of["warmup"])
    return made_of


def schedule_of(settings: Settings) -> Callable[[torch.optim.Optimizer], LRScheduler] | None:
    """The learning rates, a step an epoch, as a function of the optimizer; None: constant.

    Raises:
        ValueError: the schedule looks at the validation ELBO, as "plateau" does.
    """
    schedule, epochs = settings["schedule"], settings["epochs"]
    if schedule == "cosine":
        return lambda optimizer: CosineAnnealingLR(optimizer, epochs)
    if schedule in (None, "none"):
        return None
    if not callable(schedule):
        raise ValueError(f"schedule={schedule!r}: expected cosine, none, or a recipe's function")
    return schedule


class _Watched(LRScheduler):
    """The hook into ``fit``: it steps its schedule at the end of each epoch, after the validation
    ELBO, and that is the moment to stop the clock and to look. So ``fit`` runs once and as it is;
    fitting in stages would load, and compile, at each."""

    def __init__(
        self, schedule: LRScheduler | None, watch: Watch, average: WeightAverage | None
    ) -> None:
        # Not the parent's, which would take over the optimizer that ``schedule`` has.
        self.schedule, self.watch, self.average = schedule, watch, average

    def step(self, epoch: int | None = None) -> None:
        if self.schedule is not None:
            self.schedule.step()
        if self.average is None:
            self.watch.end_epoch()
            return
        # A copy of what ``fit`` averages for itself, whose cost counts twice.
        self.average.add()
        with self.average.in_place():
            self.watch.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.schedule is None else self.schedule.state_dict()


def ours(
    made: Experiment,
    settings: Settings,
    elbo: str,
    watch: Watch,
    *,
    precision: str = "32-true",
    average: int | None = None,
) -> dict[str, float]:
    """Fit by ``ppl_vae.fit``; the seconds of compiling, and of the steps alone."""
    schedule = schedule_of(settings)
    seen = None if average is None else WeightAverage(made.model, made.guide, average)

    def watched(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return _Watched(None if schedule is None else schedule(optimizer), watch, seen)

    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(
            made.model,
            made.guide,
            made.data,
            **{**settings, "schedule": watched},
            objective=ELBOS[elbo](),
            seed=record.SEED,
            precision=precision,
            average=average,
            device="cpu",
            out=Path(folder) / "run",  # its record says how long compiling took
            checkpoint_seconds=math.inf,  # Pyro's loop saves nothing either
            progress=False,
        )
        assert fitted.run is not None
        return {
            "compile_seconds": fitted.run.record["compile_seconds"],
            "step_seconds": fitted.history[-1]["seconds"],
        }


class Annealed(Messenger):
    """``poutine.scale`` of the latent sites alone: ``weight`` is that of the KL."""

    weight = 1.0

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["scale"] = msg["scale"] * self.weight


def pyro_svi(made: Experiment, settings: Settings, elbo: str) -> tuple[Any, Annealed, Any]:
    """Pyro's SVI, what weighs its KL, and its learning rates, None where they are constant."""
    annealed = Annealed()
    # Its loss is a sum over the batch, that of ``fit`` a mean; eps makes Adam's steps the same.
    adam = {"lr": settings["learning_rate"], "eps": 1e-8 * settings["batch_size"]}
    schedule = schedule_of(settings)
    rates = None
    if schedule is not None:
        given = {"optimizer": torch.optim.Adam, "optim_args": adam}
        rates = pyro.optim.PyroLRScheduler(schedule, given)
    optim = cast(Any, pyro.optim).Adam(adam) if rates is None else rates
    svi = pyro.infer.SVI(annealed(made.model), annealed(made.guide), optim, ELBOS[elbo]())
    return svi, annealed, rates


@contextmanager
def own_store() -> Iterator[dict[str, Tensor]]:
    """A parameter store for a contender, which Pyro matches by name; gives what it comes to
    hold."""
    store: Any = {"params": {}, "constraints": {}}
    with pyro.get_param_store().scope(store):
        yield cast(Any, pyro.get_param_store())._params


def by_pyro(
    made: Experiment, settings: Settings, elbo: str, watch: Watch, *, validated: bool = True
) -> dict[str, float]:
    """Fit by ``pyro.infer.SVI``; the seconds of the steps alone.

    Args:
        validated: Pyro's validation of distributions, which is on as it comes.
    """
    rows, validation = made.data.split("train"), made.data.split("validation")
    order = Shuffled(len(rows), min(settings["batch_size"], len(rows)), record.SEED)
    svi, annealed, rates = pyro_svi(made, settings, elbo)
    step_seconds = 0.0
    with aside(), own_store(), pyro.validation_enabled(validated):
        torch.manual_seed(record.SEED)
        for epoch in range(settings["epochs"]):
            started = time.perf_counter()
            for i, numbers in enumerate(order.order(epoch)):
                annealed.weight = settings["warmup"](epoch + i / len(order))
                svi.step(**made.model.observed(rows.batch(numbers)))
            step_seconds += time.perf_counter() - started
            mean_elbo(made.model, made.guide, validation, seed=record.SEED)
            if rates is not None:
                rates.step()
            watch.end_epoch()
    return {"compile_seconds": 0.0, "step_seconds": step_seconds}


def check(made: Experiment, settings: Settings, elbo: str, *, weight: float = 0.3) -> None:
    """Hold Pyro's weighted loss against ours, of one batch, by the same draws.

    Raises:
        Disagreement: they differ by more than a ten-thousandth.
        ValueError: the model observes withheld labels; or Pyro's store, which matches parameters
            by name, would not train each parameter.
    """
    rows = made.data.split("train")
    if rows.labeled is not None:
        raise ValueError(
            f"{made.data.name}: labels are withheld, which is not written in Pyro's loop here"
        )
    batch = made.model.observed(rows.batch(slice(0, settings["batch_size"])))
    size = len(next(iter(batch.values())))
    held = parameters(made.model, made.guide)
    training = Training(ELBOS[elbo](), len(rows))
    training.weight = weight
    our_svi = SVI(made.model, made.guide, torch.optim.Adam(held), training, compile=False)
    svi, annealed, _ = pyro_svi(made, settings, elbo)
    annealed.weight = weight
    with aside():
        torch.manual_seed(record.SEED)
        own = float(our_svi.evaluate_loss(**batch, total=len(rows)))
        torch.manual_seed(record.SEED)
        with own_store() as store:
            theirs = svi.evaluate_loss(**batch) / size
            trained = {id(parameter) for parameter in store.values()}
    if trained != {id(parameter) for parameter in held}:
        raise ValueError(
            f"Pyro's store holds {len(trained)} of {len(held)} parameters: some share a name, so "
            "SVI would not train them all; take another recipe"
        )
    if not math.isclose(own, theirs, rel_tol=1e-4):
        raise Disagreement(f"a loss of {own} nats a row by ppl_vae, of {theirs} by Pyro")
