"""How good and how honest predicted probabilities of classes are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelScores:
    """Scores of predicted probabilities of classes against the true ones, over rows.

    Attributes:
        accuracy, accuracy_se: share of rows whose most probable class is the true one, and its
            standard error over rows.
        log_loss: mean of minus the log-probability of the true class, in nats.
        brier: mean squared distance of the probabilities from the one-hot label, from 0 to 2
            (Brier 1950).
        calibration_error: see :func:`expected_calibration_error`.
        rows: their number.
    """

    accuracy: float
    accuracy_se: float
    log_loss: float
    brier: float
    calibration_error: float
    rows: int

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Self:
        """Of probabilities ``(rows, K)`` and labels ``(rows,)`` from 0 to K - 1.

        Raises:
            ValueError: as :func:`checked`.
        """
        p, labels = checked(probabilities, labels)
        right = (p.argmax(1) == labels).double()
        truth = torch.nn.functional.one_hot(labels, p.shape[1])
        own = p.gather(1, labels.unsqueeze(1)).squeeze(1)
        return cls(
            accuracy=right.mean().item(),
            accuracy_se=(right.std() / math.sqrt(len(right))).item()
            if len(right) > 1
            else math.nan,
            log_loss=-own.log().mean().item(),
            brier=(p - truth).square().sum(1).mean().item(),
            calibration_error=expected_calibration_error(p, labels),
            rows=len(labels),
        )


@dataclass(frozen=True, eq=False)
class LabelPosterior:
    """Probabilities of a label that was not shown, of K classes, row by row.

    Attributes:
        classifier: q(y | x), which is the guide's, ``(rows, K)``; where the guide draws other
            latents before the label, its mean over them.
        importance: p(y | x), which is the model's, by importance sampling of the other latents,
            ``(rows, K)``.
        log_evidence: log p(x) by importance sampling, in nats, ``(rows,)``.
        labels: the true classes ``(rows,)``; None where they are not known.
    """

    classifier: Tensor
    importance: Tensor
    log_evidence: Tensor
    labels: Tensor | None

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """Both, by what they come from."""
        return {"classifier": self.classifier, "importance": self.importance}

    def known(self) -> Tensor:
        """The true classes.

        Raises:
            ValueError: they are not known.
        """
        if self.labels is None:
            raise ValueError("the rows have no labels to compare with: give data with a column 'y'")
        return self.labels

    def scores(self) -> Mapping[str, LabelScores]:
        """Of both. Raises as :meth:`known`."""
        labels = self.known()
        return {name: LabelScores.of(p, labels) for name, p in self.probabilities.items()}


class Reliability(NamedTuple):
    """Rows by how sure a prediction is: a figure a bin that is not empty.

    Attributes:
        confidence: mean probability of the most probable class.
        accuracy: share of rows where that is the true one.
        rows: their number.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins of equal width between 0 and 1.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2.

    Raises:
        ValueError: bins below 1, or as :func:`checked`.
    """
    if bins < 1:
        raise ValueError(f"reliability(bins={bins}): expected at least 1")
    p, labels = checked(probabilities, labels)
    confidence, chosen = p.max(1)
    number = _bin(confidence, bins)
    rows = torch.bincount(number, minlength=bins)
    right = torch.bincount(number, (chosen == labels).double(), minlength=bins)
    sure = torch.bincount(number, confidence, minlength=bins)
    some = rows > 0
    return Reliability(
        confidence=(sure / rows)[some].numpy(),
        accuracy=(right / rows)[some].numpy(),
        rows=rows[some].numpy(),
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Distance of accuracy from confidence, averaged over rows, in bins of confidence.

    Source: Guo et al. 2017 (arXiv:1706.04599), eq. 3. From 0 to 1; it is biased upwards where bins
    have few rows.

    Raises: as :func:`reliability`.
    """
    found = reliability(probabilities, labels, bins)
    share = found.rows / found.rows.sum()
    return float((share * np.abs(found.accuracy - found.confidence)).sum())


def calibrated_accuracy(
    probabilities: Tensor, bins: int = 15, *, replicates: int = 999, seed: int = 0
) -> np.ndarray:
    """Accuracies in the bins of :func:`reliability` if the probabilities are right: labels drawn
    from them, again and again.

    Source: Bröcker & Smith 2007, "Increasing the reliability of reliability diagrams", section 4,
    consistency resampling; here with the predictions as they are, so that a test against these is
    given them.

    Returns:
        ``(replicates, bins that are not empty)``.

    Raises:
        ValueError: bins or replicates below 1, or as :func:`checked`.
    """
    if bins < 1 or replicates < 1:
        raise ValueError(
            f"calibrated_accuracy(bins={bins}, replicates={replicates}): expected at least 1"
        )
    p, _ = checked(probabilities, torch.zeros(len(probabilities), dtype=torch.int64))
    confidence = p.max(1).values
    number = _bin(confidence, bins)
    rows = torch.bincount(number, minlength=bins)
    # Of a drawn label all that counts is whether it is the most probable one.
    stream = torch.Generator().manual_seed(seed)
    drawn = torch.empty(replicates, bins, dtype=torch.float64)
    for own in drawn:
        right = torch.rand(len(p), generator=stream, dtype=torch.float64) < confidence
        own.copy_(torch.bincount(number, right.double(), minlength=bins))
    some = rows > 0
    return (drawn / rows)[:, some].numpy()


def _bin(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).long().clamp(max=bins - 1)


def checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``(rows, K)`` in float64 and labels ``(rows,)``, on the CPU.

    Raises:
        ValueError: other shapes, probabilities that are negative or do not sum to one, or a label
            outside 0 to K - 1; names the row.
    """
    p, labels = probabilities.detach().cpu().double(), labels.detach().cpu()
    if p.dim() != 2 or labels.shape != p.shape[:1] or len(p) == 0:
        raise ValueError(
            f"probabilities of shape {tuple(p.shape)} and labels of shape {tuple(labels.shape)}: "
            "expected (rows, K) and (rows,), at least one row"
        )
    wrong = ((p.sum(1) - 1).abs() > 1e-4) | (p < 0).any(1) | ~p.isfinite().all(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} has probabilities that sum to {p[row].sum().item():g}, the smallest "
            f"{p[row].min().item():g}: expected at least 0 each, and a sum of 1"
        )
    if labels.dtype != torch.int64 or ((labels < 0) | (labels >= p.shape[1])).any():
        found = f"from {labels.min().item()} to {labels.max().item()}, {labels.dtype}"
        raise ValueError(f"labels {found}: expected int64 from 0 to {p.shape[1] - 1}")
    return p, labels
