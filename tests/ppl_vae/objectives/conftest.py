from __future__ import annotations

import pytest
import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.guide import Factorized
from ppl_vae.model import own_parameters
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives import backward
from ppl_vae.svi import parameters


@pytest.fixture
def ppca():
    """A PPCA, a guide that is not its posterior, and four rows of data."""
    model = PPCA(latents=2, observed=3, scale=0.8)
    return model, Factorized(z=(Normal(nn.Linear(3, 4)), ["x"])), torch.randn(4, 3)


@pytest.fixture
def losses():
    """Computes an objective's loss on the draws of a seed, and the gradients of all parameters."""

    def run(objective, model, guide, *args, seed=1, **kwargs):
        state = getattr(objective, "state", None)
        held = parameters(*(p for p in (model, guide, state) if isinstance(p, nn.Module)))
        for parameter in held:
            parameter.grad = None
        torch.manual_seed(seed)
        with own_parameters(model, guide):
            loss = backward(objective, model, guide, *args, **kwargs)
        return float(loss), [p.grad for p in held if p.grad is not None]

    return run


@pytest.fixture
def noise(monkeypatch):
    """Has the normals drawn from given noise, one tensor a site: ``noise(eps)``."""

    def use(*tensors):
        left = []

        def standard_normal(shape, dtype, device):
            if not left:
                left.extend(tensors)
            return left.pop(0).reshape(shape)

        monkeypatch.setattr(torch.distributions.normal, "_standard_normal", standard_normal)

    return use


class Exact(nn.Module):
    """A model's own posterior as a conditional; its parameters stay the model's."""

    def __init__(self, model):
        super().__init__()
        self.posterior = model.posterior

    def forward(self, x):
        return self.posterior(x)


@pytest.fixture
def exact():
    """Makes the guide that is a PPCA's exact posterior."""
    return lambda model: Factorized(z=(Exact(model), ["x"]))
