"""Which rows make up each batch of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_vae.data import Rows
from ppl_vae.model import GenerativeModel


class Shuffled:
    """All rows once an epoch, in an order that is a function of seed and epoch.

    So a checkpoint within an epoch needs no list.

    Args:
        rows: their number.
        batch_size: rows of a batch; the last one may be smaller.
        seed: of the order.

    Attributes:
        labeled: how many rows of a batch have labels, the first ones; None: all are alike.
    """

    labeled: int | None = None

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._numbers = torch.arange(rows)
        self._size, self._seed = batch_size, seed

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return math.ceil(len(self._numbers) / self._size)

    def order(self, epoch: int) -> list[Tensor]:
        """The row numbers of each batch."""
        order = torch.randperm(len(self._numbers), generator=_generator(self._seed, epoch))
        return list(self._numbers[order].split(self._size))


class PartlyLabeled(Shuffled):
    """Rows with labels first in each batch, then rows without.

    An epoch is all rows without labels once; those with labels come in turn, all of them before
    any comes again.

    Args:
        known: the numbers of the rows with labels; ``unknown``, of those without.
        batch_size: rows of a batch of both kinds; the last one may be smaller.
        labeled: rows of a batch with labels.
        seed: of the order.
    """

    def __init__(
        self, known: Tensor, unknown: Tensor, batch_size: int, labeled: int, seed: int
    ) -> None:
        super().__init__(len(unknown), batch_size - labeled, seed)
        self._numbers, self._known, self.labeled = unknown, known, labeled

    def order(self, epoch: int) -> list[Tensor]:
        assert self.labeled is not None
        unknown = super().order(epoch)
        rows, taken = len(self._known), len(unknown) * self.labeled
        # Turns go on from one epoch to the next.
        turn, start = divmod(epoch * taken, rows)
        orders = [
            self._known[torch.randperm(rows, generator=_generator(~self._seed, turn + more))]
            for more in range(math.ceil((start + taken) / rows))
        ]
        known = torch.cat(orders)[start : start + taken].split(self.labeled)
        return [torch.cat(pair) for pair in zip(known, unknown, strict=True)]


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def composition(
    model: GenerativeModel, rows: Rows, batch_size: int, labeled: int | None, seed: int
) -> Shuffled:
    """How a model's training rows are put into batches: by labels, where some are withheld.

    Args:
        labeled: rows of a batch with labels; None: half of them, or all rows with labels where
            those are fewer.

    Raises:
        ValueError: a class none of whose rows has a label;
            ``labeled`` where no labels are withheld, or as many as a batch has rows.
    """
    known = rows.labeled if "y" in model.observables else None
    if known is None:
        if labeled is not None:
            raise ValueError(
                f"labeled_batch={labeled}: no labels are withheld from the training rows, or the "
                "model does not observe them; withhold some with Dataset.labeled(count)"
            )
        return Shuffled(len(rows), min(batch_size, len(rows)), seed)
    given = rows.stored["y"].cpu()[known]
    if model.classes is not None:
        missing = sorted(set(range(model.classes)) - set(given.tolist()))
        if missing:
            raise ValueError(
                f"class {missing[0]} has no row with a label, so nothing says what it is: give it "
                f"one, or build {type(model).__name__} with fewer than {model.classes} classes"
            )
    half = min(len(known), batch_size // 2)
    labeled = half if labeled is None else labeled
    if not 1 <= labeled < batch_size:
        raise ValueError(
            f"labeled_batch={labeled}, batch_size={batch_size}: expected at least a row with a "
            "label in each batch, and one without"
        )
    unknown = torch.ones(len(rows), dtype=torch.bool)
    unknown[known] = False
    numbers = unknown.nonzero().squeeze(1)
    size = min(batch_size, labeled + len(numbers))
    return PartlyLabeled(known, numbers, size, labeled, seed)


def known_columns(
    rows: Rows, device: torch.device | str | None, dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """All that is known of rows, in batches: those without a label have no column of labels."""
    labeled = rows.labeled
    for batch in rows.batches(1000, device, dtype):
        if labeled is None:
            yield batch
        else:
            yield {name: column for name, column in batch.items() if name != "y"}
    if labeled is not None:
        for numbers in labeled.split(1000):
            yield rows.batch(numbers, device, dtype)
