"""Nets are the authors', weight for weight, where a figure is held against theirs.

Sizes are worked out from the layers of the VampPrior paper (Tomczak & Welling 2018,
arXiv:1705.07120, section 5.1, and its code): a gated layer has two matrices, and each has a bias.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ppl_vae.data.dataset import Dataset
from ppl_vae.data.stand_ins import standing_in
from ppl_vae.recipes import build

BITS = {"x": torch.zeros(8, 784, dtype=torch.uint8), "y": torch.zeros(8).long()}
STATIC = Dataset(
    "static_mnist",
    {"train": BITS, "validation": BITS, "test": BITS},
    image_shape=(1, 28, 28),
    binarization="static",
)


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def gated(*widths: int) -> int:
    return sum(2 * linear(a, b) for a, b in pairwise(widths))


def normal(*widths: int) -> int:
    """Gated layers, then means and log-variances of 40 latents."""
    return gated(*widths) + 2 * linear(widths[-1], 40)


ONE_LEVEL = normal(784, 300, 300) + gated(40, 300, 300) + linear(300, 784)
Q_Z1 = gated(784, 300) + gated(40, 300) + normal(600, 300)
P_X = 2 * gated(40, 300) + gated(600, 300) + linear(300, 784)
TWO_LEVELS = normal(784, 300, 300) + Q_Z1 + normal(40, 300, 300) + P_X
PSEUDO_INPUTS = 500 * 784


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ("vae-static-mnist", ONE_LEVEL),
        ("vamp-static-mnist", ONE_LEVEL + PSEUDO_INPUTS),
        ("hvae-static-mnist", TWO_LEVELS),
        ("hvae-vamp-static-mnist", TWO_LEVELS + PSEUDO_INPUTS),
    ],
)
def test_weights_are_as_many_as_the_authors(recipe: str, size: int) -> None:
    with standing_in({"static_mnist": STATIC}):
        made = build(recipe, {}, seed=0)
    learned = nn.ModuleList([made.model, made.guide]).parameters()  # each once, shared or not
    assert sum(weight.numel() for weight in learned) == size


def test_two_levels_with_a_vamp_prior_start_as_the_authors_do() -> None:
    """Weights have variance 2 / inputs, where PyTorch's own would have a sixth of that."""
    with standing_in({"static_mnist": STATIC}):
        made = build("hvae-vamp-static-mnist", {}, seed=0)
    layers = [
        layer
        for layer in nn.ModuleList([made.model, made.guide]).modules()
        if isinstance(layer, nn.Linear)
    ]
    assert len(layers) > 10
    for layer in layers:
        error = math.sqrt(2 / layer.weight.numel())  # relative, of a normal sample's variance
        expected = pytest.approx(2 / layer.in_features, rel=5 * error)
        assert layer.weight.var(correction=0).item() == expected
        assert layer.bias.abs().max() <= layer.in_features**-0.5
    assert made.model.prior.pseudo_inputs.mean().item() == pytest.approx(0.05, abs=1e-3)
