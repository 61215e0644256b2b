"""Sigmoid belief networks: the probability of x, written out in numpy over all bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine

from ppl_vae.discrete import Bits
from ppl_vae.evaluation import evaluate
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import own_parameters
from ppl_vae.models.sigmoid_belief_network import SigmoidBeliefNetwork
from ppl_vae.nn import MLP

OBSERVED = 4


def network(*layers: int) -> SigmoidBeliefNetwork:
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(layers, Bernoulli(MLP(layers[-1], OBSERVED))).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def sigmoid_log(bits: Any, logits: Any) -> Any:
    """The log-probability of bits: log of sigmoid(logits), or of 1 minus that."""
    return -np.logaddexp(0, np.where(bits > 0, -logits, logits)).sum(-1)


def log_evidence(model: SigmoidBeliefNetwork, layers: tuple[int, ...], x: Any) -> float:
    """log sum over all bits of the product of the layers' probabilities."""
    held = {name: p.detach().numpy() for name, p in model.named_parameters()}
    terms = []
    for bits in itertools.product([0.0, 1.0], repeat=sum(layers)):
        z = np.split(np.array(bits), np.cumsum(layers)[:-1])  # the top first
        log_p = sigmoid_log(z[0], held["top.logits"])
        for k in range(len(layers) - 1):
            logits = held[f"below.{k}.net.weight"] @ z[k] + held[f"below.{k}.net.bias"]
            log_p += sigmoid_log(z[k + 1], logits)
        logits = held["likelihood.net.0.weight"] @ z[-1] + held["likelihood.net.0.bias"]
        terms.append(log_p + sigmoid_log(x, logits))
    return float(np.logaddexp.reduce(terms))


@pytest.mark.parametrize("layers", [(3,), (2, 3), (2, 1, 3)])
def test_the_probabilities_of_all_data_are_those_of_the_written_out_sum(layers):
    model = network(*layers)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=OBSERVED))).double()
    expected = [log_evidence(model, layers, x) for x in every.numpy()]
    assert np.logaddexp.reduce(expected) == pytest.approx(0, abs=1e-12)
    # Each layer's values in a plate of their own, left of the rows, and all of them summed.
    values = {}
    for k, size in enumerate(layers):
        support = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size))).double()
        dims = (1,) * k + (len(support),) + (1,) * (len(layers) - k)
        values[f"z{len(layers) - k}"] = support.reshape(*dims, size)
    with own_parameters(model):
        traced: Any = poutine.trace(poutine.condition(model, values)).get_trace(every)
    nodes = traced.nodes
    joint: Any = sum(nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in (*values, "x"))
    found = joint.flatten(0, -2).logsumexp(0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_evaluation_finds_the_probability_by_importance_sampling():
    layers = (2, 3)
    model = network(*layers)
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double().expand(50, -1)
    guide = Factorized(z1=(Bits(MLP(4, 3)), ["x"]), z2=(Bits(MLP(3, 2)), ["z1"])).double()
    found = evaluate(model, guide, {"train": x, "test": x}, samples=500, compile=False)
    expected = -log_evidence(model, layers, x[0].numpy())
    # The rows are alike, so that their spread is the error of a row's estimate.
    assert found.nll == pytest.approx(expected, abs=max(5 * found.nll_se, 1e-3))
    assert found.nll_se < 0.02
    assert -found.elbo > found.nll


@pytest.mark.parametrize("layers", [[], [3, 0]])
def test_layers_have_bits(layers):
    with pytest.raises(ValueError, match=r"layers=.* the top first, at least one layer"):
        SigmoidBeliefNetwork(layers, Bernoulli(MLP(3, OBSERVED)))
