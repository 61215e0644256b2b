"""Weights in few bits: how near they are to what was stored, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppl_vae.pretrained.storing import pack, packed_bytes, unpack


def some_weights() -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 40, generator=stream) * torch.tensor([[1e-3, 0.1, 1, 8, 1e-7, 0]]).T
    return {
        "model.matrix": matrix,
        "model.conv": torch.randn(4, 3, 5, 5, generator=stream),
        "model.vector": torch.randn(40, generator=stream),
        "model.scalar": torch.tensor(0.3),
        "guide.mask": torch.rand(3, 3, generator=stream),
        "guide.order": torch.randperm(9, generator=stream),
    }


def test_16_bits_give_weights_back_within_half_a_step() -> None:
    given = some_weights()
    found = unpack(pack(given, {"guide.mask"}, bits=16))
    assert found.keys() == given.keys()
    for name in ("model.matrix", "model.conv", "model.vector", "model.scalar"):
        exponent = torch.frexp(given[name]).exponent.clamp(min=-13)  # below, steps are alike
        half = torch.ldexp(torch.ones_like(given[name]), exponent - 12)
        assert found[name].dtype == torch.float32
        assert ((found[name] - given[name]).abs() <= half).all()
        assert not torch.equal(found[name], given[name])


def test_8_bits_give_a_row_back_within_half_its_step() -> None:
    given = some_weights()
    packed = pack(given, {"guide.mask"}, bits=8)
    found = unpack(packed)
    assert packed["model.conv:8"].dtype == torch.int8
    assert found["model.conv"].shape == given["model.conv"].shape
    assert torch.equal(found["model.vector"], given["model.vector"].half().float())
    for name in ("model.matrix", "model.conv"):
        error = (found[name] - given[name]).flatten(1).abs().amax(1)
        exact = given[name].flatten(1).abs().amax(1) / 127
        # A step is rounded up, to the next float16.
        step = exact * (1 + 2**-10) + 2**-24
        assert (error <= step / 2 * (1 + 1e-6)).all()
        assert (error > 0.3 * exact)[:4].all()  # it is 8 bits, no more
    assert (found["model.matrix"][5] == 0).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_no_parameter_keeps_its_type_and_bits(bits: Any) -> None:
    given = some_weights()
    found = unpack(pack(given, {"guide.mask"}, bits=bits))
    for name in ("guide.mask", "guide.order"):
        assert found[name].dtype == given[name].dtype
        assert torch.equal(found[name], given[name])


def test_bits_are_chosen_by_size() -> None:
    given = {"model.w": torch.randn(100, 100)}
    data, bits = packed_bytes(given, limit=20_500)
    assert bits == 16
    assert len(data) <= 20_500
    data, bits = packed_bytes(given, limit=19_999)
    assert bits == 8
    assert len(data) <= 11_000
    with pytest.raises(ValueError, match=r"10,000 weights take 10,\d+ bytes in 8 bits; .* 9,999"):
        packed_bytes(given, limit=9_999)


@pytest.mark.parametrize("name", ["model.w:scale", "guide.w:8", "guide.w:16"])
def test_a_name_that_clashes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no name for a weight"):
        pack({"model.w": torch.ones(2, 2), name: torch.ones(2)}, bits=8)


@pytest.mark.parametrize("wrong", [7e4, float("nan"), float("inf")])
def test_a_weight_that_float16_cannot_hold_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"model\.w has a weight of .*: expected at most 65504"):
        pack({"model.w": torch.tensor([1.0, wrong])}, bits=16)
