from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppl_vae.metrics import Metrics


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(tmp_path / "metrics.csv")


def test_numbers_come_back_exactly(metrics: Metrics) -> None:
    assert metrics.rows() == []
    generator = random.Random(0)
    rows: list[dict[str, float]] = [
        {"epoch": epoch, "nll": math.ldexp(generator.random(), -epoch), "val/kl": -0.0}
        for epoch in range(50)
    ]
    rows.append({"epoch": 2**60 + 1, "nll": math.inf, "val/kl": -math.inf})
    for row in rows:
        metrics.log(dict(reversed(row.items())) if row["epoch"] == 7 else row)
    foreign: Any = {"epoch": np.int64(0), "nll": np.float64(0.1), "val/kl": torch.tensor(math.nan)}
    metrics.log(foreign)
    rows.append({"epoch": 0, "nll": 0.1, "val/kl": math.nan})
    assert repr(Metrics(metrics.path).rows()) == repr(rows)


def test_other_columns_are_refused(metrics: Metrics) -> None:
    for names in ([], *(["epoch", name] for name in ("", "a,b", "a\nb", 'a"b', "a b"))):
        with pytest.raises(ValueError, match="need names"):
            metrics.log(dict.fromkeys(names, 1))
    assert metrics.rows() == []
    metrics.log({"epoch": 1, "nll": 2.0})
    for names in (["epoch"], ["epoch", "nll", "kl"], ["epoch", "kl"]):
        with pytest.raises(ValueError, match="columns"):
            metrics.log(dict.fromkeys(names, 2))
    assert metrics.rows() == [{"epoch": 1, "nll": 2.0}]


@pytest.mark.parametrize("rewind", [False, True])
def test_a_line_cut_short_anywhere_is_dropped(metrics: Metrics, rewind: bool) -> None:
    rows = [{"epoch": epoch, "β": epoch + 0.125} for epoch in range(3)]
    for row in rows:
        metrics.log(row)
    whole = metrics.path.read_bytes()
    assert whole.decode() == "epoch,β\n0,0.125\n1,1.125\n2,2.125\n"
    for length in range(len(whole)):
        metrics.path.write_bytes(whole[:length])
        complete = max(whole[:length].count(b"\n") - 1, 0)
        assert metrics.rows() == rows[:complete]
        if rewind:
            metrics.rewind(10)
            assert metrics.rows() == rows[:complete]
        for row in rows[complete:]:
            metrics.log(row)
        assert metrics.path.read_bytes() == whole


def test_rewind_keeps_earlier_epochs_byte_for_byte(metrics: Metrics) -> None:
    metrics.rewind(3)  # nothing yet: nothing to do
    for epoch in range(1, 6):
        metrics.log({"epoch": epoch, "nll": 1 / epoch})
    lines = metrics.path.read_bytes().splitlines(keepends=True)
    metrics.rewind(3)
    assert metrics.path.read_bytes() == b"".join(lines[:4])
    metrics.log({"epoch": 4, "nll": 0.0})
    assert [row["epoch"] for row in metrics.rows()] == [1, 2, 3, 4]
    metrics.rewind(0)
    metrics.log({"epoch": 1, "nll": 0.5})
    assert metrics.rows() == [{"epoch": 1, "nll": 0.5}]


def test_a_broken_line_is_named(metrics: Metrics) -> None:
    metrics.log({"step": 1, "nll": 2.0})
    with pytest.raises(ValueError, match="no column 'epoch'"):
        metrics.rewind(1)
    for broken in (b"2,spam", b"2"):
        metrics.path.write_bytes(b"step,nll\n1,2.0\n" + broken + b"\n3,1.0\n")
        with pytest.raises(ValueError, match=r"metrics\.csv, line 3"):
            metrics.rows()
