"""The sigmoid belief network: layers of bits, each drawn from the bits above."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Self

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.discrete import Bits, IndependentBits
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP


class SigmoidBeliefNetwork(GenerativeModel):
    """Layers of bits, the logits linear in the layer above (Neal 1992).

        z{l}_n ~ Bernoulli(sigmoid(W_l z{l+1}_n + b_l))    # layer l = L..1     data | Z_l
        x_n    ~ likelihood(z1_n)                          # image              data | D

    The top has biases alone. Source: Neal 1992, Connectionist learning of belief networks; as a
    deep generative model, Mnih & Gregor 2014 (arXiv:1402.0030), where the likelihood
    is linear too: ``Bernoulli(MLP(Z_1, D))``, without a hidden layer.

    Args:
        layers: numbers of bits, from the top down: one layer, two or more.
        likelihood: conditional of the lowest layer, event ``(D,)``; its net is the decoder.

    Raises:
        ValueError: no layer, or one of less than 1 bit.
    """

    def __init__(self, layers: Sequence[int], likelihood: nn.Module) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(
                f"SigmoidBeliefNetwork(layers={list(layers)}): expected the number of bits of each "
                "layer, the top first, at least one layer of at least 1"
            )
        self.top = IndependentBits(layers[0])
        pairs = itertools.pairwise(layers)
        self.below = nn.ModuleList(Bits(nn.Linear(above, own)) for above, own in pairs)
        self.likelihood = likelihood

    def z_dist(self, level: int, *above: Tensor) -> TorchDistribution:
        """Of one layer, 1 being the lowest, given those above it, the top first."""
        return self.below[-level](above[-1]) if above else self.top()

    def x_dist(self, *z: Tensor) -> TorchDistribution:
        """Given all layers, the top first; the lowest counts."""
        return self.likelihood(z[-1])

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        drawn: list[Tensor] = []
        with self.rows(x, n=n, total=total):
            for below in reversed(range(len(self.below) + 1)):
                layer = self.z_dist(below + 1, *drawn)
                drawn.append(pyro.sample(f"z{below + 1}", layer))
            return pyro.sample("x", self.x_dist(*drawn), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls([2, 3], Bernoulli(MLP(3, 6)))
