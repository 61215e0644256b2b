"""Evaluation of labels and other enumerated sites: against sums over all their values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppl_vae.assignments import MOST, Assignments
from ppl_vae.calibration import LabelScores
from ppl_vae.conditionals import Conditional, Normal
from ppl_vae.data import Dataset
from ppl_vae.discrete import Bits, IndependentBits, Labels
from ppl_vae.distributions import BitVector, OneHotCategorical
from ppl_vae.evaluation import evaluate, mean_elbo
from ppl_vae.guide import Factorized
from ppl_vae.importance import budget
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import EnumeratedELBO
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError

pytestmark = pytest.mark.usefixtures("float64")

ROWS, K, D, NOISE = 12, 3, 4, 0.6
ALL: dict[str, Any] = {"enumerate": "parallel"}


class Posterior(Conditional):
    """Of one style given x and y, exact: x ~ N(W y + w z + b, NOISE^2)."""

    def __init__(self, decoder: nn.Linear) -> None:
        super().__init__(nn.Identity())
        weight, bias = decoder.weight.detach(), decoder.bias.detach()
        self.of_y, self.of_z, self.bias = weight[:, :K], weight[:, K], bias
        self.scale = (1 + self.of_z.square().sum() / NOISE**2) ** -0.5

    def distribution(self, parameters: Tensor) -> Any:
        x, y = parameters.split([D, K], -1)
        loc = self.scale**2 / NOISE**2 * ((x - y @ self.of_y.T - self.bias) @ self.of_z)
        return dist.Normal(loc.unsqueeze(-1), self.scale).to_event(1)


class Linear:
    """A pair whose weights have no noise, with a classifier that is not the posterior."""

    def __init__(self, estimator: str = "enumerate") -> None:
        torch.manual_seed(0)
        decoder = nn.Linear(K + 1, D)
        self.model = M2(StandardNormal(1), Gaussian(decoder, NOISE), K)
        self.head: Any = Labels(nn.Linear(D, K), estimator=estimator)  # pyright: ignore
        self.q_z = Posterior(decoder)
        self.guide = Factorized(y=(self.head, ["x"]), z=(self.q_z, ["x", "y"]))
        drawn = self.model.simulate(ROWS)
        self.x, self.y = drawn["x"], drawn["y"].argmax(1)
        covariance = torch.outer(self.q_z.of_z, self.q_z.of_z) + NOISE**2 * torch.eye(D)
        given = [
            dist.MultivariateNormal(self.q_z.of_y[:, k] + self.q_z.bias, covariance)
            for k in range(K)
        ]
        self.log_p = torch.stack([fn.log_prob(self.x) for fn in given], 1) - math.log(K)
        self.log_q = self.head.net(self.x).detach().log_softmax(1)
        self.elbo = (self.log_q.exp() * (self.log_p - self.log_q)).sum(1)
        self.data = Dataset("rows", {"train": {"x": self.x, "y": self.y}})

    def partly(self) -> Dataset:
        """Labels are withheld from most training rows, none of them from the test rows."""
        y = self.y.clone()
        y[4:] = -1
        splits = {"train": {"x": self.x, "y": y}, "test": self.data.splits["train"]}
        return Dataset("rows", splits)


HOW: dict[str, Any] = {"split": "train", "withheld": ["y"], "samples": 2}


@pytest.mark.parametrize("estimator", ["enumerate", "score", "relaxed", "straight-through"])
@pytest.mark.parametrize("memory", [512, 1])
def test_every_label_is_tried_whatever_the_estimator(estimator, memory):
    case = Linear(estimator)
    found = evaluate(case.model, case.guide, case.data, memory=memory, **HOW)
    assert found.nll == pytest.approx(-float(case.log_p.logsumexp(1).mean()), abs=1e-10)
    assert found.nll_se == pytest.approx(float(case.log_p.logsumexp(1).std()) / ROWS**0.5)
    assert found.elbo == pytest.approx(float(case.elbo.mean()), abs=1e-10)
    kl_y = (case.log_q.exp() * (case.log_q + math.log(K))).sum(1).mean()
    assert found.kl_per_site["y"] == pytest.approx(float(kl_y))
    each = [
        torch.distributions.kl_divergence(
            case.q_z(case.x, torch.eye(K)[k].expand(ROWS, K)).base_dist, dist.Normal(0.0, 1.0)
        )
        for k in range(K)
    ]
    kl_z = (case.log_q.exp() * torch.cat(each, 1)).sum(1).mean()
    assert found.kl_per_latent["z"] == [pytest.approx(float(kl_z))]
    means = torch.cat([case.q_z(case.x, torch.eye(K)[k].expand(ROWS, K)).mean for k in range(K)], 1)
    spread = (case.log_q.exp() * means).sum(1).var(correction=0)
    assert found.active_units == int(spread > 0.01)
    # Of the labels: the guide's answer, and the model's.
    assert found.labels is not None
    expected = {"classifier": case.log_q.exp(), "importance": case.log_p.softmax(1)}
    assert set(found.labels) == set(expected)
    for name, scores in found.labels.items():
        right = LabelScores.of(expected[name], case.y)
        assert scores.log_loss == pytest.approx(right.log_loss)
        assert scores.accuracy == right.accuracy
        assert scores.brier == pytest.approx(right.brier)
    assert found.labels["classifier"].log_loss != pytest.approx(found.labels["importance"].log_loss)
    terms = mean_elbo(case.model, case.guide, case.data.split("train"), seed=0, withheld=["y"])
    # One draw of z for each label: in its posterior's place no noise is left.
    assert float(terms.elbo) == pytest.approx(found.elbo)


def test_labels_are_withheld_where_training_had_few():
    case = Linear()
    found = evaluate(case.model, case.guide, case.partly(), samples=1)
    assert found.nll == pytest.approx(-float(case.log_p.logsumexp(1).mean()))
    assert found.labels is not None
    assert found.labels["importance"].rows == ROWS
    given = evaluate(case.model, case.guide, case.partly(), samples=1, withheld=[])
    own = case.log_p.gather(1, case.y.unsqueeze(1))
    assert given.nll == pytest.approx(-float(own.mean()))
    assert given.elbo == pytest.approx(float(own.mean()))
    assert given.labels is None
    assert "labels" not in given.to_json()
    assert found.to_json()["labels"]["classifier"]["rows"] == ROWS
    # Training rows whose label is gone have no score.
    train = evaluate(case.model, case.guide, case.partly(), samples=1, split="train")
    assert train.nll == pytest.approx(found.nll)
    assert train.labels is None


def test_labels_that_the_data_lack_are_inferred_and_not_scored():
    case = Linear()
    found = evaluate(case.model, case.guide, case.data.without_labels(), split="train", samples=1)
    assert found.nll == pytest.approx(-float(case.log_p.logsumexp(1).mean()))
    assert found.labels is None


def test_importance_sampling_comes_to_the_posterior_of_the_label():
    """A guide that is not the posterior: with more draws the answer nears it, q(y | x) stays."""
    case = Linear()
    guide = Factorized(y=(case.head, ["x"]), z=(WideNormal(), ["x", "y"]))
    exact = LabelScores.of(case.log_p.softmax(1), case.y).log_loss
    errors = []
    for samples in (1, 30, 20_000):
        found = evaluate(case.model, guide, case.data, **(HOW | {"samples": samples}))
        assert found.labels is not None
        errors.append(abs(found.labels["importance"].log_loss - exact))
        classifier = LabelScores.of(case.log_q.exp(), case.y)
        assert found.labels["classifier"].log_loss == pytest.approx(classifier.log_loss)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
    assert found.nll == pytest.approx(-float(case.log_p.logsumexp(1).mean()), abs=0.02)


class WideNormal(nn.Module):
    """The prior, whatever is given."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        return dist.Normal(torch.zeros(*batch, 1), 1.0).to_event(1)


# All that is latent enumerated


def bits_pair(sites: dict[str, Any] | None = None) -> tuple[M2, Factorized, Tensor]:
    torch.manual_seed(0)
    model = M2(IndependentBits(2), Bernoulli(nn.Linear(K + 2, D)), K)
    nn.init.normal_(model.prior.logits)
    heads: dict[str, Any] = {
        "y": (Labels(nn.Linear(D, K), estimator="enumerate"), ["x"]),
        "z": (Bits(nn.Linear(D + K, 2), estimator="enumerate"), ["x", "y"]),
    }
    return model, Factorized(**(heads | (sites or {}))), torch.bernoulli(torch.full((ROWS, D), 0.5))


def brute_force(model: M2, guide: Factorized, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, y, z) and log q(y, z | x) of all values: ``(rows, K * 4)``."""
    log_p, log_q = [], []
    for k, z in itertools.product(range(K), itertools.product([0.0, 1.0], repeat=2)):
        y, bits = torch.eye(K)[k].expand(len(x), K), torch.tensor(z).expand(len(x), 2)
        log_x = model.x_dist(y, bits).log_prob(x)
        log_p.append(log_x + model.prior().log_prob(bits) - math.log(K))
        q_y = guide.conditionals["y"].net(x).log_softmax(1)[:, k]
        q_z = BitVector(guide.conditionals["z"].net(torch.cat([x, y], 1))).log_prob(bits)
        log_q.append(q_y + q_z)
    return torch.stack(log_p, 1).detach(), torch.stack(log_q, 1).detach()


def test_of_sites_that_have_finitely_many_values_nothing_is_noise():
    model, guide, x = bits_pair()
    log_p, log_q = brute_force(model, guide, x)
    y = torch.arange(ROWS) % K
    data = Dataset("rows", {"train": {"x": x, "y": y}})
    found = evaluate(model, guide, data, **(HOW | {"samples": 1}))
    assert found.nll == pytest.approx(-float(log_p.logsumexp(1).mean()))
    assert found.elbo == pytest.approx(float((log_q.exp() * (log_p - log_q)).sum(1).mean()))
    posterior = log_p.logsumexp(1, keepdim=True)
    p_y = (log_p - posterior).exp().reshape(ROWS, K, 4).sum(2)
    assert found.labels is not None
    right = LabelScores.of(p_y, y)
    assert found.labels["importance"].log_loss == pytest.approx(right.log_loss)
    q_y = LabelScores.of(guide.conditionals["y"].net(x).softmax(1), y)
    assert found.labels["classifier"].log_loss == pytest.approx(q_y.log_loss)
    with own_parameters(model, guide):
        loss = EnumeratedELBO().loss(model, guide, x)
    assert found.elbo == pytest.approx(-float(loss) / ROWS)


def test_draws_of_one_site_under_sums_over_another():
    """z is drawn by its probabilities: the NLL nears that of all its values."""
    model, guide, x = bits_pair()
    log_p, log_q = brute_force(model, guide, x)
    score = Bits(guide.conditionals["z"].net, estimator="score")
    drawing = Factorized(y=(guide.conditionals["y"], ["x"]), z=(score, ["x", "y"]))
    found = evaluate(model, drawing, {"train": x}, split="train", samples=20_000)
    assert found.nll == pytest.approx(-float(log_p.logsumexp(1).mean()), abs=5e-3)
    elbo = (log_q.exp() * (log_p - log_q)).sum(1).mean()
    assert found.elbo == pytest.approx(float(elbo), abs=0.02)


# In the model too


@pytest.mark.parametrize("of_guide", [False, True])
def test_two_sites_of_which_the_model_sums_over_one_or_both(program, of_guide):
    torch.manual_seed(0)
    log_a = torch.randn(K).log_softmax(0)
    log_b = torch.randn(K, 2).log_softmax(1)
    net, q_a = nn.Linear(K + 2, D), nn.Linear(D, K)

    def story(self: Any, x: Tensor | None) -> Tensor:
        a = pyro.sample("a", OneHotCategorical(logits=log_a), infer={} if of_guide else ALL)
        b = pyro.sample("b", OneHotCategorical(logits=a @ log_b), infer=ALL)
        batch = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        joined = torch.cat([a.expand(*batch, K), b.expand(*batch, 2)], -1)
        return pyro.sample("x", dist.Normal(self.net(joined), NOISE).to_event(1), obs=x)

    def guiding(self: Any, x: Tensor) -> None:
        if of_guide:
            pyro.sample("a", OneHotCategorical(logits=self.q_a(x)), infer=ALL)

    x = torch.randn(ROWS, D)
    with torch.no_grad():
        log_p = torch.stack(
            [
                dist.Normal(net(torch.cat([torch.eye(K)[i], torch.eye(2)[j]])), NOISE)
                .log_prob(x)
                .sum(1)
                + log_a[i]
                + log_b[i, j]
                for i, j in itertools.product(range(K), range(2))
            ],
            1,
        ).reshape(ROWS, K, 2)
        r = log_p.softmax(2)  # of b given a
        of_a = log_p.logsumexp(2)
        log_q = q_a(x).log_softmax(1) if of_guide else of_a.log_softmax(1)
    found = evaluate(
        program(story, net=net), program(guiding, q_a=q_a), {"train": x}, split="train", samples=1
    )
    assert found.nll == pytest.approx(-float(of_a.logsumexp(1).mean()))
    elbo = (log_q.exp() * (of_a - log_q)).sum(1)
    assert found.elbo == pytest.approx(float(elbo.mean()))
    kl_a = (log_q.exp() * (log_q - log_a)).sum(1).mean()
    kl_b = (log_q.exp().unsqueeze(2) * r * (r.log() - log_b)).sum((1, 2)).mean()
    if of_guide:
        assert found.kl_per_site == {
            "a": pytest.approx(float(kl_a)),
            "b": pytest.approx(float(kl_b)),
        }
    else:
        assert sum(found.kl_per_site.values()) == pytest.approx(float(kl_a + kl_b))


def test_a_site_of_all_rows_is_drawn_besides(program):
    """w outside the rows, under a sum over y: the ELBO as the objective has it, in the mean."""
    torch.manual_seed(0)
    net, q_y = nn.Linear(K, D), nn.Linear(D, K)

    def whole(self: Any) -> None:
        self.w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    def story(self: Any, x: Tensor | None) -> Tensor:
        y = pyro.sample("y", OneHotCategorical(logits=torch.zeros(K)))
        return pyro.sample("x", dist.Normal(net(y) + self.w, NOISE).to_event(1), obs=x)

    def of_whole(self: Any) -> None:
        pyro.sample("w", dist.Normal(torch.full((D,), 0.2), 0.05).to_event(1))

    def guiding(self: Any, x: Tensor) -> None:
        pyro.sample("y", OneHotCategorical(logits=q_y(x)), infer=ALL)

    x = torch.randn(ROWS, D)
    model, guide = program(story, whole, net=net), program(guiding, of_whole, q_y=q_y)
    found = evaluate(model, guide, {"train": x}, split="train", samples=3000)
    with torch.no_grad():
        log_q = q_y(x).log_softmax(1)
        kl_y = (log_q.exp() * (log_q + math.log(K))).sum(1)
        error = (x.unsqueeze(1) - net(torch.eye(K)) - 0.2).square() + 0.05**2
        log_x = (-0.5 * error / NOISE**2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi)).sum(2)
        kl_w = 0.5 * D * (0.05**2 + 0.2**2 - 1 - 2 * math.log(0.05))
        elbo = (log_q.exp() * log_x).sum(1) - kl_y
    assert found.kl_per_site["y"] == pytest.approx(float(kl_y.mean()))
    assert found.kl_per_site["w"] == pytest.approx(kl_w / ROWS, rel=0.02)
    assert found.elbo == pytest.approx(float(elbo.mean()) - kl_w / ROWS, abs=0.02)


@pytest.mark.slow
def test_compiled_figures_are_the_same():
    case = Linear()
    eager, compiled = (
        evaluate(case.model, case.guide, case.data, compile=c, **HOW) for c in (False, True)
    )
    assert compiled.nll == pytest.approx(eager.nll)
    assert compiled.elbo == pytest.approx(eager.elbo)
    assert compiled.labels is not None
    assert eager.labels is not None
    assert compiled.labels["importance"].log_loss == pytest.approx(
        eager.labels["importance"].log_loss
    )


# What is refused


def test_too_many_combinations_are_refused():
    torch.manual_seed(0)
    x = torch.zeros(2, D)
    for size, known in ((8, True), (9, False)):  # 768 and 1536 with three labels
        model = M2(IndependentBits(size), Bernoulli(nn.Linear(K + size, D)), K)
        sites: dict[str, Any] = {
            "y": (Labels(nn.Linear(D, K), estimator="score"), ["x"]),
            "z": (Bits(nn.Linear(D + K, size), estimator="enumerate"), ["x", "y"]),
        }
        guide = Factorized(**sites)
        tried = Assignments(model, guide, {"x": x})
        assert len(tried.of_guide()) == 2**size
        if known:
            tried = Assignments(model, guide, {"x": x}, labels=["y"])
            assert len(tried.of_guide()) == 3 * 2**size <= MOST
            continue
        with pytest.raises(ValueError, match=r"sites y, z have 1536 comb.*at most 1024: draw some"):
            Assignments(model, guide, {"x": x}, labels=["y"])
        data = Dataset("rows", {"train": {"x": x, "y": torch.tensor([0, 1])}})
        with pytest.raises(ValueError, match="have 1536 combinations"):
            evaluate(model, guide, data, **HOW)


def test_what_is_withheld_has_to_be_an_observable_and_not_all():
    case = Linear()
    with pytest.raises(ValueError, match=r"withheld=\['label'\]: M2 has no observable 'label'"):
        evaluate(case.model, case.guide, case.data, split="train", withheld=["label"])
    with pytest.raises(
        ValueError, match=r"withheld=\[\]: labels are withheld from rows of 'train'"
    ):
        evaluate(case.model, case.guide, case.partly(), split="train", withheld=[])
    with pytest.raises(ValueError, match=r"withheld=\['x', 'y'\]: nothing is left to infer it"):
        evaluate(case.model, case.guide, case.data, split="train", withheld=["x", "y"])


def test_labels_that_the_model_has_no_class_for_are_refused():
    case = Linear()
    splits = {"train": case.data.splits["train"], "test": {"x": case.x, "y": case.y + K}}
    with pytest.raises(PairError, match=r"test\['y'\] has label \d in row 0, and M2 has 3 classes"):
        evaluate(case.model, case.guide, Dataset("rows", splits), samples=1)


def test_the_budget_counts_every_label_that_is_tried():
    """Also where the guide draws labels: as many rows at once as where it sums over them."""
    found = []
    for estimator in ("enumerate", "score"):
        case = Linear(estimator)
        case.guide.eval()
        how: dict[str, Any] = {"samples": 4, "memory": 1}
        found.append(budget(case.model, case.guide, {"x": case.x}, withheld=["y"], **how).block)
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert budget(case.model, case.guide, {"x": case.x}, **how).block > 2 * found[1]


def test_a_model_without_labels_takes_none_of_it():
    """Labels withheld in the data are no matter of a model that does not observe them."""
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), Gaussian(MLP(2, D), NOISE))
    data = Linear().partly()
    guide = Factorized(z=(Normal(nn.Linear(D, 4)), ["x"]))
    assert evaluate(model, guide, data, samples=2).labels is None


@pytest.mark.parametrize("of", ["model", "guide"])
def test_scores_on_a_gpu_are_combined_there(program, of):
    """Without one: fake tensors refuse to mix devices, as real ones do."""

    def story(self, x):
        y = pyro.sample("y", dist.Categorical(torch.ones(K)), infer=ALL)
        return pyro.sample("x", dist.Normal(1.0 * y, 1.0), obs=x)

    class Guide(nn.Module):
        def forward(self, x, total=None):
            with pyro.plate("data", len(x)):
                if of == "guide":
                    pyro.sample("y", dist.Categorical(torch.ones(K)), infer=ALL)

    assignments = Assignments(program(story), Guide(), {"x": torch.zeros(ROWS)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        scores = torch.zeros(5, ROWS, dtype=torch.float64, device="cuda")
        each = [{("elbo", ""): scores, ("kl", "y"): scores} for _ in range(K)]
        log_q = [{"y": scores} if of == "guide" else {} for _ in range(K)]
        figures = assignments.combine(each, log_q)
        assert {figure.device.type for figure in figures.values()} == {"cuda"}
        assert figures["log weight", "y"].shape == (5, ROWS, K)
        assert assignments.mean(each[:1] * len(log_q), log_q)["elbo", ""].device.type == "cuda"
