"""Nets: deterministic maps between tensors, from which conditionals are made.

Every net maps ``(..., inputs)`` to ``(..., outputs)`` with any number of leading dims, since rows,
particles and chains all stand on the left. Images travel as flat rows, channels first; only the
convolutional nets unfold them. A net states its widths as ``.inputs`` and ``.outputs``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Sequential):
    """Multilayer perceptron: ``MLP(inputs, *hidden, outputs)``.

    Shapes: ``(..., inputs)`` to ``(..., outputs)``.

    Args:
        widths: inputs, hidden widths, outputs: at least two positive integers.
        activation: module class put after each layer but the last.
        dropout: share of hidden units that training drops at random. In a decoder it is to units
            what dropping words is in Bowman et al. 2016 (arXiv:1511.06349, section 3.1): a weaker
            decoder has to use the latent.

    Raises:
        ValueError: fewer than two widths, or a width below 1; dropout not in [0, 1).
    """

    def __init__(
        self,
        *widths: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        _check("MLP", widths, dropout)
        layers: list[nn.Module] = []
        for wide, next_wide in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(wide, next_wide), activation(), *_dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))
        self.inputs, self.outputs = widths[0], widths[-1]


class Gated(nn.Module):
    """A linear layer whose output is gated by a second one: ``A x * sigmoid(B x)``.

    Shapes: ``(..., inputs)`` to ``(..., outputs)``. Source: Dauphin et al. 2017,
    arXiv:1612.08083, eq. 1; the hidden layer of the VampPrior paper's nets.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # One matrix for value and gate: one matrix product instead of two.
        self.linear = nn.Linear(inputs, 2 * outputs)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(self.linear(x))


class GatedConv(nn.Module):
    """A convolution whose output is gated by a second one, as in :class:`Gated`.

    A layer for :class:`ppl_vae.residual.Maps`. Shapes: ``(rows, inputs, height, width)`` to
    ``(rows, outputs, height / stride, width / stride)``, sides rounded up; enlarged, times the
    stride.

    Args:
        inputs, outputs: channels.
        size: of the kernel, odd.
        stride: between the kernel's places.
        enlarge: whether the convolution is a transposed one.

    Raises:
        ValueError: a kernel of an even size, or another number below 1.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, *, enlarge: bool = False
    ) -> None:
        super().__init__()
        if min(inputs, outputs, size, stride) < 1 or size % 2 == 0:
            raise ValueError(
                f"GatedConv(inputs={inputs}, outputs={outputs}, size={size}, stride={stride}): "
                "expected numbers of at least 1, and an odd size"
            )
        both = 2 * outputs  # value and gate by one convolution
        self.convolution = (
            nn.ConvTranspose2d(inputs, both, size, stride, size // 2, output_padding=stride - 1)
            if enlarge
            else nn.Conv2d(inputs, both, size, stride, size // 2)
        )

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.glu(self.convolution(maps), dim=1)


class Branches(nn.Module):
    """Nets side by side, each of a part of what comes in; what they give is joined.

    Shapes: ``(..., inputs)`` to ``(..., outputs)``, both the sums of the nets'.

    Args:
        nets: in the order of the parts; each states its ``.inputs`` and ``.outputs``.

    Raises:
        ValueError: no net, or one that does not state its widths.
    """

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        widths = [[getattr(net, name, None) for net in nets] for name in ("inputs", "outputs")]
        self.parts, made = ([w for w in some if isinstance(w, int)] for some in widths)
        if not len(nets) == len(self.parts) == len(made) > 0:
            raise ValueError(
                f"Branches({', '.join(type(net).__name__ for net in nets)}): expected at least one "
                "net, and of each its widths as .inputs and .outputs"
            )
        self.nets = nn.ModuleList(nets)
        self.inputs, self.outputs = sum(self.parts), sum(made)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.parts, -1)
        return torch.cat([net(part) for net, part in zip(self.nets, parts, strict=True)], -1)


class GatedMLP(nn.Sequential):
    """MLP with gated hidden layers, as in Tomczak & Welling 2018 (arXiv:1705.07120).

    Shapes: ``(..., inputs)`` to ``(..., outputs)``; the last layer is linear. Arguments and
    errors: as :class:`MLP`.
    """

    def __init__(self, *widths: int, dropout: float = 0.0) -> None:
        _check("GatedMLP", widths, dropout)
        layers: list[nn.Module] = []
        for wide, next_wide in itertools.pairwise(widths[:-1]):
            layers += [Gated(wide, next_wide), *_dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))
        self.inputs, self.outputs = widths[0], widths[-1]


class SkipMLP(nn.Module):
    """MLP each of whose layers is given the input again, beside the layer before.

    As a decoder it ties every layer to the latent, against its collapse. Source: Dieng et al.
    2019, arXiv:1807.04863.

    Shapes: ``(..., inputs)`` to ``(..., outputs)``; the last layer is linear.

    Args:
        widths, activation, dropout: as those of :class:`MLP`.
        gated: whether hidden layers are :class:`Gated`, in place of the activation.

    Raises:
        ValueError: as :class:`MLP`.
    """

    def __init__(
        self,
        *widths: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        _check("SkipMLP", widths, dropout)
        self.inputs, self.outputs = widths[0], widths[-1]
        self.hidden = nn.ModuleList()
        context = self.inputs
        for wide in widths[1:-1]:
            layer = [Gated(context, wide)] if gated else [nn.Linear(context, wide), activation()]
            self.hidden.append(nn.Sequential(*layer, *_dropout(dropout)))
            context = wide + self.inputs
        self.last = nn.Linear(context, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        context = x
        for layer in self.hidden:
            context = torch.cat([layer(context), x], -1)
        return self.last(context)


class Rescaled(nn.Module):
    """Divides by a number: in front of an encoder of 8-bit levels, ``Rescaled(784, 255)``.

    Shapes: ``(..., inputs)`` to the same.

    Raises:
        ValueError: a scale that is not positive and finite.
    """

    def __init__(self, inputs: int, scale: float) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"Rescaled(scale={scale}): expected a positive and finite number")
        self.inputs = self.outputs = inputs
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


class ConvEncoder(nn.Module):
    """Strided convolutions from an image to features.

    Shapes: ``(..., channels * height * width)`` to ``(..., outputs)``. Each stage halves height
    and width, until neither exceeds 7 pixels: one stage for 8x8, two for 28x28, three for
    32x32, four for 64x64; the first has ``width`` channels, each further one twice as many.

    Args:
        image_shape: (channels, height, width), sides that each stage can halve evenly.
        outputs: number of features.
        width: channels of the first stage.

    Raises:
        ValueError: a side that cannot be halved evenly down to 7 pixels or fewer.
    """

    def __init__(self, image_shape: tuple[int, int, int], outputs: int, width: int = 32) -> None:
        super().__init__()
        widths, (height, wide) = _stages(image_shape, width)
        stages: list[nn.Module] = []
        for a, b in zip([image_shape[0], *widths], widths, strict=False):
            stages += [nn.Conv2d(a, b, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.image_shape = image_shape
        self.stages = nn.Sequential(*stages, nn.Flatten())
        self.head = nn.Linear(widths[-1] * height * wide, outputs)
        self.inputs, self.outputs = _pixels(image_shape), outputs

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(x.reshape(-1, *self.image_shape))  # (rows, features)
        return self.head(features).reshape(*x.shape[:-1], self.outputs)


class ConvDecoder(nn.Module):
    """Transposed convolutions from a latent to an image: the mirror of :class:`ConvEncoder`.

    Shapes: ``(..., inputs)`` to ``(..., per_pixel * channels * height * width)``, parameter
    kinds outermost, so that a conditional with several parameters a pixel can split them.

    Args:
        inputs: size of the latent.
        image_shape: (channels, height, width).
        width: channels of the last hidden stage.
        per_pixel: number of parameters for each pixel and channel.

    Raises:
        ValueError: a side that cannot be halved evenly down to 7 pixels or fewer.
    """

    def __init__(
        self, inputs: int, image_shape: tuple[int, int, int], width: int = 32, per_pixel: int = 1
    ) -> None:
        super().__init__()
        widths, (height, wide) = _stages(image_shape, width)
        stages: list[nn.Module] = []
        for a, b in zip(widths[::-1], [*widths[-2::-1], per_pixel * image_shape[0]], strict=True):
            stages += [nn.ReLU(), nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1)]
        self.image_shape = image_shape
        self.foot = nn.Linear(inputs, widths[-1] * height * wide)
        self.stages = nn.Sequential(nn.Unflatten(-1, (widths[-1], height, wide)), *stages)
        self.inputs, self.outputs = inputs, per_pixel * _pixels(image_shape)

    def forward(self, z: Tensor) -> Tensor:
        image = self.stages(self.foot(z.reshape(-1, self.inputs)))  # (rows, C, H, W)
        return image.reshape(*z.shape[:-1], self.outputs)


class Recomputed(nn.Module):
    """A net whose activations are computed again in the backward pass, instead of being kept.

    Time for memory: only what goes in is kept. Source: Chen et al. 2016 (arXiv:1604.06174). For
    eager steps: in a compiled one the compiler chooses when to compute, and nothing was saved where
    it was measured; ``fit(accumulate=)`` saves memory in both.

    Shapes: as the net's.

    Args:
        net: draws nothing; dropout would draw anew.

    Raises:
        ValueError: the net has dropout.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in net.modules()):
            raise ValueError(
                f"Recomputed({type(net).__name__}): the net has dropout, which would drop other "
                "entries when computed again; recompute the parts between"
            )
        self.net = net
        for name in ("inputs", "outputs", "feature_shapes"):
            if (stated := getattr(net, name, None)) is not None:
                setattr(self, name, stated)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.net(x)
        out = checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)
        return cast(Tensor, out)


def width_of(net: nn.Module, example: Tensor) -> int:
    """The number of outputs of ``net``: as it states, else as found on an ``example`` batch."""
    if isinstance(stated := getattr(net, "outputs", None), int):
        return stated
    with torch.no_grad():
        return cast(Tensor, net(example)).shape[-1]


def _check(name: str, widths: tuple[int, ...], dropout: float) -> None:
    if len(widths) < 2 or any(w < 1 for w in widths):
        raise ValueError(
            f"{name}{widths}: expected {name}(inputs, *hidden, outputs), "
            "at least two widths, each at least 1"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}(dropout={dropout}): expected a share of 0 or more, below 1")


def _dropout(share: float) -> list[nn.Module]:
    return [nn.Dropout(share)] if share > 0 else []


def _pixels(image_shape: tuple[int, int, int]) -> int:
    channels, height, wide = image_shape
    return channels * height * wide


def _stages(image_shape: tuple[int, int, int], width: int) -> tuple[list[int], tuple[int, int]]:
    """Channels of each halving stage, and the height and width after the last."""
    _, height, wide = image_shape
    widths: list[int] = []
    if min(*image_shape, width) < 1:
        raise ValueError(f"image_shape {image_shape}, width {width}: expected at least 1 of each")
    while not widths or max(height, wide) > 7:
        if height % 2 or wide % 2:
            raise ValueError(
                f"image_shape {image_shape}: cannot halve {height}x{wide} pixels; expected sides "
                "that can be halved evenly down to 7 or fewer (8, 28, 32, 64, ...): pad the images"
            )
        widths.append(width << len(widths))
        height, wide = height // 2, wide // 2
    return widths, (height, wide)
