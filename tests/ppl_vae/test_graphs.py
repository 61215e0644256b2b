"""Recorded graphs: same draws, same writes, compiled or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae.graphs import Untraceable, record, unrecorded


def draws(x: Tensor) -> list[Tensor]:
    """One of every way in which torch's and Pyro's distributions draw; x in (0, 1)."""
    return [
        torch.randn(3, 4, dtype=x.dtype),
        torch.rand(3, 4, dtype=x.dtype),
        torch.randn_like(x),
        torch.rand_like(x),
        torch.empty_like(x).normal_(1, 2),
        torch.empty_like(x).uniform_(-2, 3),
        torch.empty_like(x).exponential_(),
        torch.empty_like(x).cauchy_(),
        torch.empty_like(x).geometric_(0.3),
        torch.empty_like(x).log_normal_(),
        torch.normal(x, x + 1),
        torch.bernoulli(x),
        torch.empty_like(x).bernoulli_(0.3),
        torch.empty_like(x).bernoulli_(x),
        F.dropout(x, 0.4, training=True),
        torch.multinomial(x, 2, replacement=True),
        torch.poisson(5 * x),
        torch.binomial(torch.full_like(x, 5), x),
        torch._standard_gamma(x + 1),
        torch._sample_dirichlet(x + 1),
        torch.randint(0, 10, (5,)),
        torch.randperm(10),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_graph_draws_what_eager_torch_draws(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 7, dtype=dtype)
    _, graph = record(draws, x)
    compiled = graph.compile(x)
    outcomes = []
    for run in (draws, graph, compiled):
        torch.manual_seed(1)
        outcomes.append([*run(x), torch.get_rng_state()])
    for eager, recorded, program in zip(*outcomes, strict=True):
        assert torch.equal(recorded, eager)
        torch.testing.assert_close(program, eager)


def test_a_graph_reads_and_writes_what_the_function_does() -> None:
    weight = nn.Parameter(torch.ones(3))
    count, total, other = torch.zeros(()), torch.zeros(2, 3), torch.ones(3)

    def step(x: Tensor) -> tuple[Tensor, str]:
        loss = (x * weight * other).sum()
        loss.backward()
        with torch.no_grad():
            weight.sub_(0.1 * weight.grad)
            total[1] += x  # through a view
        weight.grad = None
        count.add_(1)
        return loss.detach(), "a constant"

    x = torch.tensor([1.0, 2.0, 3.0])
    (loss, text), graph = record(step, x)
    assert (loss.item(), text) == (6.0, "a constant")
    assert len(graph.captured) == 4
    assert {id(t) for t in graph.mutated} == {id(weight), id(count), id(total)}
    for run in (graph, graph.compile(x)):
        before = weight.detach().clone()
        loss, text = run(2 * x)
        torch.testing.assert_close(loss, (2 * x * before).sum())
        torch.testing.assert_close(weight.detach(), before - 0.2 * x)
        assert text == "a constant"
    assert count.item() == 3
    torch.testing.assert_close(total, torch.stack([0 * x, 5 * x]))
    assert len(graph.first(1)(x)) == 1


def test_numbers_that_large_tensors_need_are_those_they_need() -> None:
    """However they lie in memory: the compiler is made to store them, see _compute_numbers_once."""
    torch.manual_seed(0)
    weight, large = torch.rand(6, 6), torch.rand(40, 6, 6)

    def function(x: Tensor) -> list[Tensor]:
        row = weight[:, 0]
        return [
            x * row,
            x * (-row),
            x * weight.t().exp(),
            x * weight[::2, 1:2].log().expand(3, 6).repeat(2, 1),
            x ** (row.sum() + 1).sqrt(),
            x * weight[1].exp().unsqueeze(-1),
        ]

    _, graph = record(function, large)
    for compiled, expected in zip(graph.compile(large)(large), function(large), strict=True):
        torch.testing.assert_close(compiled, expected)


def test_a_tensor_made_aside_is_read_at_each_run() -> None:
    made = []

    def function(x: Tensor) -> Tensor:
        with unrecorded():
            made.append(torch.tensor(2.0))
        return x * made[0] * torch.tensor(3.0)

    _, graph = record(function, torch.ones(()))
    made[0].fill_(5.0)
    assert graph(torch.ones(())).item() == 15.0


def test_a_question_about_a_value_is_refused_with_its_line() -> None:
    def asks(x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return x
        return -x

    with pytest.raises(Untraceable, match=r"test_graphs.py:\d+ \(if x.sum\(\) > 0:  # h.*value of"):
        record(asks, torch.ones(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_compiled_graph_is_one_cuda_graph() -> None:
    weight = torch.zeros(5, device="cuda")

    def step(x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        weight.add_(x + noise)
        return noise.sum()

    x = torch.ones(5, device="cuda")
    torch.manual_seed(0)
    _, graph = record(step, x)
    compiled = graph.compile(x)
    outcomes = []
    for run in (graph, compiled):
        weight.zero_()
        torch.manual_seed(1)
        sums = torch.stack([run(k * x).clone() for k in range(4)])
        outcomes.append((sums, weight.clone()))
    torch.testing.assert_close(outcomes[1], outcomes[0])
    assert len(set(outcomes[1][0].tolist())) == 4, "each replay draws anew"
