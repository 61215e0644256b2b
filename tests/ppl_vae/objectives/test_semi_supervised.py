"""Rows with and without labels in one step: what multiplies what, by sums written out."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.discrete import Labels
from ppl_vae.graphs import record
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import own_parameters
from ppl_vae.models._labels import LabeledModel
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.stacked import M1M2
from ppl_vae.objectives import (
    Beta,
    EnumeratedELBO,
    MutualInformation,
    SemiSupervised,
    VirtualAdversarial,
    backward,
    plain_elbo,
)
from ppl_vae.objectives.penalties import Classify, Penalty
from ppl_vae.objectives.semi_supervised import strata
from ppl_vae.sites import PairError
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")

K, D = 3, 4
N, KNOWN = 5, 2  # rows in all, and with labels


class Naive(LabeledModel):
    """A label, and x given it alone: the bounds of rows have no noise."""

    def __init__(self) -> None:
        super().__init__(K)
        self.likelihood = Bernoulli(nn.Linear(K, D))

    def tell(self, y: Tensor, x: Tensor | None) -> Tensor:
        return pyro.sample("x", self.likelihood(y), obs=x)


def exact_pair(**settings: Any) -> tuple[Naive, Factorized, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Naive()
    head = Labels(nn.Linear(D, K), **({"estimator": "enumerate"} | settings))
    y = torch.eye(K)[torch.tensor([0, 2, 1, 1, 0])]
    return model, Factorized(y=(head, ["x"])), torch.bernoulli(torch.full((N, D), 0.5)), y


def styled_pair() -> tuple[M2, Factorized, Tensor, Tensor]:
    torch.manual_seed(0)
    model = M2.toy()
    drawn = model.simulate(6)
    sites: dict[str, Any] = {
        "y": (Labels(nn.Linear(6, K), estimator="enumerate"), ["x"]),
        "z": (Normal(nn.Linear(6 + K, 4)), ["x", "y"]),
    }
    return model, Factorized(**sites), drawn["x"], drawn["y"]


class Terms:
    """Of each row: log p(x, y), the bound without a label, log q(y | x)."""

    def __init__(self, model: Naive, guide: Factorized, x: Tensor, y: Tensor) -> None:
        log_q = guide.conditionals["y"].net(x).log_softmax(-1)
        given = model.likelihood(torch.eye(K).unsqueeze(1)).log_prob(x).T
        log_p = given - torch.tensor(float(K)).log()  # of each label, (rows, K)
        self.labeled = (log_p * y).sum(-1)
        self.unlabeled = (log_q.exp() * (log_p - log_q)).sum(-1)
        self.log_q = (log_q * y).sum(-1)
        self.answers = log_q.exp()


def number(value: Any) -> float:
    return float(torch.as_tensor(value).detach())


def gradients(loss: Tensor, *programs: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters(*programs)))


def batches(labeled: int, unlabeled: int) -> list[tuple[list[int], list[int]]]:
    """The row numbers of all batches of so many rows of each kind."""
    known = itertools.combinations(range(KNOWN), labeled)
    unknown = list(itertools.combinations(range(KNOWN, N), unlabeled))
    return [(list(one), list(other)) for one in known for other in unknown]


class Squares(Penalty):
    """One of each row by itself; it notes what rows it is given."""

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.seen: list[Tensor] = []

    def of_rows(self, classify: Classify, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return classify(x).probs.square().sum(-1)


SIZES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_mean_over_batches_is_the_sum_over_all_rows(losses, sizes, alpha):
    """Whatever the number of rows in a batch, and the share of those with labels."""
    model, guide, x, y = exact_pair()
    terms, eta = Terms(model, guide, x, y), 0.4
    expected = -(
        terms.labeled[:KNOWN].sum()
        + terms.unlabeled[KNOWN:].sum()
        + alpha * N * terms.log_q[:KNOWN].mean()
        - eta * terms.answers[KNOWN:].square().sum()
    )
    objective = SemiSupervised(alpha, penalties=[Squares(eta)])
    found = [
        losses(
            objective,
            model,
            guide,
            x=torch.cat([x[known], x[unknown]]),
            y=y[known],
            total=N,
            labeled=KNOWN,
        )
        for known, unknown in batches(*sizes)
    ]
    assert sum(loss for loss, _ in found) / len(found) == pytest.approx(number(expected))
    means = [torch.stack(g).mean(0) for g in zip(*(g for _, g in found), strict=True)]
    torch.testing.assert_close(means, gradients(expected, model, guide))


@pytest.mark.parametrize("alpha", [0.0, 1.3])
def test_a_batch_with_all_labels_is_the_supervised_one(losses, alpha):
    """The plain ELBO of (x, y), and a classification term that counts as all rows do."""
    model, guide, x, y = styled_pair()
    own = losses(SemiSupervised(alpha), model, guide, x=x, y=y, total=24)
    plain = plain_elbo(model, guide, x=x, y=y)
    loss, grads = losses(plain, model, guide, x=x, y=y, total=24)
    if alpha == 0.0:
        assert own[0] == loss
        torch.testing.assert_close(own[1], grads, rtol=0.0, atol=0.0)
    log_q = guide.conditionals["y"](x).log_prob(y)
    assert own[0] == pytest.approx(loss - alpha * 24 * number(log_q.mean()))


def test_a_batch_without_labels_is_the_unsupervised_one(losses):
    model, guide, x, _ = styled_pair()
    own = losses(SemiSupervised(5.0), model, guide, x=x, total=24)
    plain = plain_elbo(model, guide, x=x)
    assert isinstance(plain, EnumeratedELBO)
    assert own[0] == losses(plain, model, guide, x=x, total=24)[0]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_training_weighs_only_the_kl_in_any_number_of_parts(losses, parts, weight):
    """Neither the classification term nor the penalties; per datum."""
    alpha, eta = 0.7, 0.4
    model, guide, x, y = exact_pair()
    terms = Terms(model, guide, x, y)
    log_p_y = -torch.tensor(float(K)).log()
    log_x = terms.labeled[:KNOWN] - log_p_y  # an observed label is no latent
    kl = (terms.answers * (terms.answers.log() - log_p_y)).sum(-1)
    elbo = terms.unlabeled + kl - weight * kl
    expected = (
        -(
            (log_x + log_p_y).sum()
            + elbo[KNOWN:].sum()
            + alpha * N * terms.log_q[:KNOWN].mean()
            - eta * terms.answers[KNOWN:].square().sum()
        )
        / N
    )
    training = Training(SemiSupervised(alpha, penalties=[Squares(eta)]), N, parts=parts)
    training.weight = weight
    loss, found = losses(training, model, guide, x=x, y=y[:KNOWN], total=N, labeled=KNOWN)
    assert loss == pytest.approx(number(expected))
    torch.testing.assert_close(found, gradients(expected, model, guide))
    # What is watched: the bound of all rows, without weights, penalties, classification.
    bound = (terms.labeled[:KNOWN].sum() + terms.unlabeled[KNOWN:].sum()) / N
    assert number(training.terms.elbo) == pytest.approx(number(bound))
    assert number(training.terms.kl) == pytest.approx(number(kl[KNOWN:].sum() / N))


def test_what_is_watched_is_a_mean_over_batches_too():
    model, guide, x, y = exact_pair()
    terms = Terms(model, guide, x, y)
    training = Training(SemiSupervised(0.3), N)
    with torch.no_grad():
        for known, unknown in batches(1, 2):
            columns = {"x": torch.cat([x[known], x[unknown]]), "y": y[known]}
            training.loss(model, guide, **columns, total=N, labeled=KNOWN)
    bound = (terms.labeled[:KNOWN].sum() + terms.unlabeled[KNOWN:].sum()) / N
    assert number(training.terms.elbo) == pytest.approx(number(bound))


def test_penalties_see_the_rows_without_labels_alone(losses):
    model, guide, x, y = exact_pair()
    penalty = Squares(1.0)
    objective = SemiSupervised(0.0, penalties=[penalty])
    losses(objective, model, guide, x=x, y=y[:KNOWN], total=N, labeled=KNOWN)
    torch.testing.assert_close(penalty.seen, [x[KNOWN:]])
    penalty.seen.clear()
    loss, _ = losses(objective, model, guide, x=x, y=y, total=N)
    assert penalty.seen == []
    assert loss == losses(SemiSupervised(0.0), model, guide, x=x, y=y, total=N)[0]


def test_one_penalty_of_all_rows_counts_as_much_as_one_a_row(losses):
    model, guide, x, y = exact_pair()
    columns = {"x": x, "y": y[:KNOWN], "total": 50, "labeled": 10}
    plain, _ = losses(SemiSupervised(0.0), model, guide, **columns)
    information = MutualInformation(2.0)
    loss, _ = losses(SemiSupervised(0.0, penalties=[information]), model, guide, **columns)
    value = information(guide.conditionals["y"], x[KNOWN:])
    assert loss - plain == pytest.approx(40 * number(value))


@pytest.mark.parametrize("estimator", ["score", "relaxed", "straight-through", "enumerate"])
def test_any_estimator_is_classified_by_its_probabilities(losses, estimator):
    """Labels that are given are scored, whatever is drawn of others."""
    model, guide, x, y = exact_pair(estimator=estimator)
    columns = {"x": x, "y": y[:KNOWN], "total": N, "labeled": KNOWN}
    found = [
        losses(SemiSupervised(a, penalties=[VirtualAdversarial(0.3)]), model, guide, **columns)[0]
        for a in (0.0, 2.0)
    ]
    log_q = Terms(model, guide, x, y).log_q[:KNOWN].mean()
    assert found[1] - found[0] == pytest.approx(-2.0 * N * number(log_q))


def test_an_objective_is_of_each_kind_of_rows(losses):
    model, guide, x, y = exact_pair()
    terms = Terms(model, guide, x, y)
    objective = SemiSupervised(0.0, objective=Beta(4.0))
    loss, _ = losses(objective, model, guide, x=x, y=y[:KNOWN], total=N, labeled=KNOWN)
    kl = (terms.answers * (terms.answers.log() + torch.tensor(float(K)).log())).sum(-1)
    expected = -(terms.labeled[:KNOWN].sum() + (terms.unlabeled - 3.0 * kl)[KNOWN:].sum())
    assert loss == pytest.approx(number(expected))


def test_the_classifier_is_asked_without_what_is_drawn_after_it(losses):
    """A guide that draws z2 after the label: the classification term does not draw it."""
    torch.manual_seed(0)
    model = M1M2.toy()
    drawn = model.simulate(4)
    calls = []
    after = Normal(nn.Linear(3 + K, 4))
    after.register_forward_hook(lambda *_: calls.append(1))
    sites: dict[str, Any] = {
        "z1": (Normal(nn.Linear(6, 6)), ["x"]),
        "y": (Labels(nn.Linear(3, K), estimator="enumerate"), ["z1"]),
        "z2": (after, ["z1", "y"]),
    }
    guide = Factorized(**sites)
    columns = {"x": drawn["x"], "y": drawn["y"], "total": 4}
    found = []
    for alpha in (0.0, 1.0):
        objective = SemiSupervised(alpha, objective=EnumeratedELBO())
        calls.clear()
        found.append(losses(objective, model, guide, **columns))
        assert len(calls) == 1
    # q(y | z1) of a draw of z1 of its own.
    torch.manual_seed(1)
    with own_parameters(model, guide), torch.no_grad():
        EnumeratedELBO().loss(model, guide, **columns)
        z1 = guide.conditionals["z1"](drawn["x"]).sample()
        log_q = guide.conditionals["y"](z1).log_prob(drawn["y"]).sum()
    assert found[1][0] - found[0][0] == pytest.approx(-number(log_q))


def test_it_changes_over_training_as_its_parts_do():
    penalty = VirtualAdversarial(2.0, rise=4.0)
    objective = SemiSupervised(penalties=[penalty])
    assert objective.ends == 4.0
    for epoch, radius in ((0.0, 0.0), (1.0, 0.5), (4.0, 2.0), (9.0, 2.0)):
        objective.at(epoch)
        assert number(penalty.radius) == pytest.approx(radius)
    assert Training(objective, N).ends == 4.0
    assert repr(objective).count("rise=4.0") == 1


@pytest.mark.parametrize("penalized", [False, True])
def test_a_recorded_graph_gives_the_same_loss_and_gradients(penalized):
    model, guide, x, y = styled_pair()
    penalties = [VirtualAdversarial(0.5, rise=2.0), MutualInformation(1.0)] if penalized else []
    training = Training(SemiSupervised(0.5, penalties=penalties), 24)
    training.weight = 0.5
    training.at(1.0)
    held = parameters(model, guide)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        for parameter in held:
            parameter.grad = None
        with own_parameters(model, guide):
            loss = backward(training, model, guide, x=x, y=y, total=24, labeled=6)
        return loss, [p.grad for p in held]

    step(x, y[:2])  # the first one chooses the bounds
    with traceable():
        _, graph = record(step, x, y[:2])
    for epoch in (1.0, 2.0):
        training.at(epoch)  # followed by the graph
        for seed in (1, 2):
            data = x.roll(seed, 0)
            torch.manual_seed(seed)
            expected, grads = step(data, y[:2])
            torch.manual_seed(seed)
            loss, recorded = graph(data, y[:2])
            assert loss == expected
            torch.testing.assert_close(recorded, grads, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_compiled_step_leads_where_the_eager_one_does():
    """Compiled from the first step on, which chooses the bounds."""
    found = []
    for compiled in (False, True):
        model, guide, x, y = styled_pair()
        held = parameters(model, guide)
        objective = SemiSupervised(0.5, penalties=[VirtualAdversarial(0.5)])
        svi = SVI(model, guide, torch.optim.Adam(held, 1e-2), objective, compile=compiled)
        torch.manual_seed(1)
        losses = [number(svi.step(x=x, y=y[:2], total=24, labeled=6)) for _ in range(20)]
        assert (svi.compile_seconds > 0) is compiled
        assert not svi.refused
        found.append((losses, [p.detach() for p in held]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


# What is refused


def test_columns_go_by_name():
    model, guide, x, y = exact_pair()
    with pytest.raises(TypeError, match=r"by name.*step\(x=\.\.\., y=\.\.\."):
        SemiSupervised().loss(model, guide, x, y)


def test_a_guide_without_a_classifier_is_refused():
    model, _, x, y = styled_pair()
    guide = Factorized(z=(Normal(nn.Linear(6, 4)), ["x"]))
    with pytest.raises(PairError, match=r"no site 'y'.*give it a classifier q\(y \| x\)"):
        SemiSupervised().loss(model, guide, x=x, y=y)


@pytest.mark.parametrize("alpha", [-0.1, float("nan")])
def test_a_negative_weight_is_refused(alpha):
    with pytest.raises(ValueError, match=r"SemiSupervised\(.*at least 0"):
        SemiSupervised(alpha)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"total": 10}, id="labeled"),
        pytest.param({"labeled": 2}, id="total"),
        pytest.param({"total": 10, "labeled": 0}, id="none"),
        pytest.param({"total": 10, "labeled": 10}, id="all"),
        pytest.param({"total": 10, "labeled": 2, "w": torch.ones(3)}, id="lengths"),
    ],
)
def test_rows_whose_numbers_are_not_told_are_refused(sizes):
    with pytest.raises(ValueError, match=r"columns of .* rows, labeled=.*total=.*expected"):
        strata({"x": torch.ones(5, 1), "y": torch.ones(2, 1)} | sizes)


def test_strata_part_the_rows():
    columns = {"x": torch.arange(5), "y": torch.arange(2), "c": torch.arange(5), "total": 10}
    (first, share), (rest, other) = strata({**columns, "labeled": 4})
    assert (share, other) == (0.4, 0.6)
    assert first["x"].tolist() == first["c"].tolist() == first["y"].tolist() == [0, 1]
    assert rest["x"].tolist() == rest["c"].tolist() == [2, 3, 4]
    assert "y" not in rest
    assert strata(columns | {"y": torch.arange(5)})[0][1] == 1.0
