"""Which rows make up the batches of an epoch, where only some have labels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from ppl_vae.batches import PartlyLabeled, Shuffled, composition, known_columns
from ppl_vae.data import Dataset
from ppl_vae.feed import Resident, Streamed
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.vae import VAE

ROWS, K = 20, 3


def labels(known: int) -> Tensor:
    """Of the first rows, in turn; the others' are withheld."""
    y = torch.arange(ROWS) % K
    y[known:] = -1
    return y


def data(y: Tensor | None = None) -> Dataset:
    x = (torch.arange(ROWS * 6).reshape(ROWS, 6) % 2).to(torch.uint8)
    return Dataset("rows", {"train": {"x": x} | ({} if y is None else {"y": y})})


def composed(known: int, batch_size: int, labeled: int | None = None, seed: int = 0) -> Shuffled:
    return composition(M2.toy(), data(labels(known)).split("train"), batch_size, labeled, seed)


@pytest.mark.parametrize(
    ("known", "batch_size", "labeled", "expected"),
    [(7, 8, None, 4), (7, 8, 1, 1), (7, 8, 7, 7), (3, 12, None, 3), (7, 30, None, 7), (7, 2, 1, 1)],
)
def test_an_epoch_is_all_rows_without_labels_once(known, batch_size, labeled, expected):
    order = composed(known, batch_size, labeled)
    assert order.labeled == expected
    rows = order.order(3)
    assert len(rows) == len(order)
    unknown: list[int] = []
    for batch in rows:
        assert batch[:expected].max() < known <= batch[expected:].min()
        unknown += batch[expected:].tolist()
    assert sorted(unknown) == list(range(known, ROWS))
    size = min(batch_size, expected + ROWS - known)
    assert {len(batch) for batch in rows[:-1]} <= {size}
    assert expected < len(rows[-1]) <= size


def test_all_rows_with_labels_come_before_any_comes_again():
    """From one epoch to the next as within one."""
    order = composed(7, 8, 3)
    stream = torch.cat([batch[:3] for epoch in range(9) for batch in order.order(epoch)]).tolist()
    turns = [stream[start : start + 7] for start in range(0, len(stream) - 6, 7)]
    assert len(turns) > 10
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == len(turns), "each turn in an order of its own"


def test_a_batch_larger_than_a_turn_has_its_rows_evenly():
    known, unknown = torch.tensor([2, 5]), torch.arange(10, 20)
    (batch,) = PartlyLabeled(known, unknown, 15, 5, seed=0).order(0)
    assert sorted(Counter(batch[:5].tolist()).values()) == [2, 3]


def test_the_order_is_a_function_of_seed_and_epoch():
    one, same, other = (composed(7, 8, seed=s) for s in (1, 1, 2))
    for epoch in (5, 0):
        assert torch.equal(torch.cat(one.order(epoch)), torch.cat(same.order(epoch)))
        assert not torch.equal(torch.cat(one.order(epoch)), torch.cat(other.order(epoch)))
    assert not torch.equal(torch.cat(one.order(0)), torch.cat(one.order(1)))


def test_rows_that_are_alike_are_only_shuffled():
    for model, y in ((M2.toy(), labels(ROWS)), (M2.toy(), None), (VAE.toy(), labels(7))):
        order = composition(model, data(y).split("train"), 8, None, 0)
        assert type(order) is Shuffled
        assert order.labeled is None
        assert sorted(torch.cat(order.order(0)).tolist()) == list(range(ROWS))
        plain = Shuffled(ROWS, 8, 0).order(4)
        assert all(map(torch.equal, order.order(4), plain))


def test_what_cannot_be_put_into_batches_is_refused():
    for labeled in (0, 8, -1, 9):
        with pytest.raises(ValueError, match=rf"labeled_batch={labeled}, batch_size=8: expected"):
            composed(7, 8, labeled)
    with pytest.raises(ValueError, match=r"labeled_batch=0, batch_size=1"):
        composed(7, 1)
    for model, y in ((M2.toy(), labels(ROWS)), (VAE.toy(), labels(7))):
        with pytest.raises(ValueError, match=r"labeled_batch=3: no labels are withheld.*labeled\("):
            composition(model, data(y).split("train"), 8, 3, 0)
    with pytest.raises(ValueError, match=r"class 2 has no row with a label.*fewer than 3"):
        composed(2, 8)


@pytest.mark.parametrize("feed", [Resident, Streamed])
def test_a_step_gets_the_labels_of_the_first_rows_alone(feed):
    model, rows = M2.toy(), data(labels(7)).split("train")
    order = composition(model, rows, 8, 3, 0).order(0)
    made = feed(model, rows, torch.device("cpu"), torch.float32, 3)
    for numbers, batch in zip(order, made.batches(order), strict=True):
        found = made(batch)
        assert set(found) == {"x", "y", "total", "labeled"}
        assert (found["total"], found["labeled"]) == (ROWS, 7)
        assert torch.equal(found["x"], rows.stored["x"][numbers].float())
        assert torch.equal(found["y"], torch.eye(K)[numbers[:3] % K])
    whole = feed(model, data(labels(ROWS)).split("train"), torch.device("cpu"), torch.float32)
    found = whole(next(iter(whole.batches(order[:1]))))
    assert set(found) == {"x", "y", "total"}
    assert len(found["y"]) == len(found["x"])


def test_what_is_known_of_rows():
    parts = list(known_columns(data(labels(7)).split("train"), None, torch.float32))
    assert [("y" in part, len(part["x"])) for part in parts] == [(False, ROWS), (True, 7)]
    assert (parts[1]["y"] >= 0).all()
    (whole,) = known_columns(data(labels(ROWS)).split("train"), None, None)
    assert "y" in whole
