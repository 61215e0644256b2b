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


LABELED_RECIPES = '''
import torch
from ppl_vae import Experiment, Factorized
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset
from ppl_vae.discrete import Estimator, Labels
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.objectives import SemiSupervised
from ppl_vae.priors import StandardNormal

def bits(*, labels: int = 6, label_seed: int = 0, estimator: Estimator = "enumerate") -> Experiment:
    """Bits of three classes, of which some are known. No published figure."""
    stream = torch.Generator().manual_seed(0)
    y = torch.arange(180) % 3
    p = torch.tensor([[0.9, 0.1, 0.1, 0.5], [0.1, 0.9, 0.1, 0.5], [0.1, 0.1, 0.9, 0.5]])[y]
    x = torch.bernoulli(p, generator=stream)
    splits = {
        name: {"x": x[part], "y": y[part]}
        for name, part in [
            ("train", slice(90)), ("validation", slice(90, 120)), ("test", slice(120, 180))
        ]
    }
    data = Dataset("bits", splits).labeled(labels, label_seed)
    guide = Factorized(
        y=(Labels(MLP(4, 8, 3), estimator=estimator), ["x"]),
        z=(Normal(MLP(4 + 3, 8, 2)), ["x", "y"]),
    )
    model = M2(StandardNormal(1), Bernoulli(MLP(3 + 1, 8, 4)), classes=3)
    return Experiment(model, guide, data, {
        "epochs": 2, "batch_size": 30, "learning_rate": 1e-2, "objective": SemiSupervised(1.0)
    })

def by_score(*, labels: int = 3, label_seed: int = 0) -> Experiment:
    """The same, with the estimator that it has. No published figure."""
    return bits(labels=labels, label_seed=label_seed, estimator="score")

def without_labels(*, latents: int = 1) -> Experiment:
    """A recipe that takes no labels. No published figure."""
    return bits()
'''


@pytest.fixture
def labeled_recipes(tmp_path):
    """A file of recipes with labels: ``bits``, ``by_score``, ``without_labels``."""
    file = tmp_path / "labeled.py"
    file.write_text(LABELED_RECIPES)
    return file
