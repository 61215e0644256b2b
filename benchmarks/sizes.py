"""The architectures that all contenders share: which nets, how wide, how many rows a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ppl_vae.nn import MLP, GatedMLP

Weights = dict[str, Tensor]
"""A state dict of ``Size.build()``: what each contender takes its weights from."""

PIXELS = 784
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """One program at one size.

    Args:
        program: the story: a key of `benchmarks.programs.PAIRS`.
        batch: rows a step.
        nets: name = widths of a net, inputs first.
        gated: whether hidden layers are gated.
    """

    program: str
    batch: int
    nets: Mapping[str, tuple[int, ...]]
    gated: bool = False

    def build(self) -> nn.ModuleDict:
        """The nets, with fresh weights from torch's random state."""
        net = GatedMLP if self.gated else MLP
        return nn.ModuleDict({name: net(*widths) for name, widths in self.nets.items()})

    def weights(self, seed: int) -> Weights:
        """PyTorch's initial weights."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.build().state_dict()

    def data(self, batches: int, seed: int) -> list[Tensor]:
        """Batches of bits with eight factors behind them, ``(batch, PIXELS)`` each."""
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randn(batches, self.batch, 8, generator=generator)
        logits = factors @ torch.randn(8, PIXELS, generator=generator)
        return list(torch.bernoulli(logits.sigmoid(), generator=generator))


def inputs_of(net: nn.Module) -> int:
    """What a net of `Size.build` takes."""
    return cast(int, net.inputs)


def _vae(*hidden: int, latents: int) -> dict[str, tuple[int, ...]]:
    return {
        "encoder": (PIXELS, *hidden, 2 * latents),
        "decoder": (latents, *reversed(hidden), PIXELS),
    }


def _m2(hidden: int, latents: int) -> dict[str, tuple[int, ...]]:
    return {
        "q_y": (PIXELS, hidden, CLASSES),
        "q_z": (PIXELS + CLASSES, hidden, 2 * latents),
        "decoder": (CLASSES + latents, hidden, PIXELS),
    }


SIZES: dict[str, Size] = {
    "tiny": Size("vae", 16, _vae(64, latents=20)),
    "paper": Size("vae", 128, _vae(400, latents=20)),
    "gated": Size("vae", 100, _vae(300, 300, latents=40), gated=True),
    "two-level": Size(
        "two-level",
        64,
        {
            "q_z1": (PIXELS, 300, 2 * 40),
            "q_z2": (40, 100, 2 * 20),
            "p_z1": (20, 100, 2 * 40),
            "decoder": (40, 300, PIXELS),
        },
    ),
    "m2": Size("m2", 32, _m2(300, latents=32)),
    "m2-tiny": Size("m2", 16, _m2(64, latents=20)),
    "belief-net": Size(
        "belief-net",
        32,
        {"encoder": (PIXELS, 200), "decoder": (200, PIXELS), "baseline": (PIXELS, 100, 1)},
    ),
}
