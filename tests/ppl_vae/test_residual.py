"""Residual blocks and ladders, against the same written out for one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_vae.nn import MLP
from ppl_vae.residual import (
    ConvLadder,
    Ladder,
    Maps,
    MLPLadder,
    Residual,
    TopDownBlock,
    level_sizes,
    reader,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (3, 4, 2)
LEADING = [(), (5,), (2, 1, 3)]


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def branch(maps: Tensor, first: nn.Conv2d, second: nn.Conv2d) -> Tensor:
    """Activation, convolution, activation, convolution, of maps of one row."""
    for layer in (first, second):
        gelu = maps * 0.5 * (1 + torch.erf(maps / math.sqrt(2)))
        maps = F.conv2d(gelu, layer.weight, layer.bias, padding=1)
    return maps


def each_row(x: Tensor, row: object) -> Tensor:
    """A function of one row's vector, of every row of ``(..., width)``."""
    rows = [row(one) for one in x.reshape(-1, x.shape[-1])]  # pyright: ignore[reportCallIssue]
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("leading", LEADING)
def test_a_residual_block_adds_its_branch(leading: tuple[int, ...]) -> None:
    block = Residual(SHAPE, depth=2)
    x = torch.randn(*leading, 24)

    def row(one: Tensor) -> Tensor:
        maps = one.reshape(SHAPE)
        return (maps + branch(maps, *convolutions(block))).flatten()

    torch.testing.assert_close(block(x), each_row(x, row))
    assert (block.inputs, block.outputs) == (24, 24)


@pytest.mark.parametrize("leading", LEADING)
def test_a_top_down_block_gives_a_normal_and_takes_the_latent_up(leading: tuple[int, ...]) -> None:
    block = TopDownBlock(SHAPE, latents=2, depth=3, enlarge=True)
    state, z = torch.randn(*leading, 24), torch.randn(*leading, 16)

    def statistics(one: Tensor) -> Tensor:
        maps = branch(one.reshape(SHAPE), *convolutions(block.prior))
        return torch.cat([maps[:2].flatten(), F.softplus(maps[2:]).flatten()])

    def update(both: Tensor) -> Tensor:
        maps, latent = both[:24].reshape(SHAPE), both[24:].reshape(2, 4, 2)
        (spread,) = convolutions(block.spread)
        weight = spread.weight[..., 0, 0]
        maps = maps + torch.einsum("cl,lhw->chw", weight, latent) + spread.bias[:, None, None]
        maps = maps + branch(maps, *convolutions(block.update))
        return maps.repeat_interleave(2, -1).repeat_interleave(2, -2).flatten()

    p = block.prior(state)
    assert (p.batch_shape, p.event_shape) == (leading, (16,))
    found = torch.cat([p.base_dist.loc, p.base_dist.scale], -1)
    torch.testing.assert_close(found, each_row(state, statistics))
    torch.testing.assert_close(block(state, z), each_row(torch.cat([state, z], -1), update))


@pytest.mark.parametrize("leading", LEADING)
def test_a_conv_ladder_joins_each_levels_maps_the_top_first(leading: tuple[int, ...]) -> None:
    ladder = ConvLadder((1, 16, 8), depth=3, width=2)
    x = torch.randn(*leading, 128)

    def row(one: Tensor) -> Tensor:
        maps, found = one.reshape(1, 16, 8), []
        for rung in ladder.rungs:
            *halving, first, second = convolutions(rung)
            if halving:
                maps = F.conv2d(maps, halving[0].weight, halving[0].bias, stride=2, padding=1)
            maps = maps + branch(maps, first, second)
            found.insert(0, maps.flatten())
        return torch.cat(found)

    assert ladder.feature_shapes == ((2, 4, 2), (2, 4, 2), (2, 8, 4))
    assert [len(convolutions(rung)) for rung in ladder.rungs] == [3, 3, 2]
    assert (ladder.inputs, ladder.outputs) == (128, 16 + 16 + 64)
    torch.testing.assert_close(ladder(x), each_row(x, row))


@pytest.mark.parametrize("leading", LEADING)
def test_an_mlp_ladder_climbs_by_two_layers_a_level(leading: tuple[int, ...]) -> None:
    ladder = MLPLadder(6, 5, 3, activation=nn.Tanh)
    x = torch.randn(*leading, 6)
    expected: list[Tensor] = []
    features = x
    for rung in ladder.rungs:
        for layer in (rung[0], rung[2]):
            features = torch.tanh(features @ layer.weight.T + layer.bias)
        expected.insert(0, features)
    assert (ladder.feature_shapes, ladder.outputs) == (((3,), (5,)), 8)
    torch.testing.assert_close(ladder(x), torch.cat(expected, -1))


def test_what_blocks_add_is_shrunk_by_the_root_of_their_number() -> None:
    parts: list[list[Tensor]] = []
    for depth in (1, 9):
        torch.manual_seed(0)
        block = TopDownBlock(SHAPE, latents=2, depth=depth, enlarge=False)
        (spread,), (_, last) = convolutions(block.spread), convolutions(block.update)
        parts.append([spread.weight, spread.bias, last.weight, last.bias])
    for one, ninth in zip(*parts, strict=True):
        torch.testing.assert_close(ninth, one / 3)


def test_maps_are_read_by_pixel_where_the_latent_has_entries_for_each() -> None:
    by_pixel = reader(SHAPE, 2, 16)
    x = torch.randn(5, 24)
    assert isinstance(by_pixel, Maps)
    weight, bias = by_pixel.layers[0].weight[..., 0, 0], by_pixel.layers[0].bias
    expected = torch.einsum("kc,nchw->nkhw", weight, x.reshape(5, *SHAPE)) + bias[:, None, None]
    loc, raw = by_pixel(x).chunk(2, -1)  # kinds outermost: the first half is of one kind
    torch.testing.assert_close(loc, expected[:, :2].flatten(1))
    torch.testing.assert_close(raw, expected[:, 2:].flatten(1))
    for shape, size in ((SHAPE, 12), ((24,), 16)):
        whole = reader(shape, 2, size)
        assert isinstance(whole, nn.Linear)
        assert (whole.in_features, whole.out_features) == (24, 2 * size)


@pytest.mark.parametrize(
    ("image_shape", "depth", "expected"),
    [
        ((1, 8, 8), 2, [(4, 4)] * 2),
        ((1, 28, 28), 3, [(7, 7)] * 2 + [(14, 14)]),
        ((3, 32, 32), 3, [(4, 4), (8, 8), (16, 16)]),
        ((3, 64, 64), 8, [(s, s) for s in (4, 8, 16, 32) for _ in range(2)]),
        ((1, 2, 4), 1, [(1, 2)]),
    ],
)
def test_levels_are_spread_over_the_halved_sizes(
    image_shape: tuple[int, int, int], depth: int, expected: list[tuple[int, int]]
) -> None:
    assert level_sizes(image_shape, depth) == expected


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 28, 27\): cannot halve 28x27 pixels; pad"):
        level_sizes((1, 28, 27), 9)
    with pytest.raises(ValueError, match=r"\(1, 0, 8\): cannot halve 0x8"):
        level_sizes((1, 0, 8), 9)
    with pytest.raises(ValueError, match=r"depth 1: .* maps of 2 sizes, \[\(7, 7\), \(14, 14\)\]"):
        ConvLadder((1, 28, 28), 1)
    for widths in ((3,), (3, 0), (0, 3)):
        with pytest.raises(ValueError, match=r"MLPLadder\(.*at least one width, each at least 1"):
            MLPLadder(*widths)
    for rungs, shapes in (([], []), ([MLP(3, 2)], [])):
        with pytest.raises(ValueError, match=f"Ladder: {len(rungs)} rungs and 0 shapes"):
            Ladder(3, rungs, shapes)
