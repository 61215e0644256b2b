"""A deep ladder of latent maps, for images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Self, cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.residual import Maps, Shape, TopDownBlock, level_sizes


class DeepLadder(GenerativeModel):
    """Maps of latents, level below level, that a state collects (Child 2021, arXiv:2011.10650).

        z{l}_n ~ Normal(f(s{l+1}_n))        # level l = L..1     data | Z_l
        x_n    ~ likelihood(s1_n)           # image              data | D

    The state begins at the smallest size of the maps and has learned values there; it leaves each
    level as ``s_l = block_l(s_{l+1}, z_l)``, twice as large where a level is the last of its size.
    Hence each latent depends on all above it. As in Kingma et al. 2016 (arXiv:1606.04934), section
    4 and fig. 3, but for the inference net, which a guide is: ``TopDown`` with a ``ConvLadder`` of
    the same image shape and depth shares the way down, as there.

    Args:
        image_shape: (channels, height, width), sides that halve evenly down to 7 pixels or fewer.
        likelihood: makes the conditional of x from the net that gives its parameters, as
            ``Bernoulli`` does.
        depth: L, the number of levels, laid out by :func:`~ppl_vae.residual.level_sizes`.
        width: number of the state's maps.
        latents: number of each latent's maps: Z_l is ``latents * height * width`` of its level.
        per_pixel: how many parameters the likelihood has for each pixel and channel.

    Raises:
        ValueError: sides that cannot be halved, fewer levels than sizes, or a number below 1.
    """

    def __init__(
        self,
        image_shape: Shape,
        likelihood: Callable[[nn.Module], nn.Module],
        depth: int,
        *,
        width: int = 32,
        latents: int = 4,
        per_pixel: int = 1,
    ) -> None:
        super().__init__()
        if min(width, latents, per_pixel) < 1:
            raise ValueError(
                f"DeepLadder(width={width}, latents={latents}, per_pixel={per_pixel}): expected "
                "at least 1 of each"
            )
        shapes: list[Shape] = [(width, *size) for size in level_sizes(image_shape, depth)]
        self.start = nn.Parameter(torch.randn(math.prod(shapes[0])))
        self.blocks = nn.ModuleList(
            TopDownBlock(shape, latents, depth, enlarge=shape != below)
            for shape, below in itertools.pairwise([*shapes, shapes[-1]])
        )
        enlarging = nn.ConvTranspose2d(
            width, per_pixel * image_shape[0], kernel_size=4, stride=2, padding=1
        )
        self.likelihood = likelihood(Maps(shapes[-1], nn.GELU(), enlarging))

    def z_dist(self, level: int, *above: Tensor) -> TorchDistribution:
        """Of one level, given those above it, the top first."""
        return dict(self._levels())[level].prior(self._state(*above))

    def x_dist(self, *z: Tensor) -> TorchDistribution:
        """Given all levels, the top first."""
        return self.likelihood(self._state(*z))

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        state = self._state()
        with self.rows(x, n=n, total=total):
            for level, block in self._levels():
                state = block(state, pyro.sample(f"z{level}", block.prior(state)))
            return pyro.sample("x", self.likelihood(state), obs=x)

    def _levels(self) -> list[tuple[int, TopDownBlock]]:
        """The blocks with their numbers, from the top down."""
        blocks = cast(Iterable[TopDownBlock], self.blocks)
        return list(zip(range(len(self.blocks), 0, -1), blocks, strict=True))

    def _state(self, *z: Tensor) -> Tensor:
        """What latents from the top down leave."""
        state = self.start
        for (_, block), value in zip(self._levels(), z, strict=False):
            state = block(state, value)
        return state

    @classmethod
    def toy(cls) -> Self:
        return cls((1, 16, 8), Bernoulli, depth=3, width=4, latents=1)
