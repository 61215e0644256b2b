"""Seconds of training to an NLL: ``python -m benchmarks.time_to_target [--targets 95,92,90]``.

``ppl_vae.fit`` beside ``pyro.infer.SVI`` as Pyro's tutorials write it, from the same start, on the
same batches, by the same estimator of the ELBO, with the same warm-up and learning rates. Both
draw the same noise, so they differ by rounding and by time; also by a last batch that is smaller,
where there is one, since Pyro's loss is a sum over the batch. Before a fit the losses are found
equal.

On the clock: all that ``fit`` does, compiling and the validation ELBO at the end of each epoch
included; of Pyro, its steps, and that same validation ELBO by the same function. Off it: the looks
at the NLL, which is that of every tenth validation row. Test rows are for the end.

One contender runs after the other, so nothing else should run meanwhile; ``load`` tells.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from ppl_vae.batches import Shuffled
from ppl_vae.begin import described
from ppl_vae.data import Dataset
from ppl_vae.evaluation import evaluate, mean_elbo
from ppl_vae.fitting import fit
from ppl_vae.objectives import LinearWarmup
from ppl_vae.recipes import Experiment, build
from ppl_vae.sites import aside
from ppl_vae.svi import SVI, parameters
from ppl_vae.training import Training

ELBOS = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}

SHARED = ("epochs", "batch_size", "learning_rate", "warmup", "schedule")
"""Arguments of ``fit`` that Pyro's loop has too."""

LEFT_OUT = ("patience", "precision")
"""Arguments that a recipe may have and nobody is given: all run as many epochs."""

THIN = 10
"""Every so many rows are looked at."""

Settings = Mapping[str, Any]


# -- what both are given -----------------------------------------------------------------------


def settings_of(made: Experiment, chosen: Settings) -> dict[str, Any]:
    """The recipe's settings of the fit, but for what is chosen; None stands for the recipe's.

    Raises:
        ValueError: the recipe has something that is not written in Pyro's loop.
    """
    defaults = inspect.signature(fit).parameters
    own = {name: value for name, value in made.fit.items() if name not in LEFT_OUT}
    strange = [name for name in own if name not in SHARED]
    strange += [name for name in ("before", "begin") if getattr(made, name) is not None]
    if strange:
        raise ValueError(
            f"the recipe has {strange[0]}={own.get(strange[0])!r}, which the loop in Pyro has not; "
            f"expected a recipe with {', '.join(SHARED)} alone"
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


def thinned(data: Dataset) -> Dataset:
    """Every tenth row of what is looked at."""
    return replace(
        data,
        splits={
            name: columns if name == "train" else {k: v[::THIN] for k, v in columns.items()}
            for name, columns in data.splits.items()
        },
    )


# -- the clock ---------------------------------------------------------------------------------


class Stopwatch:
    """Seconds since it was made, but for those while it was stopped."""

    def __init__(self) -> None:
        self._started, self._away = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._away

    @contextmanager
    def stopped(self) -> Iterator[float]:
        """Gives what it shows meanwhile."""
        shown, stopped_at = self.seconds, time.perf_counter()
        try:
            yield shown
        finally:
            self._away += time.perf_counter() - stopped_at


class Look(NamedTuple):
    """What was seen at the end of an epoch: seconds of training, and nats a row."""

    epoch: int
    seconds: float
    nll: float


class Watch:
    """Looks at the NLL at the ends of some epochs, while the clock stands still.

    Args:
        made: the pair in training.
        rows: the data, :func:`thinned`.
        due: whether to look at the end of an epoch, of which the first is 1.
        draws: importance draws a row.
    """

    def __init__(
        self, made: Experiment, rows: Dataset, due: Callable[[int], bool], draws: int
    ) -> None:
        self.made, self.rows, self.due, self.draws = made, rows, due, draws
        self.curve: list[Look] = []
        self.epoch = 0
        self.clock = Stopwatch()

    def end_epoch(self) -> None:
        with self.clock.stopped() as seconds:
            self.epoch += 1
            if self.due(self.epoch):
                look = Look(self.epoch, seconds, self.figures("validation")["nll"])
                self.curve.append(look)
                print(f"  {look}", file=sys.stderr, flush=True)

    def figures(self, split: str) -> dict[str, float]:
        """NLL and ELBO of the thinned split."""
        found = evaluate(
            self.made.model,
            self.made.guide,
            self.rows,
            split=split,
            samples=self.draws,
            seed=record.SEED,
        )
        return {"nll": found.nll, "nll_se": found.nll_se, "elbo": found.elbo, "rows": found.rows}


def first_within(curve: Sequence[Look], target: float) -> Look | None:
    """The first look at an NLL of at most the target; None: there is none."""
    return next((look for look in curve if look.nll <= target), None)


# -- ours --------------------------------------------------------------------------------------


class _Watched(LRScheduler):
    """The hook into ``fit``: it steps its schedule at the end of each epoch, after the validation
    ELBO, and that is the moment to stop the clock and to look. So ``fit`` runs once and as it is;
    fitting in stages would load, and compile, at each."""

    def __init__(self, schedule: LRScheduler | None, watch: Watch) -> None:
        # Not the parent's, which would take over the optimizer that ``schedule`` has.
        self.schedule, self.watch = schedule, watch

    def step(self, epoch: int | None = None) -> None:
        if self.schedule is not None:
            self.schedule.step()
        self.watch.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.schedule is None else self.schedule.state_dict()


def ours(
    made: Experiment, settings: Settings, elbo: str, watch: Watch, *, precision: str = "32-true"
) -> dict[str, float]:
    """Fit by ``ppl_vae.fit``; the seconds of compiling, and of the steps alone."""
    schedule = schedule_of(settings)

    def watched(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return _Watched(None if schedule is None else schedule(optimizer), watch)

    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(
            made.model,
            made.guide,
            made.data,
            **{**settings, "schedule": watched},
            objective=ELBOS[elbo](),
            seed=record.SEED,
            precision=precision,
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


# -- Pyro's ------------------------------------------------------------------------------------


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
        raise ValueError(f"{made.data.name}: labels are withheld, which the loop in Pyro has not")
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


# -- both --------------------------------------------------------------------------------------

CONTENDERS: dict[str, tuple[Callable[..., dict[str, float]], dict[str, Any]]] = {
    "ours": (ours, {}),
    "ours bf16": (ours, {"precision": "bf16-mixed"}),
    "pyro": (by_pyro, {}),
    "pyro unvalidated": (by_pyro, {"validated": False}),
}


def measure(
    name: str,
    recipe: str,
    chosen: Settings,
    *,
    elbo: str,
    targets: Sequence[float],
    due: Callable[[int], bool],
    draws: int,
) -> dict[str, Any]:
    """One contender's figures, in JSON types; it looks at the end of the last epoch too."""
    made = build(recipe, {}, record.SEED)
    settings = settings_of(made, chosen)
    check(made, settings, elbo)
    epochs = settings["epochs"]
    load, (contender, options) = os.getloadavg()[0], CONTENDERS[name]
    rows = thinned(made.data)
    watch = Watch(made, rows, lambda epoch: due(epoch) or epoch == epochs, draws)
    found = contender(made, settings, elbo, watch, **options)
    batches = math.ceil(len(made.data.split("train")) / settings["batch_size"])
    reached = {f"{target:g}": first_within(watch.curve, target) for target in targets}
    return {
        "seconds": watch.curve[-1].seconds,
        "compile_seconds": found["compile_seconds"],
        "ms_a_step": 1e3 * found["step_seconds"] / (epochs * batches),
        "steps": epochs * batches,
        "reached": {target: look and look._asdict() for target, look in reached.items()},
        "curve": [look._asdict() for look in watch.curve],
        "test": watch.figures("test"),
        "load": load,
    }


def show(result: dict[str, Any]) -> str:
    """Times to each target, and the curves."""
    found = result["contenders"]
    rows: list[tuple[str, ...]] = []
    for name, figures in found.items():
        for target, look in figures["reached"].items():
            first = found.get("ours", {}).get("reached", {}).get(target)
            rows.append(
                (
                    name,
                    target,
                    "not reached" if look is None else f"{look['seconds']:.1f}",
                    f"{look['seconds'] / first['seconds']:.2f}" if look and first else "",
                    "" if look is None else str(look["epoch"]),
                    f"{figures['compile_seconds']:.1f}",
                    f"{figures['ms_a_step']:.2f}",
                    f"{figures['ms_a_step'] / found['ours']['ms_a_step']:.2f}" * ("ours" in found),
                    f"{figures['test']['nll']:.2f}",
                )
            )
    header = (
        "contender",
        "NLL",
        "seconds",
        "x ours",
        "epochs",
        "of it compiling",
        "ms a step",
        "x ours",
        "test NLL at the end",
    )
    epochs = [look["epoch"] for look in next(iter(found.values()))["curve"]]
    curves = [
        (
            str(epoch),
            *(
                f"{figures['curve'][i][what]:.{digits}f}"
                for figures in found.values()
                for what, digits in (("seconds", 1), ("nll", 2))
            ),
        )
        for i, epoch in enumerate(epochs)
    ]
    columns = ("epoch", *(f"{name}, {what}" for name in found for what in ("s", "NLL")))
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    said = (
        f"{result['recipe']}: {settings}, {result['elbo']}. NLL: {result['draws']} draws, every "
        f"{THIN}th row of validation, at the end of test. The validation ELBO is on the clock."
    )
    tables = record.table(header, rows), record.table(columns, curves)
    return "\n\n".join([record.heading(result), said, *tables])


def _at_least_1(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _nats(text: str) -> list[float]:
    try:
        return [float(target) for target in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected nats, such as 95,92,90") from None


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Compiling takes as long as it does the first time."""
    before = os.environ.get(_CACHES)
    with tempfile.TemporaryDirectory() as caches:
        os.environ[_CACHES] = caches
        try:
            yield
        finally:
            del os.environ[_CACHES]
            if before is not None:
                os.environ[_CACHES] = before


_CACHES = "TORCHINDUCTOR_CACHE_DIR"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_target", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--recipe", default="vae-static-mnist")
    parser.add_argument("--targets", type=_nats, default=[90.0], help="NLLs, parted by commas")
    parser.add_argument(
        "--contenders",
        type=record.some_of(CONTENDERS),
        default=["ours", "pyro"],
        help=f"of {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--every", type=_at_least_1, default=5, help="epochs from look to look")
    parser.add_argument(
        "--from", type=_at_least_1, default=1, dest="first", help="the first epoch to look"
    )
    parser.add_argument("--draws", type=_at_least_1, default=500, help="importance draws a row")
    parser.add_argument("--elbo", choices=list(ELBOS), default="Trace_ELBO")
    parser.add_argument("--threads", type=_at_least_1, default=os.cpu_count())
    own = parser.add_argument_group("instead of the recipe's")
    own.add_argument("--epochs", type=_at_least_1)
    own.add_argument("--batch_size", type=_at_least_1)
    own.add_argument("--learning_rate", type=float)
    own.add_argument("--warmup", type=float, help="epochs")
    own.add_argument("--schedule", choices=("cosine", "none"))
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = {name: getattr(options, name) for name in SHARED}
    settings = settings_of(build(options.recipe, {}, record.SEED), chosen)
    result = record.record(
        "time_to_target",
        "cpu",
        recipe=options.recipe,
        settings={name: described(value) for name, value in settings.items()},
        elbo=options.elbo,
        draws=options.draws,
        contenders={},
    )
    with _empty_caches():
        for name in options.contenders:
            print(f"{name} …", file=sys.stderr, flush=True)
            result["contenders"][name] = measure(
                name,
                options.recipe,
                chosen,
                elbo=options.elbo,
                targets=options.targets,
                due=lambda epoch: epoch >= options.first and epoch % options.every == 0,
                draws=options.draws,
            )
    record.output(result, show, options)


if __name__ == "__main__":
    main()
