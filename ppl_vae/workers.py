"""The processes that train one run together: what they add up, and what they agree on.

Each takes its share of the rows of every batch and holds a copy of all weights. Loss and gradients
are added up over the workers, weighted by their rows, between gradients and optimizer; then every
copy takes the same step. The first worker alone writes the run's folder.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

from ppl_vae.assumptions import buffers
from ppl_vae.svi import SVI, Reduce, parameters

T = TypeVar("T")


AGREED = (KeyboardInterrupt, FloatingPointError)
"""Errors that all workers raise after the same step: Ctrl-C, and a loss that is not finite."""


class WorkerLost(ConnectionError):
    """Another worker of the run has ended, or cannot be reached any more."""


class Alone:
    """The only process of a run: it shares nothing, and agrees with itself.

    Attributes:
        rank, count: which worker this is, and of how many.
        wishes: conditions on which the loop acts as soon as a worker finds them true.
        folder: where the run is kept, if anywhere; known to every worker.
    """

    rank = 0
    count = 1

    def __init__(self) -> None:
        self.wishes: Sequence[Callable[[], bool]] = ()
        self.folder: Path | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def reduce(self) -> Reduce | None:
        """What ``SVI`` has to do between gradients and optimizer."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the others, if by an error, so that they do not wait for this one."""

    def share(self, numbers: Tensor) -> Tensor:
        """This worker's part ``(own rows,)`` of a batch's row numbers ``(rows,)``; can be empty."""
        return numbers

    def step(self, svi: SVI, batch: Any) -> Any:
        """Take a step on this worker's part of a batch. Returns the loss of the whole batch."""
        return svi.update(batch)

    def agreed(self) -> list[bool]:
        """Whether each wish was true of any worker in the last step."""
        return [wish() for wish in self.wishes]

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, for all; the others do not call ``make``."""
        return make()

    def gather(self, own: T) -> list[T]:
        """What every worker has, by rank."""
        return [own]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor, of the same shape on each worker, by the sum over the workers."""

    def seed_noise(self, seed: int, step: int) -> None:
        """Give a worker that is new to a run, at a step of it, a random state of its own. The
        first one has that of a run without others."""


class Several(Alone):
    """One of several processes, each with a copy of what is trained; all begin with the first's.

    Floating-point buffers, such as running statistics of batch norm, are the first worker's after
    every step, as under torch's DistributedDataParallel: exact copies, so that constants among
    them stay what they are. Statistics of a training batch are those of a worker's share.

    Args:
        fabric: launched.
        programs: model, guide and what an objective learns, on Fabric's device; all parameters that
            are trained have one dtype.

    Raises:
        WorkerLost: here and in every method, if another worker has ended.
    """

    def __init__(self, fabric: Fabric, *programs: nn.Module) -> None:
        super().__init__()
        self.rank, self.count = fabric.global_rank, fabric.world_size
        atexit.register(_leave)
        self._programs = programs
        self._trained: list[Tensor] = [*parameters(*programs)]
        self._rows = 0
        self._agreed: list[bool] = []
        held = [parameter for program in programs for parameter in program.parameters()]
        with self._connected(), torch.no_grad():
            for tensor in (*held, *(slot.tensor for slot in buffers(*programs))):
                distributed.broadcast(tensor, 0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an agreed error nobody waits for this worker, and its rank still says who speaks.
        if error is not None and not isinstance(error, AGREED) and distributed.is_initialized():
            distributed.destroy_process_group()

    def share(self, numbers: Tensor) -> Tensor:
        return numbers.tensor_split(self.count)[self.rank]

    def step(self, svi: SVI, batch: Any) -> Any:
        self._rows = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        # Without rows there is nothing to run, but the others' gradients to step on.
        return svi.update(batch) if self._rows else svi.finish(0.0, [])

    @property
    def reduce(self) -> Reduce:
        return self._average

    def _average(self, loss: Any, used: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Average loss and gradients over all rows of the workers, in one message.

        What else all have to know travels with them: wishes, which parameters have a gradient on
        any worker, and the first worker's buffers.

        Args:
            loss: of this worker's rows, per datum.
            used: the parameters that it has put a gradient on.
        """
        own = set(map(id, used))
        wished = [wish() for wish in self.wishes]
        flags = [self._rows, *wished, *(id(p) in own for p in self._trained)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        moving = [s.tensor for s in buffers(*self._programs) if s.tensor.is_floating_point()]
        like = gradients[0]
        counts, total, *summed = self._added_up(
            like.new_tensor(flags),
            self._rows * torch.as_tensor(loss).to(like),
            *(self._rows * gradient for gradient in gradients),
            *(tensor if self.first else torch.zeros_like(tensor) for tensor in moving),
        )
        rows, *flags = counts.tolist()
        self._agreed = [count > 0 for count in flags[: len(wished)]]
        used = []
        gradients, values = summed[: len(gradients)], summed[len(gradients) :]
        for parameter, count, gradient in zip(
            self._trained, flags[len(wished) :], gradients, strict=True
        ):
            if count > 0:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(gradient / rows)
                used.append(parameter)
        for tensor, value in zip(moving, values, strict=True):
            tensor.copy_(value)
        return total.item() / rows, used

    def _added_up(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors of any shapes, summed over the workers."""
        message = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self.add_up(message)
        parts = message.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def agreed(self) -> list[bool]:
        return self._agreed

    def of_first(self, make: Callable[[], T]) -> T:
        held = [make() if self.first else None]
        with self._connected():
            distributed.broadcast_object_list(held, 0)
        return held[0]  # pyright: ignore[reportReturnType]

    def gather(self, own: T) -> list[T]:
        held: list[Any] = [None] * self.count
        with self._connected():
            distributed.all_gather_object(held, own)
        return held

    def add_up(self, tensor: Tensor) -> None:
        with self._connected():
            distributed.all_reduce(tensor)

    def seed_noise(self, seed: int, step: int) -> None:
        if not self.first:
            digest = hashlib.sha256(f"{seed} {self.rank} {step}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little"))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turns what a collective raises into a sentence."""
        try:
            yield
        except RuntimeError as error:  # gloo's, NCCL's and the store's
            kept = (
                ""
                if self.folder is None
                else f". The last good checkpoint is in {self.folder}; go on, with any number of "
                f"workers, by: ppl-vae fit --resume {self.folder}"
            )
            raise WorkerLost(
                f"worker {self.rank} of {self.count} has lost another one, which ended or cannot "
                f"be reached{kept}"
            ) from error


def _leave() -> None:
    """End the process group before Python ends, or its threads may abort the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
