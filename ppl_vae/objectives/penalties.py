"""Penalties on a classifier q(y | x), of rows whose label is not known."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

Classify = Callable[[Tensor], TorchDistribution]


class Penalty(nn.Module):
    """What a classifier is charged for its answers at rows without labels.

    To implement: ``of_rows``.

    Args:
        weight: what it is multiplied by, in nats.

    Attributes:
        ends: the epoch from which it no longer changes.

    Raises:
        ValueError: a negative weight.
    """

    ends: float = 0.0

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"{type(self).__name__}(weight={weight}): expected at least 0")
        self.weight = weight

    @abstractmethod
    def of_rows(self, classify: Classify, x: Tensor) -> Tensor:
        """Of each row, or one for all: ``(rows,)`` or ``()``, before the weight.

        Args:
            classify: gives q(y | x) of rows ``(rows, D)``, one-hot with batch ``(rows,)``.
            x: the rows, ``(rows, D)``.
        """

    def forward(self, classify: Classify, x: Tensor) -> Tensor:
        return self.weight * self.of_rows(classify, x)

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start. Most do not depend on it."""

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({settings})"


class VirtualAdversarial(Penalty):
    """How far the answer moves at the neighbor where it moves farthest.

        KL(q(y | x) || q(y | x + r)),   r = argmax over |r| <= epsilon

    Source: Miyato et al. 2018 (arXiv:1704.03976), eq. 5, 6 and 11, algorithm 1: r by one step of
    the power method. The first answer is taken as it is, without gradient.

    Args:
        epsilon: radius of the neighborhood, Euclidean, in the unit of x.
        weight: of the penalty.
        rise: the radius rises in a straight line to epsilon over so many epochs,
        start: from this one.
        xi: length of the step by which the direction is found, in the unit of x.

    Raises:
        ValueError: a radius or a step that is not positive, or a negative weight or ``rise``.
    """

    radius: Tensor

    def __init__(
        self,
        epsilon: float,
        weight: float = 1.0,
        *,
        rise: float = 0.0,
        start: float = 0.0,
        xi: float = 0.1,
    ) -> None:
        super().__init__(weight)
        if not (epsilon >= start >= 0 and epsilon > 0 and xi > 0 and rise >= 0):
            raise ValueError(
                f"VirtualAdversarial(epsilon={epsilon}, rise={rise}, start={start}, xi={xi}): "
                "expected a positive radius and step, a start from 0 to epsilon, and epochs of at "
                "least 0"
            )
        self.epsilon, self.rise, self.start, self.xi = epsilon, rise, start, xi
        self.ends = rise
        # In a tensor, which a recorded step follows.
        self.register_buffer("radius", torch.zeros(()))
        self.at(0.0)

    def at(self, epoch: float) -> None:
        share = min(1.0, epoch / self.rise) if self.rise > 0 else 1.0
        self.radius.fill_(self.start + (self.epsilon - self.start) * share)

    def of_rows(self, classify: Classify, x: Tensor) -> Tensor:
        answer = _log_probabilities(classify(x)).detach()
        with torch.enable_grad():
            step = _unit(torch.randn_like(x)).mul(self.xi).requires_grad_()
            moved = _kl(answer, _log_probabilities(classify(x + step))).sum()
            (slope,) = torch.autograd.grad(moved, step)
        return _kl(answer, _log_probabilities(classify(x + self.radius * _unit(slope))))

    def settings(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "rise": self.rise,
            "start": self.start,
            "xi": self.xi,
        } | super().settings()


class MutualInformation(Penalty):
    """How little the answers say: log K minus the information between row and answer.

        mean H(q(y | x)) + KL(mean q(y | x) || uniform)

    Sure answers, of all classes alike. Source: Krause et al. 2010 (NeurIPS 23, "Discriminative
    clustering by regularized information maximization"), eq. 2; the means are the batch's.
    """

    def of_rows(self, classify: Classify, x: Tensor) -> Tensor:
        log_q = _log_probabilities(classify(x))
        entropy = -(log_q.exp() * log_q).sum(-1).mean()
        # By its logarithm, whose gradient is finite where the mean is 0.
        log_mean = log_q.logsumexp(0) - math.log(len(log_q))
        return entropy + math.log(len(log_mean)) + (log_mean.exp() * log_mean).sum()


def _log_probabilities(answer: Any) -> Tensor:
    """``(rows, K)``, finite, so that an impossible class takes no part."""
    return answer.logits.log_softmax(-1).clamp(min=torch.finfo(answer.logits.dtype).min)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of categorical distributions from their log-probabilities ``(rows, K)``: ``(rows,)``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _unit(vectors: Tensor) -> Tensor:
    flat = vectors.flatten(1)
    length = flat.norm(dim=1).clamp(min=torch.finfo(flat.dtype).tiny)
    return vectors / length.reshape(-1, *(1,) * (vectors.dim() - 1))
