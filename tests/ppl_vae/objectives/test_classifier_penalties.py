"""Penalties on a classifier: a linear one tells where they point, and brute force how high."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vae.discrete import Labels, RelaxedOneHot
from ppl_vae.distributions import OneHotCategorical
from ppl_vae.nn import MLP
from ppl_vae.objectives import MutualInformation, VirtualAdversarial

pytestmark = pytest.mark.usefixtures("float64")


def binary(weight: Tensor, bias: float = 0.3) -> Any:
    """The logistic classifier: logits 0 and w.x + b."""

    def classify(x: Tensor) -> OneHotCategorical:
        score = x @ weight + bias
        return OneHotCategorical(logits=torch.stack([torch.zeros_like(score), score], -1))

    return classify


class Watched:
    """Notes the rows at which a classifier is asked."""

    def __init__(self, classify: Any) -> None:
        self.classify, self.asked = classify, []

    def __call__(self, x: Tensor) -> Any:
        self.asked.append(x.detach().clone())
        return self.classify(x)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_of_a_logistic_classifier_the_direction_is_its_weights(epsilon):
    weight = torch.tensor([2.0, -1.0, 0.5])
    x = torch.randn(20, 3)
    watched = Watched(binary(weight))
    found = VirtualAdversarial(epsilon).of_rows(watched, x)
    moved = watched.asked[-1] - x
    torch.testing.assert_close(moved.norm(dim=1), torch.full((20,), epsilon))
    cosine = (moved @ weight) / (epsilon * weight.norm())
    torch.testing.assert_close(cosine.abs(), torch.ones(20))
    # The value at the end of that step.
    p = binary(weight)(x).probs
    sides = torch.stack(
        [kl(p, binary(weight)(x + s * epsilon * weight / weight.norm()).probs) for s in (-1, 1)]
    )
    own = sides.gather(0, (cosine > 0).long().unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(found, own)
    assert set(cosine.sign().tolist()) == {-1.0, 1.0}, "the sign is that of the draw"


@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_near_the_highest_on_the_circle(seed):
    """A net over the plane; among a thousand neighbors at the radius."""
    torch.manual_seed(seed)
    net = MLP(2, 16, 3, activation=nn.Tanh)
    x, epsilon = torch.randn(200, 2), 0.05

    def classify(x: Tensor) -> OneHotCategorical:
        return OneHotCategorical(logits=3.0 * net(x))

    with torch.no_grad():
        angle = torch.linspace(0, 2 * math.pi, 1001)[:-1]
        circle = epsilon * torch.stack([angle.cos(), angle.sin()], 1)
        p, around = classify(x).probs, classify(x.unsqueeze(1) + circle).probs
        every = kl(p.unsqueeze(1), around)  # (rows, directions)
        # One step of the power method from a random direction: not the mean, nearly the most.
        found = VirtualAdversarial(epsilon, xi=1e-3).of_rows(classify, x)
    assert (found <= every.max(1).values * (1 + 1e-4)).all()
    assert found.mean() > 0.8 * every.max(1).values.mean()
    assert found.mean() > 1.2 * every.mean()


def test_the_direction_is_the_hessian_times_a_random_one():
    """One step of the power method (Miyato et al. 2018, eq. 10), differences for the product."""
    torch.manual_seed(0)
    net, x = MLP(4, 8, 3, activation=nn.Tanh), torch.randn(5, 4)
    watched = Watched(lambda x: OneHotCategorical(logits=2.0 * net(x)))
    VirtualAdversarial(0.5, xi=1e-5).of_rows(watched, x)
    _, tried, moved = watched.asked
    for row in range(5):
        p = (2.0 * net(x[row])).softmax(-1).detach()

        def distance(r: Tensor, row: int = row, p: Tensor = p) -> Tensor:
            return kl(p, (2.0 * net(x[row] + r)).softmax(-1))

        hessian: Any = torch.autograd.functional.hessian(distance, torch.zeros(4))
        expected = hessian @ (tried[row] - x[row])
        found = moved[row] - x[row]
        torch.testing.assert_close(found, 0.5 * expected / expected.norm(), rtol=1e-3, atol=1e-4)


def test_the_first_answer_is_fixed():
    """The gradient is that of the answer near by, as if p were a constant."""
    weight = torch.tensor([1.5, -0.5], requires_grad=True)
    x, epsilon = torch.randn(6, 2), 0.7
    watched = Watched(binary(weight))
    value = VirtualAdversarial(epsilon).of_rows(watched, x).sum()
    (found,) = torch.autograd.grad(value, weight)
    p = binary(weight)(x).probs.detach()
    (expected,) = torch.autograd.grad(kl(p, binary(weight)(watched.asked[-1]).probs).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_rows_of_any_shape_are_moved_by_their_norm():
    weight = torch.randn(12)
    watched = Watched(lambda x: binary(weight)(x.flatten(1)))
    x = torch.randn(5, 3, 4)
    VirtualAdversarial(0.5).of_rows(watched, x)
    moved = watched.asked[-1] - x
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((5,), 0.5))


def test_where_the_answer_does_not_move_nothing_is_charged():
    found = VirtualAdversarial(1.0).of_rows(binary(torch.zeros(3)), torch.randn(4, 3))
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-15, rtol=0.0)


def test_a_radius_that_rises_begins_at_0():
    penalty = VirtualAdversarial(2.0, rise=4.0)
    x, classify = torch.randn(5, 3), binary(torch.ones(3))
    torch.testing.assert_close(penalty(classify, x), torch.zeros(5), atol=1e-15, rtol=0.0)
    penalty.at(2.0)
    watched = Watched(classify)
    penalty(watched, x)
    torch.testing.assert_close((watched.asked[-1] - x).norm(dim=1), torch.ones(5))
    assert VirtualAdversarial(2.0).ends == 0.0
    assert penalty.ends == 4.0


@pytest.mark.parametrize("estimator", ["relaxed", "straight-through", "score", "enumerate"])
def test_any_classifier_of_labels_is_charged_for_its_probabilities(estimator):
    torch.manual_seed(0)
    head = Labels(nn.Linear(3, 4), estimator=estimator)
    x, values = torch.randn(6, 3), []
    for classify in (head, lambda x: OneHotCategorical(logits=head.net(x))):
        torch.manual_seed(1)
        values.append(VirtualAdversarial(0.4)(classify, x))
    assert isinstance(head(x), RelaxedOneHot) == (estimator in ("relaxed", "straight-through"))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(
        MutualInformation(1.0)(head, x),
        MutualInformation(1.0)(lambda x: OneHotCategorical(logits=head.net(x)), x),
    )


# Information


def table(p: Tensor) -> Any:
    return lambda x: OneHotCategorical(probs=p)


def test_information_of_answers_in_closed_form():
    k = 4
    sure = torch.eye(k).repeat(3, 1).clamp(1e-300)
    cases = [
        (sure, 0.0),  # sure, and of all classes alike
        (sure[:1].expand(5, k), math.log(k)),  # sure, always of one
        (torch.full((5, k), 1 / k), math.log(k)),  # never sure
        (sure[:2].repeat(2, 1), math.log(2)),  # of half of the classes
    ]
    for p, expected in cases:
        found = float(MutualInformation(1.0)(table(p), torch.zeros(len(p), 2)))
        assert found == pytest.approx(expected, abs=1e-12)


def test_it_is_log_k_minus_the_information_between_row_and_answer():
    p = torch.randn(7, 3).softmax(1)
    joint = p / 7
    information = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    found = MutualInformation(2.5)(table(p), torch.zeros(7, 2))
    torch.testing.assert_close(found, 2.5 * (math.log(3) - information))


def test_the_gradient_of_sure_answers_is_finite():
    logits = torch.tensor([[800.0, 0.0], [0.0, 800.0]], requires_grad=True)
    value = MutualInformation(1.0)(lambda x: OneHotCategorical(logits=logits), torch.zeros(2, 1))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    one = torch.tensor([[800.0, 0.0], [800.0, 0.0]], requires_grad=True)
    value = MutualInformation(1.0)(lambda x: OneHotCategorical(logits=one), torch.zeros(2, 1))
    assert torch.autograd.grad(value, one)[0].isfinite().all()


def test_answers_that_are_sure_to_rounding_have_a_finite_distance():
    """Of probabilities that underflow at one of two neighbors."""
    weight = torch.full((2,), 1e4, requires_grad=True)
    x = torch.tensor([[0.03, 0.03], [-0.03, -0.03]])
    torch.manual_seed(0)
    value = VirtualAdversarial(0.06).of_rows(binary(weight, bias=0.0), x)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), weight)[0].isfinite().all()


def test_a_class_that_is_impossible_takes_no_part():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.5, 0.0, -torch.inf]])
    p = logits.softmax(1)
    expected = (
        -torch.xlogy(p, p).sum(1).mean() + math.log(3) + torch.xlogy(p.mean(0), p.mean(0)).sum()
    )
    found = MutualInformation(1.0)(lambda x: OneHotCategorical(logits=logits), torch.zeros(2, 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: VirtualAdversarial(0.0), r"epsilon=0\.0, .*expected a positive radius"),
        (lambda: VirtualAdversarial(1.0, xi=-1.0), r"xi=-1\.0"),
        (lambda: VirtualAdversarial(1.0, rise=-1.0), r"rise=-1\.0.*epochs of at least 0"),
        (lambda: VirtualAdversarial(1.0, -2.0), r"VirtualAdversarial\(weight=-2\.0\): expected at"),
        (lambda: MutualInformation(-1.0), r"MutualInformation\(weight=-1\.0\): expected at least"),
        (lambda: MutualInformation(math.nan), r"weight=nan"),
    ],
)
def test_settings_out_of_range_are_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_they_say_what_they_are():
    assert repr(MutualInformation(2.0)) == "MutualInformation(weight=2.0)"
    said = repr(VirtualAdversarial(1.5, 100.0, rise=5.0))
    assert said.startswith("VirtualAdversarial(epsilon=1.5, rise=5.0, ")
    assert said.endswith("xi=0.1, weight=100.0)")
