from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.vae import VAE
from ppl_vae.nn import (
    MLP,
    Branches,
    ConvDecoder,
    ConvEncoder,
    Gated,
    GatedConv,
    GatedMLP,
    Recomputed,
    Rescaled,
    SkipMLP,
    width_of,
)
from ppl_vae.objectives import plain_elbo
from ppl_vae.priors import StandardNormal
from ppl_vae.recorded import RecordedStep
from ppl_vae.residual import Maps
from ppl_vae.signature import Signature
from ppl_vae.svi import SVI, parameters

IMAGES = [(c, side, side) for c in (1, 3) for side in (8, 28, 32, 64)]
STAGES = {8: 1, 28: 2, 32: 3, 64: 4}

pytestmark = pytest.mark.usefixtures("float64")


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def pixels(shape):
    return shape[0] * shape[1] * shape[2]


def in_front(first, net):
    both = nn.Sequential(first, net)
    both.inputs, both.outputs = first.inputs, net.outputs
    return both


NETS = {
    "MLP": lambda: MLP(5, 7, 6, 3),
    "MLP without hidden layer": lambda: MLP(5, 3),
    "MLP tanh": lambda: MLP(5, 4, 3, activation=nn.Tanh),
    "GatedMLP": lambda: GatedMLP(5, 7, 6, 3),
    "GatedMLP without hidden layer": lambda: GatedMLP(5, 3),
    "SkipMLP": lambda: SkipMLP(5, 7, 6, 3, activation=nn.Tanh),
    "SkipMLP gated": lambda: SkipMLP(5, 7, 6, 3, gated=True),
    "SkipMLP without hidden layer": lambda: SkipMLP(5, 3),
    "Branches": lambda: Branches(Gated(2, 3), MLP(3, 2)),
    "GatedConv": lambda: Maps((2, 4, 6), GatedConv(2, 3, 5, stride=2), GatedConv(3, 1, 3)),
    "GatedConv enlarged": lambda: Maps((2, 4, 6), GatedConv(2, 3, 3, stride=2, enlarge=True)),
    "Rescaled in front": lambda: in_front(Rescaled(5, 2.0), MLP(5, 3)),
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


@pytest.mark.parametrize(("stride", "enlarge"), [(1, False), (2, False), (2, True)])
def test_gated_conv_multiplies_values_by_the_sigmoid_of_gates(stride, enlarge):
    layer, maps = GatedConv(2, 3, 5, stride, enlarge=enlarge), torch.randn(4, 2, 6, 8)
    (both,) = convolutions(layer)
    one = {"stride": stride, "padding": 2}
    if enlarge:
        one["output_padding"] = 1
        values, gates = (
            nn.functional.conv_transpose2d(maps, both.weight[:, part], both.bias[part], **one)
            for part in (slice(0, 3), slice(3, 6))
        )
    else:
        values, gates = (
            nn.functional.conv2d(maps, both.weight[part], both.bias[part], **one)
            for part in (slice(0, 3), slice(3, 6))
        )
    found = layer(maps)
    torch.testing.assert_close(found, values / (1 + (-gates).exp()))
    assert found.shape[2:] == ((12, 16) if enlarge else (6 // stride, 8 // stride))


@pytest.mark.parametrize("numbers", [(0, 3, 5), (1, 3, 4), (1, 3, 5, 0)])
def test_gated_conv_takes_odd_kernels(numbers):
    with pytest.raises(ValueError, match=r"GatedConv\(.*an odd size"):
        GatedConv(*numbers)


def test_branches_take_a_part_each():
    first, second = MLP(2, 3), MLP(4, 1)
    x = torch.randn(5, 6)
    expected = torch.cat([affine(x[:, :2], first[0]), affine(x[:, 2:], second[0])], -1)
    torch.testing.assert_close(Branches(first, second)(x), expected)


@pytest.mark.parametrize("nets", [(), (MLP(2, 3), nn.Linear(2, 3))], ids=["none", "unstated"])
def test_branches_state_their_widths(nets):
    with pytest.raises(ValueError, match=r"Branches\(.*as \.inputs and \.outputs"):
        Branches(*nets)


@pytest.mark.parametrize("gated", [False, True])
def test_skip_mlp_gives_each_layer_the_input_again(gated):
    net = SkipMLP(5, 7, 6, 3, activation=nn.Tanh, gated=gated)
    x = context = torch.randn(4, 5)
    for (layer, *_), width in zip(net.hidden, (7, 6), strict=True):
        linear = affine(context, layer.linear if gated else layer)
        hidden = nn.functional.glu(linear) if gated else torch.tanh(linear)
        assert hidden.shape == (4, width)
        context = torch.cat([hidden, x], -1)
    torch.testing.assert_close(net(x), affine(context, net.last))


@pytest.mark.parametrize("build", [MLP, GatedMLP, SkipMLP])
def test_dropout_drops_its_share_of_hidden_units_in_training_only(build):
    """Two hidden layers, of which the second gives ones, each an output."""
    net = build(5, 4, 40, 40, dropout=0.25)
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == 2
    *_, second, last = (m for m in net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        for parameter in (second.weight, second.bias, last.weight, last.bias):
            parameter.zero_()
        second.bias[:40] = 2.0 if build is GatedMLP else 1.0  # a gate of 0 halves
        last.weight[:, :40] = torch.eye(40)
    x = torch.randn(200, 5)
    out = net(x)
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 1 / 0.75))
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (net(x) != out).any()
    torch.testing.assert_close(net.eval()(x), torch.ones(200, 40))


def test_a_step_with_dropout_can_be_recorded():
    """Recording compares the graph with an eager step, on other draws."""
    x = torch.randint(2, (6, 5)).double()
    model = VAE(StandardNormal(2), Bernoulli(SkipMLP(2, 8, 5, dropout=0.5)))
    guide = MeanField(model, MLP(5, 8, 7, dropout=0.2), x)
    optimizer = torch.optim.Adam(parameters(model, guide), fused=True)
    svi = SVI(model, guide, optimizer, plain_elbo(model, guide, x), compile=False)
    svi.step(x)
    RecordedStep(svi, Signature((x,), {}), varying=False)


def test_rescaled_divides():
    x = torch.arange(0.0, 256.0, 51.0)
    net = Rescaled(6, 255)
    torch.testing.assert_close(net(x), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    assert (net.inputs, net.outputs) == (6, 6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive_and_finite(scale):
    with pytest.raises(ValueError, match=rf"scale={scale}.*positive and finite"):
        Rescaled(3, scale)


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


@pytest.mark.parametrize("net", [MLP, GatedMLP, SkipMLP])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_is_a_share(net, dropout):
    with pytest.raises(ValueError, match=rf"^{net.__name__}\(dropout={dropout}\)"):
        net(3, 2, dropout=dropout)


@pytest.mark.parametrize("net", [MLP, GatedMLP, SkipMLP])
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
