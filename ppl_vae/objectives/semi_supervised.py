"""Rows with labels and rows without, in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppl_vae.objectives.elbo import plain_elbo
from ppl_vae.objectives.evolving import Evolving
from ppl_vae.objectives.objective import Objective, backward, beside
from ppl_vae.objectives.penalties import Penalty
from ppl_vae.sites import PairError


class SemiSupervised(Evolving):
    """The bound of labeled and of unlabeled rows, and a classification term.

        sum_labeled L(x, y) + sum_unlabeled U(x) + alpha N mean_labeled log q(y | x)

    Source: Kingma et al. 2014 (arXiv:1406.5298), eq. 6-9; there ``alpha N`` is called alpha. N is
    the number of all rows, so that alpha is comparable between data sets: a row's classification
    counts ``alpha N / N_labeled`` nats. What multiplies what: of a batch with rows of both kinds,
    the labeled ones stand for all N_labeled, the others for all N_unlabeled, whatever their numbers
    in the batch, in the bound as in the penalties; in the classification term they stand for N.
    Neither that term nor the penalties are weighted by a warm-up of the KL.

    A step takes columns by name. A column that has fewer rows than the others belongs to the first
    rows of the batch: ``svi.step(x=x, y=y, total=50_000, labeled=100)`` with images ``(B, D)`` and
    labels ``(B_labeled, K)``. Where all columns have as many rows, all stand for ``total``:
    labeled where ``y`` is among them. ``fit`` makes such batches of data whose labels are withheld
    in part.

    Args:
        classification: alpha.
        label: the site whose labels are given in part.
        objective: of each kind of rows; None: :func:`plain_elbo` for each.
        penalties: on the classifier, of rows without labels.

    Raises:
        ValueError: a negative ``classification``.
        TypeError: when run, of columns that are not given by name.
        PairError: when run, of a guide that does not draw ``label``.
    """

    def __init__(
        self,
        classification: float = 0.1,
        *,
        label: str = "y",
        objective: Objective | None = None,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        super().__init__()
        if not classification >= 0:
            raise ValueError(f"SemiSupervised({classification}): expected a weight of at least 0")
        self.classification, self.label = classification, label
        self.objective, self.penalties = objective, tuple(penalties)
        self._bounds: dict[bool, Objective] = {}
        states: list[nn.Module] = list(penalties)
        self.ends = max((penalty.ends for penalty in penalties), default=0.0)
        if isinstance(objective, Evolving):
            self.ends = max(self.ends, objective.ends)
            states += [] if objective.state is None else [objective.state]
        self.state = nn.ModuleList(states) if states else None

    def at(self, epoch: float) -> None:
        for penalty in self.penalties:
            penalty.at(epoch)
        if isinstance(self.objective, Evolving):
            self.objective.at(epoch)

    def settings(self) -> dict[str, Any]:
        return {
            "classification": self.classification,
            "label": self.label,
            "objective": self.objective,
            "penalties": list(self.penalties),
        }

    def choose(
        self, model: Callable[..., Any], guide: Callable[..., Any], **columns: Any
    ) -> Objective:
        """Choose the objective of rows of one kind by an example of them; anew for each pair."""
        own = {name: value for name, value in columns.items() if name != "labeled"}
        with beside():
            bound = self.objective or plain_elbo(model, guide, **own)
        self._bounds[self.label in columns] = bound
        return bound

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        def only_loss(objective: Objective, *args: Any, **kwargs: Any) -> Any:
            return objective.loss(*args, **kwargs)

        with torch.no_grad():
            return self._run(only_loss, model, guide, args, kwargs)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return self._run(backward, model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("rows of each kind are traced by an objective of their own")

    def _run(
        self,
        how: Callable[..., Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if args:
            raise TypeError(
                "SemiSupervised takes columns by name, since only some rows have labels: "
                "step(x=..., y=..., total=..., labeled=...)"
            )
        loss: Any = 0.0
        for columns, share in strata(kwargs):
            bound = self._bounds.get(self.label in columns) or self.choose(model, guide, **columns)
            labeled = columns.pop("labeled", None)
            programs = (model, guide)
            if share != 1.0:
                programs = poutine.scale(model, share), poutine.scale(guide, share)
            loss = loss + how(bound, *programs, **columns)
            if (extra := self._extra(programs[1], columns, labeled)) is not None:
                if torch.is_grad_enabled():
                    extra.backward()
                loss = loss + extra.detach()
        return loss

    def _extra(
        self, guide: Callable[..., Any], columns: Mapping[str, Any], labeled: int | None
    ) -> Tensor | None:
        """The classification term, or the penalties, of rows of one kind."""
        given = {name: value for name, value in columns.items() if name != self.label}
        terms: list[Tensor] = []
        if self.classification > 0 and self.label in columns:
            node = self._run_guide(guide, given, {self.label: columns[self.label]})
            # Rows stand for those of their kind; this term for all rows.
            up = columns["total"] / labeled if labeled is not None else 1.0
            log_q = node["fn"].log_prob(node["value"])
            terms.append(-self.classification * up * (node["scale"] * log_q).sum())
        elif self.label not in columns:
            scale: Any = 1.0

            def classify(x: Tensor) -> TorchDistribution:
                nonlocal scale
                node = self._run_guide(guide, {**given, "x": x}, {})
                scale = node["scale"]
                return node["fn"]

            for penalty in self.penalties:
                value = penalty(classify, given["x"])
                # Rows count as they do in the bound.
                terms.append((scale * value.expand(len(given["x"]))).sum())
        return sum(terms[1:], terms[0]) if terms else None

    def _run_guide(
        self, guide: Callable[..., Any], given: Mapping[str, Any], values: dict[str, Tensor]
    ) -> Any:
        """The classifier's site, in a run of the guide that goes so far."""
        conditioned = poutine.condition(guide, data=values)
        try:
            with beside(), _Until(self.label):
                conditioned(**given)
        except _Reached as reached:
            return reached.site
        raise PairError(
            f"SemiSupervised: the guide has no site {self.label!r}, whose labels are given in "
            "part only: give it a classifier q(y | x)"
        )


class _Reached(BaseException):
    """Carries a site out of a run; no error, so that none who catches errors stops it."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site


class _Until(Messenger):
    """Ends a run at a site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise _Reached(msg)


def strata(kwargs: Mapping[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The rows of a batch by what is known of them, each with the share of all rows that they
    stand for.

    Args:
        kwargs: tensors by column; those with fewer rows than others belong to the first rows;
            ``labeled`` of ``total`` rows are as those.

    Raises:
        ValueError: columns of more than two lengths, or without ``labeled`` and ``total``.
    """
    sizes = {name: len(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
    lengths = sorted(set(sizes.values()))
    if len(lengths) < 2:
        return [(dict(kwargs), 1.0)]
    total, labeled = kwargs.get("total"), kwargs.get("labeled")
    if len(lengths) > 2 or total is None or labeled is None or not 0 < labeled < total:
        raise ValueError(
            f"columns of {sizes} rows, labeled={labeled}, total={total}: expected columns of all "
            "rows of the batch and columns of its first rows, and how many of the total rows are "
            "like those, step(x=..., y=..., total=..., labeled=...)"
        )
    known = lengths[0]
    first = {n: v[:known] if n in sizes else v for n, v in kwargs.items()}
    rest = {n: v[known:] if n in sizes else v for n, v in kwargs.items() if sizes.get(n) != known}
    return [(first, labeled / total), (rest, 1 - labeled / total)]
