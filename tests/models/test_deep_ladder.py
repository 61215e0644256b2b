"""DeepLadder: its evidence by quadrature, its levels and runs counted."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.guides.top_down import TopDown
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.model import own_parameters, sample_nodes
from ppl_vae.models.deep_ladder import DeepLadder
from ppl_vae.residual import ConvLadder, Maps
from ppl_vae.sites import check_pair, paired_traces, read_sites
from ppl_vae.svi import parameters

pytestmark = pytest.mark.usefixtures("float64")


def small() -> tuple[DeepLadder, TopDown, Tensor]:
    """One pixel a level, so that there are as many latents as levels."""
    model = DeepLadder((1, 2, 2), Bernoulli, depth=2, width=3, latents=1)
    x = model.simulate(8)["x"]
    return model, TopDown(model, ConvLadder((1, 2, 2), depth=2, width=3), x), x


def test_importance_weights_average_to_the_evidence() -> None:
    """By quadrature over both latents, from the sites' own distributions."""
    model, guide, x = small()
    with torch.no_grad():  # away from the start, where latents hardly matter
        for parameter in parameters(model):
            parameter.mul_(3)
        grid = torch.linspace(-12, 12, 241).unsqueeze(-1)
        z2, z1 = grid.unsqueeze(1), grid
        log_p = model.z_dist(2).log_prob(z2) + model.z_dist(1, z2).log_prob(z1)  # (z2, z1)
        log_x = model.x_dist(z2.expand(-1, 241, -1), z1.expand(241, -1, -1))
        log_joint = torch.stack([log_p + log_x.log_prob(row) for row in x])
        expected = log_joint.flatten(1).logsumexp(1) + 2 * torch.tensor(0.1).log()
        draws = 20_000
        particles = pyro.plate("particles", draws, dim=-2)
        with own_parameters(model, guide):
            traces = paired_traces(particles(model), particles(guide), x)
        log_p, log_q = (
            sum(node["fn"].log_prob(node["value"]) for _, node in sample_nodes(trace))
            for trace in traces
        )
        weights = (log_p - log_q - expected).exp()  # of mean 1
    error = weights.std(0) / draws**0.5
    assert error.max() < 0.05
    assert ((weights.mean(0) - 1) / error).abs().max() < 4


@pytest.mark.parametrize(
    ("image_shape", "depth", "events"),
    [
        ((1, 8, 8), 2, [16, 16]),
        ((1, 28, 28), 4, [49, 49, 196, 196]),
        ((3, 32, 16), 5, [8, 8, 32, 32, 128]),
        ((3, 64, 64), 4, [16, 64, 256, 1024]),
    ],
)
def test_latents_have_the_size_of_their_levels_maps(
    image_shape: tuple[int, int, int], depth: int, events: list[int]
) -> None:
    model = DeepLadder(
        image_shape, lambda net: Binomial(net, 255), depth, width=3, latents=2, per_pixel=1
    )
    x = model.simulate(2)["x"]
    sites = read_sites(model, x=x)
    assert list(sites) == [*(f"z{level}" for level in range(depth, 0, -1)), "x"]
    assert [site.event_shape.numel() for site in sites.values()][:-1] == [2 * e for e in events]
    channels, height, width = image_shape
    assert sites["x"].event_shape == (channels * height * width,)
    guide = TopDown(model, ConvLadder(image_shape, depth, width=3), x)
    assert all(isinstance(head, Maps) for head in guide.heads.values())
    check_pair(model, guide, x, total=6)


def test_a_run_goes_down_once_and_the_guide_not_to_the_image() -> None:
    model, guide, x = small()
    calls: list[nn.Module] = []
    for part in [*model.blocks, model.likelihood, *(block.prior for block in model.blocks)]:
        part.register_forward_hook(lambda module, *_: calls.append(module))
    with own_parameters(model, guide):
        poutine.trace(guide).get_trace(x)
        top, bottom = model.blocks
        assert calls == [top.prior, top, bottom.prior]
        calls.clear()
        poutine.trace(model).get_trace(x)
    assert calls == [top.prior, top, bottom.prior, bottom, model.likelihood]


def test_a_deep_state_keeps_its_size() -> None:
    """The variance that blocks add at the start does not grow with their number."""

    def size(depth: int) -> float:
        model = DeepLadder((1, 8, 8), Bernoulli, depth, width=16, latents=4)
        with torch.no_grad():
            z = [torch.randn(64, 4 * 16)] * depth
            return (model._state(*z) - model.start).square().mean().item()

    few, many = size(4), size(64)
    assert many < 3 * few


def test_numbers_below_one_are_refused() -> None:
    for name in ("width", "latents", "per_pixel"):
        with pytest.raises(ValueError, match=f"{name}=0.*expected at least 1 of each"):
            DeepLadder((1, 8, 8), Bernoulli, 2, **{name: 0})
