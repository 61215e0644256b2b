"""The categorical VAE: its joint written out, and a likelihood that reads all variables."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_vae.discrete import Labels
from ppl_vae.distributions import one_hot
from ppl_vae.guide import Factorized
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import own_parameters
from ppl_vae.models.categorical_vae import CategoricalVAE
from ppl_vae.nn import MLP

VARIABLES, CLASSES, OBSERVED = 3, 4, 5


def test_the_joint_is_that_of_even_classes_and_of_a_sum_of_embeddings():
    torch.manual_seed(0)
    net = nn.Linear(VARIABLES * CLASSES, OBSERVED).double()
    model = CategoricalVAE(VARIABLES, CLASSES, Bernoulli(net)).double()
    index = torch.randint(CLASSES, (6, VARIABLES))
    z = one_hot(index, torch.zeros(CLASSES).double())
    x = torch.bernoulli(torch.full((6, OBSERVED), 0.5)).double()
    with own_parameters(model):
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    # A row of the weights for each class of each variable.
    embedding = net.weight.T.reshape(VARIABLES, CLASSES, OBSERVED)
    logits = net.bias + sum(embedding[n, index[:, n]] for n in range(VARIABLES))
    log_x = (x * logits.sigmoid().log() + (1 - x) * (-logits).sigmoid().log()).sum()
    expected = log_x - 6 * VARIABLES * math.log(CLASSES)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("discrete", ["score", "relaxed", "straight-through"])
def test_a_derived_guide_is_that_of_labels_of_several_variables(discrete):
    torch.manual_seed(0)
    model = CategoricalVAE.toy()
    x = model.simulate(6)["x"]
    guide = MeanField(model, MLP(6, 8), x, discrete=discrete)
    (head,) = guide.heads.values()
    assert isinstance(head, Labels)
    assert (head.variables, head.estimator) == (2, discrete)
    written = Factorized(z=(Labels(nn.Sequential(guide.encoder, head.net), variables=2), ["x"]))
    values = model.simulate(6)["z"]
    own = guide.posterior(x).log_prob(values)
    torch.testing.assert_close(own, written.posterior(x).log_prob(values))
    assert own.shape == (6,)


@pytest.mark.parametrize(("variables", "classes"), [(0, 3), (2, 1)])
def test_there_are_variables_of_several_classes(variables, classes):
    with pytest.raises(ValueError, match=r"at least 1 variable of at least 2 classes"):
        CategoricalVAE(variables, classes, Bernoulli(MLP(6, 5)))
