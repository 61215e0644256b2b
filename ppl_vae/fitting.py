"""Fitting: SVI over epochs, watched, checkpointed, resumable to the same bits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyro
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ppl_vae.augmentation import Augmentation
from ppl_vae.batches import composition, known_columns
from ppl_vae.begin import OPTIMIZERS, begin
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.feed import feed_for
from ppl_vae.launch import launch
from ppl_vae.loop import interruption, train
from ppl_vae.model import GenerativeModel
from ppl_vae.objectives import Evolving, Objective, Schedule
from ppl_vae.progress import tensorboard_writer, training_progress
from ppl_vae.replicas import Together, folders, pairs, start
from ppl_vae.run import Run
from ppl_vae.sites import aside, check_data, check_labels
from ppl_vae.workers import Alone, Several, WorkerLost


@dataclass
class Fitted:
    """A fitted pair with its data; ``run`` is its folder, where it has one.

    ``history`` holds the rows of ``metrics.csv``: ELBO and its parts in nats per datum. After a fit
    of several seeds, this is the first, and ``replicas`` are all of them.
    """

    model: GenerativeModel
    guide: nn.Module
    data: Dataset
    history: list[dict[str, float]] = field(default_factory=list)
    run: Run | None = None
    replicas: list[Fitted] = field(default_factory=list, repr=False)


def fit(
    model: GenerativeModel | Sequence[GenerativeModel],
    guide: nn.Module | Sequence[nn.Module],
    data: Any,
    *,
    epochs: int = 100,
    batch_size: int = 100,
    labeled_batch: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    objective: Objective | None = None,
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str | Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    max_grad_norm: float | None = None,
    warmup: float | Schedule = 0,
    patience: int | None = None,
    average: int | None = None,
    augment: Augmentation | None = None,
    accumulate: int = 1,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "32-true",
    matmul_precision: str | None = None,
    compile: bool | Literal["auto"] = "auto",
    checkpoint_seconds: float = 10.0,
    progress: bool = True,
    tensorboard: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Fitted:
    """Fit a pair by stochastic variational inference.

    Args:
        model, guide: the pair; with ``seeds``, a pair of which each replica gets a copy, or as many
            models and guides as there are seeds.
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes: a bare tensor or array
            ``(rows, ...)``, or a dict of them by site name. The model gets the columns that it
            can observe.
        epochs: passes over the training rows; where labels are withheld from some, over those.
        batch_size: rows of a batch, with labels and without.
        labeled_batch: rows of a batch that have labels, where labels are withheld from others (see
            :meth:`ppl_vae.data.Dataset.labeled`); they come again and again. None: half of the
            batch, or all rows with labels where those are fewer. How much they count does not
            depend on it: see :class:`ppl_vae.objectives.SemiSupervised`.
        seed: of the noise and of the order of the rows.
        seeds: train so many replicas at once, with seeds from ``seed`` upwards: each a run of its
            own, with its own weights, order of rows, noise, metrics, early stopping and
            folder ``out/seed-N``. Compiled, they are one program over stacked weights; noise comes
            from one random state, so that a replica has the distribution, not the bits, of a run
            alone.
        out: folder of the run; None keeps nothing on disk. It must not hold another run.
        resume: go on with the run in ``out``, to the same bits as if it had never stopped (same
            machine, same arguments; more epochs may be asked for, but not with "cosine").
        objective: what is maximized; None takes :func:`ppl_vae.objectives.plain_elbo`, of rows with
            and without labels where some are withheld. What it
            learns itself (a discriminator) is trained in the same step; replicas have copies.
        optimizer: "adam", "adamw" or "adamax".
        learning_rate, weight_decay: of the optimizer, for a loss in nats per datum.
        schedule: of the learning rate, a step an epoch: "cosine" (to 0 at the last epoch),
            "plateau" (a tenth after ten epochs without a better validation ELBO), or a function
            of the optimizer that returns a torch scheduler.
        max_grad_norm: longer gradients are shortened to it, in nats per datum.
        warmup: weight of the KL: a number of epochs for a linear warm-up, or a schedule.
        patience: stop after so many epochs without a better validation ELBO, counted from the
            end of the warm-up, and keep the best weights. None: no early stopping.
        average: validate by, and end with, running means of the weights over so many last epochs
            (see :class:`ppl_vae.averaging.WeightAverage`), while steps go on from the weights
            themselves. Takes the noise of the steps out, as a falling learning rate does.
            ``elbo``, ``reconstruction`` and ``kl`` are those of the steps. None: no averages.
        augment: changes the images of the training rows, ``x``, anew in each batch, such as
            :class:`ppl_vae.augmentation.Shifts`; validation has the rows as they are. ``elbo``,
            ``reconstruction`` and ``kl`` are those of the changed rows.
        accumulate: run each batch in so many parts, one after the other, and add up their
            gradients: less memory, and the same mean where an objective takes each row by itself.
        device: "auto", "cpu" or "cuda".
        devices: on each machine; each has a process, a worker. See below.
        num_nodes: machines.
        precision: "32-true", "64-true" or "bf16-mixed", as Lightning Fabric names them. Densities
            and their sums are in full precision in any case.
        matmul_precision: of float32 matrix products during the fit: "highest", or "high" (TF32 on
            CUDA) or "medium", as ``torch.set_float32_matmul_precision`` names them; None leaves
            torch's setting.
        compile: True compiles the step, which takes seconds at the start; False runs it eagerly;
            "auto" compiles once the steps to come are expected to save more than that. See
            :class:`ppl_vae.SVI`. Results are the same up to rounding.
        checkpoint_seconds: least time between checkpoints (the last step has one in any case).
        progress: show ELBO, reconstruction, KL and the time left on standard error.
        tensorboard: write the metrics to ``out`` for TensorBoard too.
        record: more fields for ``run.json``, such as the recipe.

    Several workers share the rows of each batch, take each step together, and come to what one
    would come to, but for noise, of which each has its own, and for statistics of a batch, as in
    batch norm, which are those of a worker's share. ``batch_size`` counts the rows of all; the
    order of rows does not depend on their number, and a run may be resumed with another number.
    To the same bits it goes on with the same number. The first worker alone validates and
    writes ``out``; on the others, ``Fitted.run`` is None.

    With ``devices=2``, this process starts another one, a copy of its own command, so that a
    script runs twice from its start. Under torchrun, which starts them all, leave the numbers
    out; under SLURM, give those of the job (``--ntasks-per-node``, ``--nodes``), as Lightning
    Fabric documents it. On machines without either, run the command on each with MASTER_ADDR,
    MASTER_PORT and NODE_RANK set. Workers on CPU talk through gloo, on CUDA through NCCL.

    Raises:
        ValueError: an argument out of its range; the sentence names it and what was expected. An
            objective that weighs draws by importance (Pyro's do so over the whole batch). Several
            workers, where labels are withheld from some rows; a class none of whose rows has a
            label. ``augment`` where rows are no images, or the model observes more than ``x`` and
            ``y``. A run to resume that has other data, seed or settings.
        PairError: guide or data do not fit the model.
        NonFiniteLoss: the loss became NaN or infinite; names the site. The last good checkpoint
            is kept.
        FileExistsError: ``out`` holds another run.
        KeyboardInterrupt: after Ctrl-C (of several workers, on any; also after SIGTERM), when a
            checkpoint has been saved.
        WorkerLost: another worker has ended; the last good checkpoint is kept.
    """
    settings = locals()
    _check_arguments(settings)
    copies = pairs(model, guide, seeds)
    fabric = launch(
        accelerator=torch_device(device),
        devices=devices,
        num_nodes=num_nodes,
        precision=_precision(precision),
    )
    dtype = torch.float64 if precision == "64-true" else torch.float32
    for program in itertools.chain(*copies):
        program.to(fabric.device, dtype).train()
    model, guide = copies[0]
    trained = [model, guide]
    if isinstance(objective, Evolving) and objective.state is not None:
        trained.append(objective.state.to(fabric.device, dtype))
    workers = Several(fabric, *trained) if fabric.world_size > 1 else Alone()
    dataset = as_dataset(data)
    rows = dataset.split("train")
    validation = dataset.split("validation") if "validation" in dataset.splits else None
    if validation is None and (patience is not None or schedule == "plateau"):
        raise ValueError(f"patience and plateau need a validation split; {dataset.name} has none")
    if augment is not None:
        _check_images(model, dataset)
    labeled = composition(model, rows, batch_size, labeled_batch, seed).labeled
    if labeled is not None and workers.count > 1:
        raise ValueError(
            f"{workers.count} workers: rows with and without labels need one device, devices=1"
        )
    with aside():
        # Every value that training will see, once, so that no step needs to look.
        for name in ("train", "validation"):
            if name in dataset.splits:
                check_labels(model, dataset, name)
                batches = known_columns(dataset.split(name), fabric.device, dtype)
                check_data(model, map(model.observed, batches))

    with ExitStack() as stack:
        stack.enter_context(workers)
        stack.enter_context(aside())
        stack.enter_context(pyro.validation_enabled(False))
        if matmul_precision is not None:
            stack.enter_context(_matmul_precision(matmul_precision))
        torch.manual_seed(seed)
        feed = feed_for(
            model,
            rows,
            fabric.device,
            dtype,
            labeled,
            augment=augment,
            image_shape=dataset.image_shape,
        )
        loops = [
            begin(
                *pair,
                dataset,
                settings if seeds is None else _own_objective(settings),
                seed=seed + number,
                out=folder,
                fabric=fabric,
                workers=workers,
                feed=feed,
                stack=stack,
            )
            for number, (pair, folder) in enumerate(
                zip(copies, folders(None if out is None else Path(out), seed, seeds), strict=True)
            )
        ]
        start(loops, resume) if seeds is not None else loops[0].start(resume)
        steps = Together(loops) if seeds is not None else loops[0]
        # What was settled by timing must not be settled another way after an interruption.
        run = loops[0].run
        known = run.record.get("compiled_batches") if run is not None else None
        compiled = known or []
        if any(loop.running for loop in loops):
            compiled = steps.prepare(known if compile == "auto" else None)
        for loop in loops:
            if loop.run is not None:
                loop.run.update(compiled_batches=compiled)
                folder = loop.run.folder / "tensorboard" if tensorboard else None
                loop.write = stack.enter_context(tensorboard_writer(folder, loop.epoch))
        shown = progress and workers.first
        show = stack.enter_context(training_progress(epochs, loops[0].epoch, enabled=shown))
        interrupted = stack.enter_context(interruption(launched=workers.count > 1))
        try:
            train(loops, steps.take, show, interrupted)
        except WorkerLost:
            loops[0].status("failed")
            raise
    replicas = [
        Fitted(*pair, dataset, loop.history, loop.run)
        for pair, loop in zip(copies, loops, strict=True)
    ]
    if seeds is not None:
        replicas[0].replicas = replicas
    return replicas[0]


def _check_arguments(given: Mapping[str, Any]) -> None:
    def refuse(name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name}={given[name]!r}: expected {expected}")

    for name in ("epochs", "batch_size", "accumulate", "devices", "num_nodes"):
        if not (isinstance(given[name], int) and given[name] >= 1):
            refuse(name, "a whole number of at least 1")
    if given["seeds"] is not None:
        if not (isinstance(given["seeds"], int) and given["seeds"] >= 1):
            refuse("seeds", "a whole number of at least 1, or None")
        if given["devices"] > 1 or given["num_nodes"] > 1:
            refuse("seeds", "None with several devices: a replica has one device")
    if not isinstance(given["seed"], int):
        refuse("seed", "a whole number")
    if given["patience"] is not None and not given["patience"] >= 1:
        refuse("patience", "at least 1, or None")
    average = given["average"]
    if average is not None and not (isinstance(average, int) and average >= 1):
        refuse("average", "a whole number of epochs, at least 1, or None")
    augment = given["augment"]
    if augment is not None and not (callable(augment) and hasattr(augment, "at")):
        refuse("augment", "an augmentation, such as ppl_vae.augmentation.Shifts(), or None")
    for name in ("learning_rate", "max_grad_norm"):
        value = given[name]
        if name == "max_grad_norm" and value is None:
            continue
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            refuse(name, "a positive number")
    for name in ("weight_decay", "checkpoint_seconds"):
        if not given[name] >= 0:
            refuse(name, "a number of at least 0")
    if given["tensorboard"] and given["out"] is None:
        refuse("tensorboard", "out=, the folder of a run, with it")
    if given["optimizer"] not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={given['optimizer']!r}: expected one of {', '.join(OPTIMIZERS)}"
        )
    if given["matmul_precision"] not in (None, "highest", "high", "medium"):
        refuse("matmul_precision", "highest, high, medium or None")
    if given["compile"] not in (True, False, "auto"):
        refuse("compile", "True, False or 'auto'")
    if isinstance(given["schedule"], str) and given["schedule"] not in ("cosine", "plateau"):
        raise ValueError(f"schedule={given['schedule']!r}: expected cosine, plateau or a function")
    if isinstance(given["warmup"], int | float) and not given["warmup"] >= 0:
        raise ValueError(f"warmup={given['warmup']}: expected epochs, at least 0")
    if isinstance(given["objective"], RenyiELBO | ReweightedWakeSleep):
        raise ValueError(
            f"objective={type(given['objective']).__name__}: it is not linear in "
            "log-probabilities, which fit divides by the number of rows, so it would be another "
            "objective; take ppl_vae.objectives.IWAE, DReG or ReweightedWakeSleep, or run it with "
            "ppl_vae.SVI"
        )
    if given["resume"] and given["out"] is None:
        raise ValueError("resume=True: give out=, the folder of the run to go on with")


def _check_images(model: GenerativeModel, dataset: Dataset) -> None:
    """Refuse an augmentation of data that it does not suit."""
    columns = set(model.observed(dataset.split("train").batch(slice(0, 1))))
    if dataset.image_shape is None or "x" not in columns:
        raise ValueError(f"augment: expected images in column x; {dataset.name} has none")
    if more := sorted(columns - {"x", "y"}):
        raise ValueError(
            f"augment changes x alone, and {type(model).__name__} observes {', '.join(more)} too, "
            "which would no longer belong to it"
        )


def _own_objective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a copy of the objective, whose state a replica does not share."""
    return {**settings, "objective": copy.deepcopy(settings["objective"])}


def torch_device(device: str) -> str:
    """Where to compute, "cpu" or "cuda", when asked for "auto", "cpu" or "cuda".

    Raises:
        ValueError: another name, or "cuda" where torch finds no device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: expected auto, cpu or cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; take 'cpu' or 'auto'")
    return device


def _precision(precision: str) -> Any:
    known = ("32-true", "64-true", "bf16-mixed")
    if precision not in known:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(known)}")
    return precision


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
