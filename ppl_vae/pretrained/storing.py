"""Weights in few bits.

Of a parameter NAME, a file holds either ``NAME:16``, float16; or ``NAME:8``, a matrix in int8, and
``NAME:scale``, a step a row in float16. What is no parameter, and whole numbers, stand under their
own name as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

Bits = Literal[16, 8]

LIMIT = 3_000_000
"""Bytes that the weights of a model may take."""

_HALF, _STEPS, _SCALE = ":16", ":8", ":scale"
_LEVELS = 127  # on either side of 0
_LARGEST = torch.finfo(torch.float16).max


def packed_bytes(
    tensors: Mapping[str, Tensor], buffers: Collection[str] = (), *, limit: int = LIMIT
) -> tuple[bytes, Bits]:
    """Weights as a safetensors file, in 16 bits where the limit allows that, else in 8.

    Args:
        tensors: by name, as :func:`ppl_vae.loop.weights` gives them.
        buffers: names of those that are no parameters.
        limit: bytes.

    Raises:
        ValueError: they take more even in 8 bits, and what :func:`pack` refuses.
    """
    data = b""
    for bits in (16, 8):
        data = safetensors.torch.save(pack(tensors, buffers, bits=bits))
        if len(data) <= limit:
            return data, bits
    numbers = sum(tensor.numel() for tensor in tensors.values())
    raise ValueError(
        f"{numbers:,} weights take {len(data):,} bytes in 8 bits; expected at most {limit:,}: this "
        "model is too large to come with the package"
    )


def pack(
    tensors: Mapping[str, Tensor], buffers: Collection[str] = (), *, bits: Bits
) -> dict[str, Tensor]:
    """Weights in few bits, by the names that a file has for them.

    In 16 bits, a weight is rounded to the nearest float16. In 8 bits, so are vectors; of a matrix,
    or of any tensor of more dims, each row (all that has one first index) is rounded to the nearest
    of 255 levels, symmetric about 0, of which the outermost is the row's largest weight.

    Raises:
        ValueError: a name that has a meaning here, or a weight that float16 cannot hold.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((_HALF, _STEPS, _SCALE)):
            raise ValueError(
                f"{name!r} is no name for a weight: its end has a meaning in the file; rename it"
            )
        tensor = tensor.detach().cpu()
        if name in buffers or not tensor.is_floating_point():
            found[name] = tensor.clone(memory_format=torch.contiguous_format)
            continue
        largest = tensor.abs().max() if tensor.numel() else torch.tensor(0.0)
        if not largest <= _LARGEST:  # nor is NaN
            raise ValueError(
                f"{name} has a weight of {largest.item():g}: expected at most {_LARGEST:g}, which "
                "is what float16 holds"
            )
        if bits == 8 and tensor.dim() > 1:
            found[name + _STEPS], found[name + _SCALE] = _steps(tensor)
        else:
            found[name + _HALF] = tensor.to(torch.float16, copy=True).contiguous()
    return found


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32 again, by their own names; what was left as it was stays so.

    Raises:
        ValueError: a matrix without its steps.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(_HALF):
            found[name.removesuffix(_HALF)] = tensor.float()
        elif name.endswith(_STEPS):
            own = name.removesuffix(_STEPS)
            if (scale := packed.get(own + _SCALE)) is None:
                raise ValueError(f"the file holds {name!r} without {own + _SCALE!r}")
            found[own] = tensor.float() * _by_row(scale.float(), tensor)
        elif not name.endswith(_SCALE):
            found[name] = tensor
    return found


def _steps(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of steps, int8 in the tensor's shape, and the step of each row, float16."""
    exact = tensor.flatten(1).double().abs().amax(1) / _LEVELS
    scale = exact.to(torch.float16)
    # Upwards, so that the largest weight stays within the levels.
    upwards = torch.tensor(torch.inf, dtype=torch.float16)
    scale = torch.where(scale.double() < exact, torch.nextafter(scale, upwards), scale)
    step = _by_row(scale.double(), tensor)
    steps = torch.where(step > 0, tensor.double() / step, 0.0).round()
    return steps.to(torch.int8).contiguous(), scale


def _by_row(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (tensor.dim() - 1))
