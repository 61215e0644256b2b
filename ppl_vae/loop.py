"""The training loop: steps over epochs, all of whose state a checkpoint holds."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ppl_vae.averaging import WeightAverage
from ppl_vae.batches import Shuffled
from ppl_vae.checkpoints import Checkpoint, CorruptCheckpoint
from ppl_vae.data import Rows
from ppl_vae.evaluation import mean_elbo
from ppl_vae.feed import Resident, Streamed
from ppl_vae.model import GenerativeModel
from ppl_vae.run import Run
from ppl_vae.sites import paired_traces, sample_nodes
from ppl_vae.svi import SVI, NonFiniteLoss
from ppl_vae.training import Training
from ppl_vae.workers import Alone


@dataclass
class TrainingLoop:
    """The state of a training, all of which a checkpoint holds, and how it moves on."""

    model: GenerativeModel
    guide: nn.Module
    training: Training
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | ReduceLROnPlateau | None
    svi: SVI
    feed: Resident | Streamed
    train: Rows
    validation: Rows | None
    withheld: tuple[str, ...]  # observables that are inferred, also where data have them
    device: torch.device
    dtype: torch.dtype
    epochs: int
    composition: Shuffled
    seed: int
    patience: int | None
    checkpoint_seconds: float
    run: Run | None  # the first worker's
    workers: Alone
    average: WeightAverage | None = None

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current one
    losses: list[Any] = field(default_factory=list)  # of this epoch's batches, not waited for
    best_elbo: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    saved_at: float = field(default_factory=time.monotonic)
    write: Callable[[dict[str, float]], Any] = lambda row: None  # an epoch's figures, elsewhere too

    @property
    def batches(self) -> int:
        return len(self.composition)

    @property
    def running(self) -> bool:
        return self.epoch < self.epochs and not self._out_of_patience()

    def prepare(self, compiled: Collection[int] | None = None) -> list[int]:
        """Settle which steps are compiled, by the size of their batches, before any is taken: the
        sizes of the compiled ones. All workers do as the first one.

        Args:
            compiled: as an interrupted run has settled it, whose bits depend on it.
        """
        settled = self.workers.of_first(lambda: self._prepare(compiled))
        return settled if self.workers.first else self._prepare(settled)

    def _prepare(self, compiled: Collection[int] | None) -> list[int]:
        settled = []
        for numbers, steps in self.kinds():
            share = self.workers.share(numbers)
            [batch] = self.feed.batches([share])
            how = None if compiled is None else len(numbers) in compiled
            if len(share) and self.svi.prepare(batch, steps=steps, compile=how):
                settled.append(len(numbers))
        return settled

    def kinds(self) -> list[tuple[Tensor, int]]:
        """The row numbers of a whole batch, and of a last one that is smaller; and how many steps
        of its size there are in all."""
        order = self.order()
        examples = order[:1] + order[-1:] if len(order[-1]) < len(order[0]) else order[:1]
        sizes = [len(numbers) for numbers in order]
        return [(numbers, self.epochs * sizes.count(len(numbers))) for numbers in examples]

    def order(self) -> list[Tensor]:
        """The row numbers of each batch of the epoch, of all workers together."""
        return self.composition.order(self.epoch)

    def batches_left(self) -> Iterator[Any]:
        """This worker's shares of the epoch's remaining batches, as the step takes them."""
        return self.feed.batches([self.workers.share(part) for part in self.order()[self.batch :]])

    def take(self, batches: Sequence[Any]) -> list[Any]:
        """A step on the one batch given. Returns its loss."""
        return [self.workers.step(self.svi, batch) for batch in batches]

    def anneal(self, batch: int | None = None) -> None:
        """Set objective and feed for the step to come, or for another one of the epoch."""
        batch = self.batch if batch is None else batch
        epoch = self.epoch + batch / self.batches
        self.training.at(epoch)
        self.feed.at(epoch)

    def taken(self, loss: Any) -> None:
        """Note a step and its loss."""
        self.losses.append(loss)
        self.batch += 1
        if self.device.type == "cpu":  # elsewhere, looking would mean to wait
            self._check_losses()

    def finish(self) -> None:
        """Keep what was learned: the best weights, where they were looked for."""
        self.save()
        if self.best is not None:
            load_weights(self.model, self.guide, self.best)
        elif self.average is not None:
            self.average.put()
        self.status("finished")

    def pass_epoch(self) -> None:
        """End an epoch of a training that has stopped, but is run on with others."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.training.forget()
        self.losses = []

    def _check_losses(self) -> None:
        """Stop at a loss that is not finite. Its step, and those after it, changed nothing."""
        losses, self.losses = self.losses, []
        if not losses:
            return
        values = torch.stack([torch.as_tensor(loss) for loss in losses])
        bad = (~values.isfinite()).nonzero()
        if len(bad) == 0:
            return
        number = self.batch - len(losses) + int(bad[0])
        rows = self.order()[number]
        batch = self.model.observed(self.train.batch(rows, self.device, self.dtype))
        batch = {name: value for name, value in batch.items() if name not in self.withheld}
        self.batch = number + 1
        culprit = _culprit(self.model, self.guide, batch)
        self._stop(f"the loss is {values[int(bad[0])].item()}; {culprit}")

    def end_epoch(self) -> dict[str, float]:
        self._check_losses()
        self.workers.add_up(self.training.totals)
        terms = self.training.terms
        row = {
            "epoch": self.epoch + 1,
            "elbo": terms.elbo.item(),
            "reconstruction": terms.reconstruction.item(),
            "kl": terms.kl.item(),
        }
        self.anneal(self.batches - 1)  # an interrupted epoch may have no step left
        self.epoch, self.batch = self.epoch + 1, 0
        self.training.forget()
        if self.average is not None:
            self.average.add()
        with nullcontext() if self.average is None else self.average.in_place():
            row |= self._validated()
        row |= {
            "weight": self.training.weight,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
        }
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row["validation_elbo"])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.history.append(row)
        if self.run is not None:
            self.run.log(row)
        self.write(row)
        return row

    def _validated(self) -> dict[str, float]:
        """Figures of the validation rows; the weights are kept where they are the best."""
        if (rows := self.validation) is None:
            return {}
        terms = self.workers.of_first(
            lambda: mean_elbo(self.model, self.guide, rows, seed=self.seed, withheld=self.withheld)
        )
        elbo = float(terms.elbo)
        if self.epoch >= self.training.ends and elbo > self.best_elbo:
            self.best_elbo, self.best_epoch = elbo, self.epoch
            if self.patience is not None:
                held = weights(self.model, self.guide)
                self.best = {name: tensor.clone() for name, tensor in held.items()}
        return {
            "validation_elbo": elbo,
            "validation_reconstruction": float(terms.reconstruction),
            "validation_kl": float(terms.kl),
        }

    def _out_of_patience(self) -> bool:
        if self.patience is None:
            return False
        return self.epoch - max(self.best_epoch, self.training.ends) >= self.patience

    # -- on disk -------------------------------------------------------------------------------

    def start(self, resume: bool, step: int | None = None) -> None:
        """Take up the last checkpoint, or that of a step, or save the first one."""
        checkpoint = self.workers.of_first(
            lambda: self.run.latest(step) if self.run is not None and resume else None
        )
        if checkpoint is not None:
            self.restore(checkpoint)
        else:
            self.workers.seed_noise(self.seed, step=0)
            self.save()

    def checkpoint_due(self) -> bool:
        if self.run is None:
            return False
        return time.monotonic() - self.saved_at > self.checkpoint_seconds

    def save(self) -> None:
        if self.workers.folder is None:
            return
        self._check_losses()
        for name, parameter in weights(self.model, self.guide).items():
            if parameter.is_floating_point() and not parameter.isfinite().all():
                self._stop(f"parameter {name} is no longer finite")
        owns = self.workers.gather(self._own())
        if self.run is None:
            return
        if self.best is not None:
            self.run.save_as("best", self.best, {"epoch": self.best_epoch, "elbo": self.best_elbo})
        tensors = weights(self.model, self.guide)
        if (own := self.training.state) is not None:
            tensors |= {f"objective.{name}": value for name, value in own.state_dict().items()}
        if self.average is not None:
            tensors |= self.average.state()
        optimizer = self.optimizer.state_dict()
        for index, slots in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items()}
        for rank, own in enumerate(owns):
            tensors |= {f"worker.{rank}.{name}": value for name, value in own.items()}
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "best_elbo": self.best_elbo,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "optimizer": optimizer["param_groups"],
            "scheduler": None if self.scheduler is None else _plain_state(self.scheduler),
        }
        self.run.save(tensors, state, step=self.epoch * self.batches + self.batch)
        self.saved_at = time.monotonic()

    def _own(self) -> dict[str, Tensor]:
        """What each worker has for itself."""
        own = {"random.cpu": torch.get_rng_state(), "totals": self.training.totals.cpu()}
        if self.device.type == "cuda":
            own["random.cuda"] = torch.cuda.get_rng_state(self.device)
        averages = self.svi.averages.items()
        return own | {f"average.{name}": value.detach().cpu() for name, value in averages}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, which any number of workers can have left."""
        state, tensors = checkpoint.state, checkpoint.tensors
        load_weights(self.model, self.guide, tensors)
        if self.average is not None:
            self.average.restore(tensors, state["epoch"])
        if (own := self.training.state) is not None:
            own.load_state_dict({name: tensors[f"objective.{name}"] for name in own.state_dict()})
        slots: dict[int, dict[str, Tensor]] = {}
        owns: dict[int, dict[str, Tensor]] = {}  # by worker
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
            elif name.startswith("worker."):
                _, rank, key = name.split(".", 2)
                owns.setdefault(int(rank), {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["optimizer"]})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.best_elbo, self.best_epoch = state["best_elbo"], state["best_epoch"]
        self.seconds = state["seconds"]
        if self.patience is not None:
            self._restore_best()
        self.history = self.workers.of_first(self._rewound)
        self._restore_own(owns)

    def _restore_own(self, owns: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take up what workers had for themselves, by rank: there may be more now, or fewer."""
        rank, count = self.workers.rank, self.workers.count
        self.training.totals.zero_()
        for left in range(rank, len(owns), count):
            self.training.totals += owns[left]["totals"].to(self.device)
        for name, value in owns.get(rank, owns[0]).items():
            if name.startswith("average."):
                average = value.to(self.device).requires_grad_()
                self.svi.averages[name.removeprefix("average.")] = average
        if rank not in owns:
            self.workers.seed_noise(self.seed, step=self.epoch * self.batches + self.batch)
            return
        torch.set_rng_state(owns[rank]["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(owns[rank]["random.cuda"], self.device)

    def _rewound(self) -> list[dict[str, float]]:
        assert self.run is not None
        self.run.rewind(self.epoch)
        return self.run.metrics()

    def _restore_best(self) -> None:
        best = self.workers.of_first(self._best_on_disk)
        self.best, self.best_elbo, self.best_epoch = best

    def _best_on_disk(self) -> tuple[dict[str, Tensor] | None, float, int]:
        """The best weights, with their ELBO and epoch."""
        assert self.run is not None
        try:
            best = self.run.load("best")
        except CorruptCheckpoint as error:
            warnings.warn(
                f"{error}; the search for the best weights begins anew",
                RuntimeWarning,
                stacklevel=2,
            )
            return None, -math.inf, 0
        return None if best is None else best.tensors, self.best_elbo, self.best_epoch

    def status(self, status: str) -> None:
        if self.run is not None:
            self.run.update(
                status=status,
                epochs_done=self.epoch,
                seconds=self.seconds,
                compile_seconds=self.svi.compile_seconds,
            )

    def _stop(self, why: str) -> NoReturn:
        self.status("failed")
        kept = (
            "" if self.run is None else f" The last good checkpoint is kept in {self.run.folder}."
        )
        raise NonFiniteLoss(
            f"epoch {self.epoch + 1}, batch {self.batch + 1}: {why}.{kept} Try a lower learning "
            "rate, max_grad_norm, a longer warm-up, or look for extreme values in the data."
        ) from None


def train(
    loops: Sequence[TrainingLoop],
    take: Callable[[Sequence[Any]], list[Any]],
    show: Callable[[dict[str, float]], Any],
    interrupted: threading.Event,
) -> None:
    """Run trainings to their end, step by step together: one, or replicas with as many epochs.

    Args:
        take: takes a step of each on a batch of its own; returns their losses.
        show: is given each epoch's figures, of replicas their mean.
        interrupted: is looked at after each step.

    Raises:
        KeyboardInterrupt: it was set; a checkpoint has been saved.
    """
    first = loops[0]
    first.workers.wishes = (interrupted.is_set, first.checkpoint_due)
    while any(loop.running for loop in loops):
        started = time.monotonic()
        for batches in zip(*(loop.batches_left() for loop in loops), strict=True):
            for loop in loops:
                loop.anneal()
            for loop, loss in zip(loops, take(batches), strict=True):
                loop.taken(loss)
            interrupt, checkpoint = first.workers.agreed()
            if interrupt:
                for loop in loops:
                    loop.seconds += time.monotonic() - started
                    loop.save()
                    loop.status("interrupted")
                raise KeyboardInterrupt(first.run.folder if first.run is not None else "")
            if checkpoint:
                for loop in loops:
                    loop.save()
        rows = []
        for loop in loops:
            if loop.running:
                loop.seconds += time.monotonic() - started
                rows.append(loop.end_epoch())
            else:
                loop.pass_epoch()
        show({name: statistics.fmean(row[name] for row in rows) for name in rows[0]})
    for loop in loops:
        loop.finish()


def weights(model: nn.Module, guide: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a pair, by the names they have in a checkpoint."""
    return {
        f"{role}.{name}": tensor.detach()
        for role, module in (("model", model), ("guide", guide))
        for name, tensor in module.state_dict().items()
    }


def load_weights(model: nn.Module, guide: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights into a pair.

    Raises:
        ValueError: names or shapes differ from those of the pair.
    """
    for role, module in (("model", model), ("guide", guide)):
        own = {
            k.removeprefix(f"{role}."): v for k, v in tensors.items() if k.startswith(f"{role}.")
        }
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint is not one of this {role}, {type(module).__name__}: {error}"
            ) from None


def _culprit(model: GenerativeModel, guide: nn.Module, batch: dict[str, Tensor]) -> str:
    """Which site, or parameter, of a failing step is not finite."""
    for name, tensor in weights(model, guide).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"parameter {name} is not finite"
    with torch.no_grad():
        model_trace, guide_trace = paired_traces(model, guide, **batch)
        for role, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, node in sample_nodes(trace):
                for what, value in (
                    ("drew", node["value"]),
                    ("has log-probability", node["fn"].log_prob(node["value"])),
                ):
                    if not value.isfinite().all():
                        wrong = value[~value.isfinite()][0].item()
                        return f"site {name!r} of the {role} {what} {wrong}"
    return "every site is finite on a second run of the batch: the failing draw was a rare one"


def _plain_state(scheduler: LRScheduler | ReduceLROnPlateau) -> dict[str, Any]:
    """A scheduler's state in JSON types; functions, which it cannot save either, left out."""
    plain = (bool, int, float, str, list, dict, type(None))
    return {k: v for k, v in scheduler.state_dict().items() if isinstance(v, plain)}


@contextmanager
def interruption(*, launched: bool = False) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that a step is never cut in the middle.

    Args:
        launched: by a launcher of several processes. It stops them by SIGTERM too, and sends on a
            Ctrl-C that the terminal has sent them already: no second signal cuts the step.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def set_event(*_: Any) -> None:
        if event.is_set() and not launched:  # a second one means it
            raise KeyboardInterrupt
        event.set()

    signals = (signal.SIGINT, signal.SIGTERM) if launched else (signal.SIGINT,)
    before = {number: signal.signal(number, set_event) for number in signals}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
