"""Fitting: SVI over epochs, watched, checkpointed, resumable to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from ppl_vae.data import Dataset, Rows, as_dataset
from ppl_vae.loop import TrainingLoop, interruption
from ppl_vae.model import GenerativeModel
from ppl_vae.objectives import LinearWarmup, Objective, Schedule, Training, plain_elbo
from ppl_vae.progress import tensorboard_writer, training_progress
from ppl_vae.run import Run
from ppl_vae.sites import aside, check_data, check_pair
from ppl_vae.svi import SVI, parameters

# Fused: Adam's update is a third of a small model's step otherwise.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adam": lambda p, lr, decay: torch.optim.Adam(p, lr, weight_decay=decay, fused=True),
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay, fused=True),
    "adamax": lambda p, lr, decay: torch.optim.Adamax(p, lr, weight_decay=decay),
}


@dataclass
class Fitted:
    """A fitted pair with its data; ``run`` is its folder, where it has one.

    ``history`` holds the rows of ``metrics.csv``: ELBO and its parts in nats per datum.
    """

    model: GenerativeModel
    guide: nn.Module
    data: Dataset
    history: list[dict[str, float]] = field(default_factory=list)
    run: Run | None = None


def fit(
    model: GenerativeModel,
    guide: nn.Module,
    data: Any,
    *,
    epochs: int = 100,
    batch_size: int = 100,
    seed: int = 0,
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
    device: str = "auto",
    precision: str = "32-true",
    checkpoint_seconds: float = 10.0,
    progress: bool = True,
    tensorboard: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Fitted:
    """Fit a pair by stochastic variational inference.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes: a bare tensor or array
            ``(rows, ...)``, or a dict of them by site name. The model gets the columns that it
            can observe.
        epochs: passes over the training rows.
        seed: of the noise and of the order of the rows.
        out: folder of the run; None keeps nothing on disk. It must not hold another run.
        resume: go on with the run in ``out``, to the same bits as if it had never stopped (same
            machine, same arguments).
        objective: what is maximized; None takes :func:`ppl_vae.objectives.plain_elbo`.
        optimizer: "adam", "adamw" or "adamax".
        learning_rate, weight_decay: of the optimizer, for a loss in nats per datum.
        schedule: of the learning rate, a step an epoch: "cosine" (to 0 at the last epoch),
            "plateau" (a tenth after ten epochs without a better validation ELBO), or a function
            of the optimizer that returns a torch scheduler.
        max_grad_norm: longer gradients are shortened to it, in nats per datum.
        warmup: weight of the KL: a number of epochs for a linear warm-up, or a schedule.
        patience: stop after so many epochs without a better validation ELBO, counted from the
            end of the warm-up, and keep the best weights. None: no early stopping.
        device: "auto", "cpu" or "cuda".
        precision: "32-true", "64-true" or "bf16-mixed", as Lightning Fabric names them.
        checkpoint_seconds: least time between checkpoints (the last step has one in any case).
        progress: show ELBO, reconstruction, KL and the time left on standard error.
        tensorboard: write the metrics to ``out`` for TensorBoard too.
        record: more fields for ``run.json``, such as the recipe.

    Raises:
        ValueError: an argument out of its range; the sentence names it and what was expected.
        PairError: guide or data do not fit the model.
        NonFiniteLoss: the loss became NaN or infinite; names the site. The last good checkpoint
            is kept.
        FileExistsError: ``out`` holds another run.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    _check_arguments(locals())
    fabric = Fabric(accelerator=torch_device(device), devices=1, precision=_precision(precision))
    dtype = torch.float64 if precision == "64-true" else torch.float32
    model.to(fabric.device, dtype)
    guide.to(fabric.device, dtype)
    dataset = as_dataset(data)
    train = dataset.split("train")
    validation = dataset.split("validation") if "validation" in dataset.splits else None
    if validation is None and (patience is not None or schedule == "plateau"):
        raise ValueError(f"patience and plateau need a validation split; {dataset.name} has none")
    _check_rows(model, train, validation, dtype)

    with ExitStack() as stack:
        stack.enter_context(aside())
        stack.enter_context(pyro.validation_enabled(False))
        torch.manual_seed(seed)
        example = model.observed(train.batch(slice(0, batch_size), fabric.device, dtype))
        check_pair(model, guide, **example, total=len(train))
        training = Training(
            objective or plain_elbo(model, guide, **example), len(train), fabric.autocast
        )
        held = parameters(model, guide)
        if not held:
            raise ValueError(f"{type(model).__name__} and its guide have nothing to learn")
        optim = OPTIMIZERS[optimizer](held, learning_rate, weight_decay)
        loop = TrainingLoop(
            model=model,
            guide=guide,
            training=training,
            optimizer=optim,
            scheduler=_scheduler(schedule, optim, epochs),
            svi=SVI(model, guide, optim, training, max_grad_norm=max_grad_norm),
            train=train,
            validation=validation,
            device=fabric.device,
            dtype=dtype,
            epochs=epochs,
            batch_size=min(batch_size, len(train)),
            seed=seed,
            warmup=LinearWarmup(warmup) if isinstance(warmup, int | float) else warmup,
            patience=patience,
            checkpoint_seconds=checkpoint_seconds,
            run=_open(out, resume, dataset, model, guide, seed, epochs, patience, record),
        )
        loop.start(resume)
        write = stack.enter_context(
            tensorboard_writer(
                loop.run.folder / "tensorboard" if tensorboard and loop.run else None
            )
        )
        show = stack.enter_context(training_progress(epochs, loop.epoch, enabled=progress))
        interrupted = stack.enter_context(interruption())
        loop.fit(lambda row: (show(row), write(row)), interrupted)
    return Fitted(model, guide, dataset, loop.history, loop.run)


def _check_arguments(given: Mapping[str, Any]) -> None:
    for name in ("epochs", "batch_size"):
        if not (isinstance(given[name], int) and given[name] >= 1):
            raise ValueError(f"{name}={given[name]}: expected a whole number of at least 1")
    if given["patience"] is not None and given["patience"] < 1:
        raise ValueError(f"patience={given['patience']}: expected at least 1, or None")
    if not (given["learning_rate"] > 0 and math.isfinite(given["learning_rate"])):
        raise ValueError(f"learning_rate={given['learning_rate']}: expected a positive number")
    if given["optimizer"] not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={given['optimizer']!r}: expected one of {', '.join(OPTIMIZERS)}"
        )
    if isinstance(given["schedule"], str) and given["schedule"] not in ("cosine", "plateau"):
        raise ValueError(f"schedule={given['schedule']!r}: expected cosine, plateau or a function")
    if isinstance(given["warmup"], int | float) and not given["warmup"] >= 0:
        raise ValueError(f"warmup={given['warmup']}: expected epochs, at least 0")
    if given["resume"] and given["out"] is None:
        raise ValueError("resume=True: give out=, the folder of the run to go on with")


def torch_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

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


def _check_rows(
    model: GenerativeModel, train: Rows, validation: Rows | None, dtype: torch.dtype
) -> None:
    """Every value that training will see, once, so that no step needs to look."""
    device = next(model.parameters()).device
    with aside():
        for rows in (train, validation):
            if rows is not None:
                check_data(model, map(model.observed, rows.batches(1000, device, dtype)))


def _scheduler(
    schedule: str | Callable[[torch.optim.Optimizer], LRScheduler] | None,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> LRScheduler | ReduceLROnPlateau | None:
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, epochs)
    if schedule == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max")
    return schedule(optimizer) if callable(schedule) else None


def _open(
    out: str | Path | None,
    resume: bool,
    dataset: Dataset,
    model: GenerativeModel,
    guide: nn.Module,
    seed: int,
    epochs: int,
    patience: int | None,
    record: Mapping[str, Any] | None,
) -> Run | None:
    if out is None:
        return None
    fingerprint = dataset.fingerprint()
    if not resume:
        about = {
            "model": type(model).__name__,
            "guide": type(guide).__name__,
            "parameters": sum(p.numel() for p in parameters(model, guide)),
            "data": fingerprint,
            "seed": seed,
            "epochs": epochs,
            "weights": "last" if patience is None else "best",
            "status": "running",
        }
        return Run.create(out, {**about, **(record or {})})
    run = Run.open(out)
    if run.record["data"]["sha256"] != fingerprint["sha256"]:
        raise ValueError(
            f"{run.folder} was fitted to other data: {run.record['data']['name']} with sha256 "
            f"{run.record['data']['sha256'][:12]}, now {fingerprint['sha256'][:12]}"
        )
    if run.record["seed"] != seed:
        raise ValueError(f"{run.folder} has seed {run.record['seed']}, not {seed}")
    run.update(status="running", epochs=epochs)
    return run
