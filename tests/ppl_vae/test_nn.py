from __future__ import annotations

import pytest
import torch
from torch import nn

from ppl_vae.nn import MLP, ConvDecoder, ConvEncoder, Gated, GatedMLP, Recomputed, width_of

IMAGES = [(c, side, side) for c in (1, 3) for side in (8, 28, 32, 64)]
STAGES = {8: 1, 28: 2, 32: 3, 64: 4}

pytestmark = pytest.mark.usefixtures("float64")


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def pixels(shape):
    return shape[0] * shape[1] * shape[2]


NETS = {
    "MLP": lambda: MLP(5, 7, 6, 3),
    "MLP without hidden layer": lambda: MLP(5, 3),
    "MLP tanh": lambda: MLP(5, 4, 3, activation=nn.Tanh),
    "GatedMLP": lambda: GatedMLP(5, 7, 6, 3),
    "GatedMLP without hidden layer": lambda: GatedMLP(5, 3),
    **{f"ConvEncoder {s}": lambda s=s: ConvEncoder(s, outputs=3, width=2) for s in IMAGES},
    **{f"ConvDecoder {s}": lambda s=s: ConvDecoder(5, s, width=2) for s in IMAGES},
    "ConvDecoder of two": lambda: ConvDecoder(5, (3, 8, 8), width=2, per_pixel=2),
}


def affine(x, layer):
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def test_mlp_is_affine_maps_with_the_activation_between():
    relu, tanh = NETS["MLP"](), NETS["MLP tanh"]()
    x = torch.randn(4, 5)
    first, second, last = (m for m in relu if isinstance(m, nn.Linear))
    hidden = affine(affine(x, first).clamp(min=0), second).clamp(min=0)
    torch.testing.assert_close(relu(x), affine(hidden, last))
    torch.testing.assert_close(tanh(x), affine(torch.tanh(affine(x, tanh[0])), tanh[-1]))


def test_gated_mlp_multiplies_values_by_the_sigmoid_of_gates():
    net = NETS["GatedMLP"]()
    x = hidden = torch.randn(4, 5)
    *gated, last = net
    for layer in gated:
        assert isinstance(layer, Gated)
        value, gate = affine(hidden, layer.linear).split(layer.linear.out_features // 2, -1)
        hidden = value / (1 + torch.exp(-gate))
    torch.testing.assert_close(net(x), affine(hidden, last))


@pytest.mark.parametrize("name", NETS)
def test_leading_dims_are_rows_and_every_parameter_gets_a_gradient(name):
    net = NETS[name]()
    x = torch.randn(2, 3, net.inputs)
    out = net(x)
    assert out.shape == (2, 3, net.outputs)
    assert out.dtype == torch.float64
    flat = net(x.reshape(6, -1))
    torch.testing.assert_close(out, flat.reshape(out.shape))
    torch.testing.assert_close(net(x[0, 1]), out[0, 1])  # a single row without batch dims
    assert net(x[:0]).shape == (0, 3, net.outputs)
    (out**2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_conv_nets_mirror_each_other(shape):
    encoder, decoder = ConvEncoder(shape, 5, width=4), ConvDecoder(5, shape, width=4)
    assert (encoder.inputs, encoder.outputs) == (pixels(shape), 5)
    assert (decoder.inputs, decoder.outputs) == (5, pixels(shape))
    down, up = convolutions(encoder), convolutions(decoder)
    expected = [shape[0], *(4 * 2**k for k in range(STAGES[shape[1]]))]
    assert [down[0].in_channels, *(c.out_channels for c in down)] == expected
    assert [*(c.in_channels for c in up), up[-1].out_channels] == expected[::-1]
    assert encoder.head.in_features == decoder.foot.out_features
    assert 3 <= (encoder.head.in_features / expected[-1]) ** 0.5 <= 7


def test_conv_encoder_unfolds_channels_first():
    encoder = ConvEncoder((3, 8, 8), outputs=4, width=2)
    image = torch.randn(2, 3, 8, 8)
    features = nn.functional.conv2d(
        image, encoder.stages[0].weight, encoder.stages[0].bias, stride=2, padding=1
    )
    by_hand = affine(features.clamp(min=0).flatten(1), encoder.head)
    torch.testing.assert_close(encoder(image.flatten(1)), by_hand)


def test_per_pixel_puts_the_kinds_of_parameters_outermost():
    decoder = ConvDecoder(5, (3, 8, 8), width=2, per_pixel=2)
    last = decoder.stages[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(6.0))
    loc, scale = decoder(torch.randn(2, 5)).chunk(2, -1)
    assert torch.equal(loc.reshape(2, 3, 64)[..., 0], torch.tensor([[0.0, 1.0, 2.0]] * 2))
    assert torch.equal(scale.reshape(2, 3, 64)[..., 0], torch.tensor([[3.0, 4.0, 5.0]] * 2))


def test_oblong_images_halve_both_sides():
    shape = (1, 16, 24)  # 16x24 -> 8x12 -> 4x6
    assert len(convolutions(ConvEncoder(shape, 2))) == 2
    assert ConvDecoder(2, shape)(torch.randn(3, 2)).shape == (3, 16 * 24)


@pytest.mark.parametrize("net", [MLP, GatedMLP])
@pytest.mark.parametrize("widths", [(), (3,), (3, 0), (3, -1, 2)])
def test_widths_must_be_two_or_more_positive_numbers(net, widths):
    with pytest.raises(ValueError, match=rf"^{net.__name__}\(.*at least two widths"):
        net(*widths)


@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 30, 30), (3, 28, 27)], ids=str)
@pytest.mark.parametrize("build", [lambda s: ConvEncoder(s, 3), lambda s: ConvDecoder(3, s)])
def test_sides_that_cannot_be_halved_are_refused(build, shape):
    with pytest.raises(ValueError, match=r"cannot halve \d+x\d+ pixels.*pad the images"):
        build(shape)


def test_width_of_takes_what_the_net_states_or_tries_it():
    class Silent(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return torch.cat([x, x], -1)

    assert width_of(MLP(4, 3), torch.zeros(2, 99)) == 3  # stated: the example is not used
    assert width_of(Silent(), torch.zeros(2, 4)) == 8


def test_a_recomputed_net_keeps_its_input_alone() -> None:
    torch.manual_seed(0)
    net = MLP(4, 16, 16, 2)
    x = torch.randn(7, 4, requires_grad=True)
    kept: dict[bool, int] = {}
    gradients = []
    for recomputed in (False, True):
        saved: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        )
        with hooks:
            out = (Recomputed(net) if recomputed else net)(x)
        kept[recomputed] = sum(saved)
        gradients.append(torch.autograd.grad(out.sum(), [x, *net.parameters()]))
    assert kept[True] < kept[False]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert Recomputed(net).outputs == 2


def test_dropout_cannot_be_recomputed() -> None:
    with pytest.raises(ValueError, match="would drop other entries"):
        Recomputed(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
