"""The beginning of a run: its parts put together, its folder made or opened again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from ppl_vae.averaging import WeightAverage
from ppl_vae.batches import composition
from ppl_vae.data import Dataset
from ppl_vae.evaluation import check_measurable
from ppl_vae.feed import Resident, Streamed
from ppl_vae.loop import TrainingLoop
from ppl_vae.model import GenerativeModel
from ppl_vae.objectives import Evolving, LinearWarmup, Objective, SemiSupervised, plain_elbo
from ppl_vae.objectives.semi_supervised import strata
from ppl_vae.run import Run
from ppl_vae.schedules import HoldThenDecay
from ppl_vae.sites import check_pair, read_sites
from ppl_vae.svi import SVI, parameters
from ppl_vae.training import Training
from ppl_vae.workers import Alone

# Fused: Adam's update is a third of a small model's step otherwise.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adam": lambda p, lr, decay: torch.optim.Adam(p, lr, weight_decay=decay, fused=True),
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay, fused=True),
    "adamax": lambda p, lr, decay: torch.optim.Adamax(p, lr, weight_decay=decay),
}


def begin(
    model: GenerativeModel,
    guide: nn.Module,
    dataset: Dataset,
    given: Mapping[str, Any],
    *,
    seed: int,
    out: Path | None,
    fabric: Fabric,
    workers: Alone,
    feed: Resident | Streamed,
    stack: ExitStack,
) -> TrainingLoop:
    """The training of a pair on Fabric's device, before its first step.

    Args:
        given: the arguments of :func:`ppl_vae.fit`.
        seed, out: instead of those.
        stack: holds the lock of the run's folder.

    Raises: as :func:`ppl_vae.fit` of what does not fit together.
    """
    train = dataset.split("train")
    validation = dataset.split("validation") if "validation" in dataset.splits else None
    dtype = torch.float64 if given["precision"] == "64-true" else torch.float32
    composed = composition(model, train, given["batch_size"], given["labeled_batch"], seed)
    batch: Any = next(iter(feed.batches(composed.order(0)[:1])))
    example = feed(batch)
    objective: Objective | None = given["objective"]
    if composed.labeled is not None and not isinstance(objective, SemiSupervised):
        objective = SemiSupervised(0.0, objective=objective)
    for columns, _ in strata(example):
        if isinstance(objective, SemiSupervised):
            objective.choose(model, guide, **columns)
        columns.pop("labeled", None)
        for program in (model, guide):
            check_measurable(read_sites(program, **columns).values())
        check_pair(model, guide, **columns)
        objective = objective or plain_elbo(model, guide, **columns)
    assert objective is not None
    warmup = given["warmup"]
    warmup = LinearWarmup(warmup) if isinstance(warmup, int | float) else warmup
    training = Training(
        objective,
        len(train),
        fabric.autocast,
        warmup=warmup,
        parts=given["accumulate"],
        device=fabric.device,
        dtype=dtype,
    )
    held = parameters(model, guide, *([] if training.state is None else [training.state]))
    if not held:
        raise ValueError(f"{type(model).__name__} and its guide have nothing to learn")
    optimizer = OPTIMIZERS[given["optimizer"]](held, given["learning_rate"], given["weight_decay"])
    run = None
    if out is not None and workers.first:
        about = {
            "model": type(model).__name__,
            "guide": type(guide).__name__,
            "parameters": sum(p.numel() for p in held),
            "data": dataset.fingerprint(),
            "seed": seed,
            "weights": "last" if given["patience"] is None else "best",
            "fit": {name: described(given[name]) for name in _SETTINGS}
            | {"device": fabric.device.type},
        }
        run = (
            _reopen(out, about)
            if given["resume"]
            else Run.create(out, about | dict(given["record"] or {}))
        )
        stack.enter_context(run.lock())
        run.update(status="running", fit=about["fit"], workers=workers.count)
    workers.folder = workers.of_first(lambda: None if run is None else run.folder)
    return TrainingLoop(
        model=model,
        guide=guide,
        training=training,
        optimizer=optimizer,
        scheduler=_scheduler(given["schedule"], optimizer, given["epochs"]),
        svi=SVI(
            model,
            guide,
            optimizer,
            training,
            max_grad_norm=given["max_grad_norm"],
            compile=given["compile"],
            feed=feed,
            reduce=workers.reduce,
        ),
        feed=feed,
        train=train,
        validation=validation,
        device=fabric.device,
        dtype=dtype,
        epochs=given["epochs"],
        composition=composed,
        withheld=() if composed.labeled is None else ("y",),
        seed=seed,
        patience=given["patience"],
        checkpoint_seconds=given["checkpoint_seconds"],
        run=run,
        workers=workers,
        average=None if given["average"] is None else WeightAverage(model, guide, given["average"]),
    )


# What decides to which bits a run leads, besides its data and its seed.
_SETTINGS = (
    "epochs",
    "batch_size",
    "labeled_batch",
    "objective",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "schedule",
    "max_grad_norm",
    "warmup",
    "patience",
    "average",
    "augment",
    "accumulate",
    "precision",
    "matmul_precision",
)


def described(value: Any) -> Any:
    """A setting as ``run.json`` holds it: as it is, or by what it is called."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if is_dataclass(value) or isinstance(value, Evolving):
        return repr(value)
    return getattr(value, "__qualname__", str(type(value)))


def _reopen(folder: str | Path, about: Mapping[str, Any]) -> Run:
    """The run in a folder, if going on as ``about`` says leads to the same bits.

    Raises:
        ValueError: other data, seed or settings; names the first that differs. A trained model
            that came with the package.
    """
    run = Run.open(folder)
    was, now = run.record, about
    if "pretrained" in was:
        raise ValueError(
            f"{run.folder} holds the trained model {was['pretrained']!r}, its weights without the "
            "optimizer's state: its fit cannot go on; fit the recipe anew in another folder, with "
            f"ppl-vae fit {was['recipe']} --out DIR"
        )
    if was["data"]["sha256"] != now["data"]["sha256"]:
        raise ValueError(
            f"{run.folder} was fitted to other data: {was['data']['name']} with sha256 "
            f"{was['data']['sha256'][:12]}, now {now['data']['sha256'][:12]}"
        )
    pairs = {"seed": (was["seed"], now["seed"])} | {
        name: (was["fit"].get(name), value) for name, value in now["fit"].items()
    }
    more = pairs.pop("epochs")
    if was["fit"]["schedule"] == "cosine":
        pairs["epochs"] = more  # the schedule's length
    for name, (before, after) in pairs.items():
        if before != after:
            raise ValueError(
                f"{run.folder} was begun with {name}={before}: going on with {name}={after} would "
                "be another run; leave it as it was, or give another folder"
            )
    if more[1] < was.get("epochs_done", 0):
        raise ValueError(
            f"{run.folder} has {was['epochs_done']} epochs already: epochs={more[1]} would take "
            "some of them back"
        )
    return run


def _scheduler(
    schedule: str | Callable[[torch.optim.Optimizer], LRScheduler] | None,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> LRScheduler | ReduceLROnPlateau | None:
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, epochs)
    if schedule == "plateau":
        # torch's threshold is relative, and of a negative ELBO a worse one would pass for better.
        return ReduceLROnPlateau(optimizer, mode="max", threshold=0.0)
    if isinstance(schedule, HoldThenDecay) and schedule.epochs < epochs:
        raise ValueError(
            f"epochs={epochs}: the learning rate of {schedule} is 0 after {schedule.epochs} "
            "epochs; ask for no more, or give another schedule"
        )
    return schedule(optimizer) if callable(schedule) else None
