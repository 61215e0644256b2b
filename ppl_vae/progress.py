"""How trainings and checks show themselves: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Show(Protocol):
    """Shows an epoch's row of metrics."""

    def __call__(self, row: Mapping[str, float], /) -> None: ...


@contextmanager
def training_progress(epochs: int, done: int, *, enabled: bool) -> Iterator[Show]:
    """Gives a function that shows each epoch's ELBO, its two parts, and the time left."""
    console = Console(file=sys.stderr)
    if not enabled:
        yield lambda row: None
    elif not console.is_terminal:
        every = max(1, epochs // 10)

        def line(row: Mapping[str, float]) -> None:
            if row["epoch"] % every == 0 or row["epoch"] == epochs:
                print(f"epoch {row['epoch']:.0f}/{epochs}  {summary(row)}", file=sys.stderr)

        yield line
    else:
        columns = (
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=epochs, completed=done)

            def advance(row: Mapping[str, float]) -> None:
                bar.update(task, completed=row["epoch"], description=summary(row))

            yield advance


@contextmanager
def tensorboard_writer(folder: Path | None, done: int) -> Iterator[Show]:
    """Gives a function that writes each epoch's metrics to ``folder`` for TensorBoard; those of
    epochs after ``done``, of a run that is resumed there, are dropped."""
    if folder is None:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            'tensorboard=True: TensorBoard is not installed; pip install "ppl-vae[tensorboard]"'
        ) from None

    with SummaryWriter(str(folder), purge_step=done + 1) as writer:

        def write(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(row["epoch"]))

        yield write


def summary(row: Mapping[str, float]) -> str:
    """An epoch in one line, in nats per datum.

    >>> summary({"elbo": -95.5, "reconstruction": -70.25, "kl": 25.25})
    'ELBO -95.50 = reconstruction -70.25 - KL 25.25'
    """
    parts = (
        f"ELBO {row['elbo']:.2f} = reconstruction {row['reconstruction']:.2f} - KL {row['kl']:.2f}"
    )
    if "validation_elbo" in row:
        parts += f", validation ELBO {row['validation_elbo']:.2f}"
    return parts


@contextmanager
def checking_progress(
    checks: int, *, enabled: bool
) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """Gives a function that shows that a check starts; what it returns is told how far it is."""
    console = Console(file=sys.stderr)
    if not enabled:
        yield lambda name: lambda done: None
    elif not console.is_terminal:

        def line(name: str) -> Callable[[float], None]:
            print(f"checking {name}", file=sys.stderr)
            return lambda done: None

        yield line
    else:
        with Progress(
            TextColumn("checking"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        ) as bar:
            task, begun = bar.add_task("", total=checks), -1

            def start(name: str) -> Callable[[float], None]:
                nonlocal begun
                begun += 1
                number = begun
                bar.update(task, completed=number, description=name)
                return lambda done: bar.update(task, completed=number + done)

            yield start
