"""Replicas as one program: each as if alone, each with noise of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.graphs import Graph, Untraceable, record
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.recorded import RecordedStep
from ppl_vae.signature import Signature
from ppl_vae.svi import SVI, parameters
from ppl_vae.training import Training
from ppl_vae.vectorized import vectorize

pytestmark = pytest.mark.usefixtures("float64")
ROWS, BATCH, REPLICAS = 50, 32, 3


def replicas(data: Tensor) -> list[SVI]:
    made = []
    for seed in range(REPLICAS):
        torch.manual_seed(seed)
        model = VAE.toy()
        guide = MeanField(model, MLP(data.shape[1], 4), x=data[:2])
        optimizer = torch.optim.Adam(parameters(model, guide), 1e-2, fused=True)
        training = Training(Trace_ELBO(), ROWS)

        def feed(numbers: Tensor) -> dict[str, Any]:
            return {"x": data[numbers], "total": ROWS}

        made.append(SVI(model, guide, optimizer, training, feed=feed, compile=False))
    return made


def state(svi: SVI) -> list[Tensor]:
    assert isinstance(svi.model, nn.Module)
    assert isinstance(svi.guide, nn.Module)
    assert isinstance(svi.optim, torch.optim.Optimizer)
    slots = [slot for held in svi.optim.state.values() for slot in held.values()]
    tensors = [*parameters(svi.model, svi.guide), *slots, svi.loss.totals]
    return [tensor.detach().clone() for tensor in tensors]


def test_replicas_equal_separate_runs_on_the_same_weights_and_noise() -> None:
    """A batch's noise, 32 or 16 rows of 3, comes in whole blocks of the generator: drawn for all
    replicas at once it is what they draw one after the other."""
    data = torch.bernoulli(torch.full((ROWS, 6), 0.4))
    alone, together = replicas(data), replicas(data)
    numbers = torch.stack([torch.randperm(ROWS)[:BATCH] for _ in range(REPLICAS)])
    for svi, own in zip(alone + together, [*numbers, *numbers], strict=True):
        torch.manual_seed(0)
        svi.step(own)
        svi.loss.weight = 0.5
    signatures = [Signature((own,), {}) for own in numbers]
    graphs = [
        RecordedStep(svi, signature, varying=False).graph()
        for svi, signature in zip(together, signatures, strict=True)
    ]
    torch.manual_seed(1)
    before = [state(svi) for svi in together]
    program = vectorize(graphs, numbers)
    smaller = numbers[:, : BATCH // 2]  # another batch size, another program on the same weights
    halves = [
        RecordedStep(svi, Signature((own,), {}), varying=False).graph()
        for svi, own in zip(together, smaller, strict=True)
    ]
    program_of_halves = vectorize(halves, smaller)
    assert all(
        torch.equal(a, b)
        for svi, held in zip(together, before, strict=True)
        for a, b in zip(state(svi), held, strict=True)
    ), "making the program takes no step"
    batches = [numbers, smaller, numbers, numbers, smaller, smaller, numbers]
    torch.manual_seed(1)
    expected = [[svi.step(own) for svi, own in zip(alone, batch, strict=True)] for batch in batches]
    torch.manual_seed(1)
    losses = [
        (program if batch is numbers else program_of_halves)(batch)[0].tolist() for batch in batches
    ]
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(state(other), state(one), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: torch.randn(4, 3),
        lambda p: torch.rand_like(p),
        lambda p: torch.zeros(4, 3).normal_(),
        lambda p: torch.zeros(4, 3).uniform_(),
        lambda p: torch.zeros(4, 3).exponential_(),
        lambda p: torch.bernoulli(torch.full((40, 3), 0.5)),
        lambda p: torch.zeros(40, 3).bernoulli_(0.5),
        lambda p: torch.normal(torch.zeros(4, 3), 1.0),
        lambda p: torch.multinomial(torch.ones(40, 9), 3),
        lambda p: torch.poisson(torch.full((40, 3), 5.0)),
        lambda p: torch._standard_gamma(torch.ones(4, 3)),
        lambda p: torch._sample_dirichlet(torch.ones(4, 3)),
        lambda p: torch.nn.functional.dropout(torch.ones(40, 3), 0.5),
    ],
)
def test_replicas_draw_apart(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing that the draw depends on differs between them. Not compiled, which draws
    what the recorded graph draws."""
    monkeypatch.setattr(Graph, "compile", lambda self, *inputs: self)
    graphs = []
    for seed in range(REPLICAS):
        weight = torch.full((4, 3), float(seed))
        _, graph = record(lambda x, weight=weight: (draw(x), weight + x.sum()), torch.zeros(4, 3))
        graphs.append(graph)
    drawn, weights = vectorize(graphs, torch.zeros(REPLICAS, 4, 3))(torch.zeros(REPLICAS, 4, 3))
    assert len(drawn) == REPLICAS
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert weights[:, 0, 0].tolist() == [0, 1, 2]


def test_replicas_of_other_shapes_are_refused() -> None:
    weights = torch.ones(2), torch.ones(3)
    graphs = [record(lambda x, w=w: (x * w).sum(), torch.ones(()))[1] for w in weights]
    with pytest.raises(Untraceable, match="replicas take different operations"):
        vectorize(graphs, torch.ones(2))
