"""Autoregressive over sites: the density is that of the chain, computed by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_vae.guides.autoregressive import Autoregressive
from ppl_vae.model import own_parameters
from ppl_vae.nn import MLP

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def chain(program):
    """Three latents: real, positive, real."""

    def story(self, x):
        zero = torch.zeros(2)
        a = pyro.sample("a", dist.Normal(zero, 1.0).to_event(1))
        b = pyro.sample("b", dist.Gamma(zero[:1] + 2, 1.0).to_event(1))
        c = pyro.sample("c", dist.Normal(zero, b).to_event(1))
        return pyro.sample("x", dist.Normal(torch.cat([a, c], -1), 1.0).to_event(1), obs=x)

    return program(story)


def test_density_is_the_product_of_the_conditionals(chain):
    x = torch.randn(5, 4)
    guide = Autoregressive(chain, MLP(4, 8, 3), x, hidden=6)
    with own_parameters(guide):
        nodes = poutine.trace(guide).get_trace(x).nodes
    a, b, c = (nodes[name]["value"] for name in "abc")

    def normal(name, context, u):
        first, _, last = guide.heads[name].net
        assert first.weight.shape == (6, context.shape[-1])
        hidden = (context @ first.weight.T + first.bias).clamp(min=0)
        loc, raw = (hidden @ last.weight.T + last.bias).chunk(2, -1)
        scale = raw.exp().log1p()
        return -0.5 * (((u - loc) / scale) ** 2 + (2 * torch.pi * scale**2).log()).sum(-1)

    features = guide.encoder(x)
    given_a = torch.cat([features, a], -1)
    given_ab = torch.cat([given_a, b.log()], -1)
    for name, expected in (
        ("a", normal("a", features, a)),
        ("b", normal("b", given_a, b.log()) - b.log().sum(-1)),
        ("c", normal("c", given_ab, c)),
    ):
        torch.testing.assert_close(nodes[name]["fn"].log_prob(nodes[name]["value"]), expected)


def test_hidden_width_is_that_of_the_features_by_default(chain):
    guide = Autoregressive(chain, MLP(4, 8, 3), torch.randn(2, 4))
    assert [head.net[0].out_features for head in guide.heads.values()] == [3, 3, 3]
    with pytest.raises(ValueError, match=r"Autoregressive\(hidden=0\): expected a width"):
        Autoregressive(chain, MLP(4, 8, 3), torch.randn(2, 4), hidden=0)
