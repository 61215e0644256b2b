"""Residual convolutions on flat rows: blocks on the way down, and ladders from the data up.

Like all nets these map ``(..., inputs)`` to ``(..., outputs)``. A shape of maps is (channels,
height, width).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ppl_vae.conditionals import Normal

Shape = tuple[int, int, int]


class Maps(nn.Module):
    """Layers on feature maps, as a net on flat rows.

    Shapes: ``(..., channels * height * width)`` to what the layers make of it, flat.

    Args:
        shape: of what comes in.
        layers: take and give ``(rows, channels, height, width)``.

    Attributes:
        output_shape: of what goes out.
    """

    def __init__(self, shape: Shape, *layers: nn.Module) -> None:
        super().__init__()
        self.shape, self.layers = shape, nn.Sequential(*layers)
        with torch.no_grad():
            channels, height, width = self.layers(torch.zeros(1, *shape)).shape[1:]
        self.output_shape: Shape = (channels, height, width)
        self.inputs, self.outputs = math.prod(shape), math.prod(self.output_shape)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.layers(x.reshape(-1, *self.shape))
        return maps.reshape(*x.shape[:-1], self.outputs)


class Residual(nn.Module):
    """A net added to what goes into it: ``x + net(x)``, by two 3x3 convolutions.

    Shapes: ``(..., inputs)`` to the same. Source: He et al. 2016 (arXiv:1603.05027), fig. 4e, the
    activations in front; the last layer's weights are scaled at the start as in Child 2021
    (arXiv:2011.10650), so that a sum over ``depth`` blocks keeps its size.

    Args:
        shape: of the maps.
        depth: how many blocks follow one another.
    """

    def __init__(self, shape: Shape, depth: int) -> None:
        super().__init__()
        self.branch = two_convolutions(shape, shape[0])
        shrink(self.branch, depth)
        self.inputs = self.outputs = self.branch.inputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def two_convolutions(shape: Shape, channels: int) -> Maps:
    """An activation before each of two 3x3 convolutions, to ``channels`` maps of the same size."""
    width = shape[0]
    return Maps(
        shape,
        nn.GELU(),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(width, channels, kernel_size=3, padding=1),
    )


def shrink(maps: Maps, depth: int) -> None:
    """Scale the weights of the last layer by ``1 / sqrt(depth)``."""
    with torch.no_grad():
        for parameter in maps.layers[-1].parameters():
            parameter /= math.sqrt(depth)


class TopDownBlock(nn.Module):
    """A level on the way down: a latent's distribution given the state, and the state after it.

    Source: Child 2021 (arXiv:2011.10650), fig. 3, without the part that draws from
    the posterior, which is a guide's; normals over maps as in Kingma et al. 2016
    (arXiv:1606.04934), section 4.

    Shapes: state ``(..., channels * height * width)``, latent ``(..., latents * height * width)``.

    Args:
        shape: of the state's maps.
        latents: number of the latent's maps.
        depth: how many levels there are.
        enlarge: whether the state that is left has twice the height and width.
    """

    def __init__(self, shape: Shape, latents: int, depth: int, *, enlarge: bool) -> None:
        super().__init__()
        channels, height, width = shape
        self.prior = Normal(two_convolutions(shape, 2 * latents))
        spread = nn.Conv2d(latents, channels, kernel_size=1)
        self.spread = Maps((latents, height, width), spread)
        shrink(self.spread, depth)
        steps = [Maps(shape, nn.Upsample(scale_factor=2))] if enlarge else []
        self.update = nn.Sequential(Residual(shape, depth), *steps)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """The state that the latent leaves."""
        return self.update(state + self.spread(z))


class Ladder(nn.Module):
    """A deterministic path upward, of which each rung gives features to a level of latents.

        d_1 = rung_1(x),  d_2 = rung_2(d_1), ...;  features: d_L, ..., d_1

    Shapes: ``(..., inputs)`` to ``(..., outputs)``, the features of all levels joined, top first.
    Source: Sønderby et al. 2016 (arXiv:1602.02282), section 2.1.

    Args:
        inputs: width of x.
        rungs: nets from the data up, each of which takes what the one before gives.
        shapes: of what each rung gives: ``(width,)``, or (channels, height, width).

    Attributes:
        feature_shapes: ``shapes`` from the top down, as :class:`ppl_vae.guides.TopDown` reads them.

    Raises:
        ValueError: no rung, or not one shape for each.
    """

    def __init__(
        self, inputs: int, rungs: Iterable[nn.Module], shapes: Iterable[tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(rungs)
        self.feature_shapes = tuple(shapes)[::-1]
        if not 0 < len(self.rungs) == len(self.feature_shapes):
            raise ValueError(
                f"{type(self).__name__}: {len(self.rungs)} rungs and {len(self.feature_shapes)} "
                "shapes; expected at least one rung, and a shape for each"
            )
        self.inputs, self.outputs = inputs, sum(map(math.prod, self.feature_shapes))

    def forward(self, x: Tensor) -> Tensor:
        steps = list(itertools.accumulate(self.rungs, lambda below, rung: rung(below), initial=x))
        return torch.cat(steps[:0:-1], -1)


class MLPLadder(Ladder):
    """A ladder of perceptrons with two hidden layers a rung: ``MLPLadder(inputs, *widths)``.

    Shapes: ``(..., inputs)`` to ``(..., sum(widths))``, the top level's features first.

    Args:
        inputs: width of the data.
        widths: of each level, from the data up.
        activation: module class put after each layer.

    Raises:
        ValueError: no width, or one below 1.
    """

    def __init__(
        self, inputs: int, *widths: int, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        if min(inputs, *widths, len(widths)) < 1:
            raise ValueError(
                f"MLPLadder{(inputs, *widths)}: expected MLPLadder(inputs, *widths), at least one "
                "width, each at least 1"
            )
        rungs = [
            nn.Sequential(nn.Linear(a, b), activation(), nn.Linear(b, b), activation())
            for a, b in itertools.pairwise((inputs, *widths))
        ]
        super().__init__(inputs, rungs, [(width,) for width in widths])


class ConvLadder(Ladder):
    """A ladder of residual convolutions with a block a level: the mirror of a DeepLadder.

    Shapes: ``(..., channels * height * width)`` to all levels' maps, flat, the top's first. Source:
    the bottom-up path of Kingma et al. 2016 (arXiv:1606.04934), section 4 and fig. 3.

    Args:
        image_shape: (channels, height, width) of the data.
        depth: number of levels, laid out by :func:`level_sizes`.
        width: number of maps at each level.

    Raises:
        ValueError: as :func:`level_sizes`.
    """

    def __init__(self, image_shape: Shape, depth: int, width: int = 32) -> None:
        rungs: list[nn.Module] = []
        shapes: list[Shape] = []
        below = image_shape
        for size in reversed(level_sizes(image_shape, depth)):
            shape = (width, *size)
            halving = nn.Conv2d(below[0], width, kernel_size=4, stride=2, padding=1)
            steps = [] if shape == below else [Maps(below, halving)]
            rungs.append(nn.Sequential(*steps, Residual(shape, depth)))
            shapes.append(shape)
            below = shape
        super().__init__(math.prod(image_shape), rungs, shapes)


def level_sizes(image_shape: Shape, depth: int) -> list[tuple[int, int]]:
    """Height and width of the maps at each of ``depth`` levels, top first.

    The image is halved until neither side exceeds 7 pixels; levels are spread evenly over the
    halved sizes, some smaller ones having one more where that cannot be.

    Raises:
        ValueError: a side that cannot be halved evenly, or fewer levels than sizes.

    >>> level_sizes((1, 28, 28), 5)
    [(7, 7), (7, 7), (7, 7), (14, 14), (14, 14)]
    """
    _, height, width = image_shape
    sizes: list[tuple[int, int]] = []
    while not sizes or max(height, width) > 7:
        if height % 2 or width % 2 or min(height, width) < 2:
            raise ValueError(
                f"image_shape {image_shape}: cannot halve {height}x{width} pixels; pad the images "
                "to sides that halve evenly down to 7 or fewer, such as 8, 28, 32 or 64"
            )
        height, width = height // 2, width // 2
        sizes.insert(0, (height, width))
    if depth < len(sizes):
        raise ValueError(
            f"depth {depth}: images of {image_shape} have maps of {len(sizes)} sizes, "
            f"{sizes}: expected at least a level for each"
        )
    return [sizes[level * len(sizes) // depth] for level in range(depth)]


def reader(shape: tuple[int, ...], kinds: int, size: int) -> nn.Module:
    """A linear map from a level's features to ``kinds`` parameters of a latent of ``size``.

    Maps whose pixels the latent's entries can be spread over are read pixel by pixel, by a 1x1
    convolution; other features as a whole.

    Shapes: ``(..., prod(shape))`` to ``(..., kinds * size)``, kinds outermost.
    """
    if len(shape) == 3 and not size % (pixels := shape[1] * shape[2]):
        channels, height, width = shape
        convolution = nn.Conv2d(channels, kinds * size // pixels, kernel_size=1)
        return Maps((channels, height, width), convolution)
    return nn.Linear(math.prod(shape), kinds * size)
