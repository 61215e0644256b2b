"""What a classifier learns from rows with labels alone: what semi-supervision is held against."""

from __future__ import annotations

import copy
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae.calibration import LabelScores
from ppl_vae.conditionals import join
from ppl_vae.data import Dataset, Rows
from ppl_vae.discrete import Discrete
from ppl_vae.guide import Factorized
from ppl_vae.recipes import Experiment
from ppl_vae.sites import aside, evaluating

BATCH = 100
"""Rows of a batch; all rows with labels where those are fewer."""

EVERY, PATIENCE, MOST = 10, 50, 20_000
"""Steps between looks at the validation rows; looks without a better one before stopping; steps."""

RULE = (
    f"Adam with a learning rate of 0.001, cross-entropy only, batches of at most {BATCH} rows with "
    f"labels; every {EVERY} steps the log loss of the validation rows, whose labels it sees (the "
    f"others do not); {PATIENCE} times without a better one end it, {MOST:,} steps at most; the "
    "best weights are kept"
)
"""How a baseline is trained and when it stops, for reports."""


class Supervised(NamedTuple):
    """A classifier that was trained on the rows with labels.

    Attributes:
        net: x to logits, with its best weights, in evaluation mode.
        scores: on the test rows.
        seconds: of training, looks at the validation rows included.
        steps: taken.
        best_step: whose weights these are.
    """

    net: nn.Module
    scores: LabelScores
    seconds: float
    steps: int
    best_step: int


class Classifier(nn.Module):
    """A guide's net for q(y | x), alone: a copy with the weights as they are.

    Where the guide draws other latents before the label, the net is given zeros for them, so that
    it is a function of x by as many weights as count.

    Args:
        made: an experiment whose guide is written out and has a site "y".

    Raises:
        ValueError: its guide has no such net.
    """

    def __init__(self, made: Experiment) -> None:
        super().__init__()
        guide = made.guide
        if not isinstance(guide, Factorized) or (conditional := classifier(guide)) is None:
            raise ValueError(
                f"{type(guide).__name__} has no net for q(y | x): write the guide out, "
                "Factorized(y=(Labels(net), ['x']), ...)"
            )
        self.net = copy.deepcopy(conditional.net)
        self._context = guide.contexts["y"]
        example = made.data.split("train").batch(slice(0, 2))["x"]
        with evaluating(0, guide):
            drawn = guide(x=example)
        self._widths = {name: drawn[name].shape[-1] for name in self._context}

    def forward(self, x: Tensor) -> Tensor:
        context = (
            x if name == "x" else x.new_zeros(*x.shape[:-1], self._widths[name])
            for name in self._context
        )
        return self.net(join(*context))


def classifier(guide: nn.Module) -> Discrete | None:
    """A guide's conditional q(y | x); None where it is not written out or has no labels."""
    if not isinstance(guide, Factorized) or "y" not in guide.conditionals:
        return None
    found = guide.conditionals["y"]
    return found if isinstance(found, Discrete) else None


def fit_supervised(made: Experiment, *, seed: int = 0, device: str = "cpu") -> Supervised:
    """Train the classifier of an experiment, as it is built, on its rows with labels alone.

    By cross-entropy, :data:`RULE`. The recipe's own settings do not matter; the data are prepared
    as they are there, bits drawn anew at each step where they are. Leaves torch's random state as
    it was, and the experiment's guide.

    Args:
        made: built, not fitted: the net starts from its weights.
        seed: of the order of rows and of bits.
        device: "cpu" or "cuda".

    Raises:
        ValueError: the guide has no net for q(y | x); the data have no validation or test rows, or
            no labels.
    """
    data = made.data
    _check(data)
    train = data.split("train")
    known = train.labeled
    known = torch.arange(len(train)) if known is None else known
    net = Classifier(made).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    best, best_loss, best_step, step = copy.deepcopy(net.state_dict()), math.inf, 0, 0
    started = time.monotonic()
    with aside():
        torch.manual_seed(seed)
        stream = torch.Generator().manual_seed(seed)
        while step < MOST and step - best_step < EVERY * PATIENCE:
            for chosen in known[torch.randperm(len(known), generator=stream)].split(BATCH):
                columns = train.batch(chosen, device)
                optimizer.zero_grad()
                F.cross_entropy(net(columns["x"]), columns["y"]).backward()
                optimizer.step()
                step += 1
                if step % EVERY == 0:
                    p, labels = _predicted(net, data.split("validation"), device)
                    loss = F.nll_loss(p.log(), labels).item()
                    if loss < best_loss:
                        best_loss, best_step = loss, step
                        best = copy.deepcopy(net.state_dict())
        seconds = time.monotonic() - started
        net.load_state_dict(best)
        scores = LabelScores.of(*_predicted(net, data.split("test"), device))
    return Supervised(net.eval(), scores, seconds, step, best_step)


def _predicted(net: nn.Module, rows: Rows, device: str) -> tuple[Tensor, Tensor]:
    """Probabilities ``(rows, K)`` in float64, and labels."""
    net.eval()
    with torch.no_grad():
        pairs = [(net(b["x"]), b["y"]) for b in rows.batches(1000, device)]
    net.train()
    logits, labels = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))
    return logits.double().softmax(1), labels


def _check(data: Dataset) -> None:
    if missing := {"x", "y"} - set(data.columns):
        raise ValueError(f"{data.name} has no column {min(missing)!r} to learn a classifier from")
    for split in ("validation", "test"):
        data.split(split)  # is there
