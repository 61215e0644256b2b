from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_vae.model import GenerativeModel


@pytest.fixture
def float64():
    """Numbers are compared in float64, from a fixed seed, with an empty parameter store."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield torch.float64
    torch.set_default_dtype(before)
    pyro.clear_param_store()


class Program(GenerativeModel):
    """A program whose body is written in the test: ``story(self, x)`` within the plate of rows,
    after ``whole(self)`` outside it. What the story draws as "x" it observes itself."""

    def __init__(self, story, whole=None, **modules):
        super().__init__()
        self.story, self.whole = story, whole
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x=None, *, n=None, total=None):
        if self.whole is not None:
            self.whole(self)
        with self.rows(x, n=n, total=total):
            return self.story(self, x)

    @classmethod
    def toy(cls):
        return cls(lambda self, x: None)


@pytest.fixture
def program():
    """Makes a Pyro program over rows of x out of functions."""
    return Program


@pytest.fixture
def draw():
    """Makes a story of one site: ``draw("z", Normal(0, 1))``, as a vector of ``size``."""

    def story(name, family, size=2, **infer):
        def run(self, x):
            return pyro.sample(name, family.expand([size]).to_event(1), infer=infer)

        return run

    return story


@pytest.fixture
def gaussian_story():
    """z ~ Normal(0, I), x ~ Normal(z, 1): the smallest model with data."""

    def run(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return run
