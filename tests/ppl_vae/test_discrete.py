"""Discrete distributions and conditionals: against sums over their values, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import nn
from torch.distributions import Categorical, kl_divergence

from ppl_vae.conditionals import Normal
from ppl_vae.discrete import (
    Bits,
    IndependentBits,
    Labels,
    RelaxedBits,
    RelaxedOneHot,
    infer_of,
)
from ppl_vae.distributions import BitVector, OneHotCategorical
from ppl_vae.evaluation import evaluate
from ppl_vae.graphs import record
from ppl_vae.guide import Factorized
from ppl_vae.guides.autoregressive import Autoregressive
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import own_parameters
from ppl_vae.models.categorical_vae import CategoricalVAE
from ppl_vae.models.sigmoid_belief_network import SigmoidBeliefNetwork
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.sites import PairError, check_pair
from ppl_vae.svi import parameters
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {
    "one-hot": lambda logits: OneHotCategorical(logits=logits),
    "bits": BitVector,
    "relaxed one-hot": lambda logits: RelaxedOneHot(logits, 0.5),
    "relaxed bits": lambda logits: RelaxedBits(logits, 0.5, hard=True),
}

families = pytest.mark.parametrize("name", FAMILIES)


def made(name: str, *shape: int) -> Any:
    return FAMILIES[name](2 * torch.randn(*shape, 3))


def reference(fn: Any) -> Any:
    """torch's own distribution of the same values."""
    if isinstance(fn, OneHotCategorical):
        return torch.distributions.OneHotCategorical(logits=fn.logits)
    return torch.distributions.Independent(torch.distributions.Bernoulli(logits=fn.logits), 1)


@families
def test_values_have_the_probabilities_of_torchs_own(name):
    fn = made(name, 4)
    values = fn.enumerate_support()
    assert values.shape[1:] == (4, 3)
    assert len(values.unique(dim=0)) == len(values)
    torch.testing.assert_close(fn.log_prob(values), reference(fn).log_prob(values))
    torch.testing.assert_close(fn.log_prob(values).exp().sum(0), torch.ones(4))
    mean = (fn.log_prob(values).exp().unsqueeze(-1) * values).sum(0)
    torch.testing.assert_close(fn.mean, mean)
    torch.testing.assert_close(fn.variance, fn.mean * (1 - fn.mean))
    torch.testing.assert_close(
        fn.entropy(), -(fn.log_prob(values).exp() * fn.log_prob(values)).sum(0)
    )
    assert torch.equal(fn.mode, values[fn.log_prob(values).argmax(0), range(4)])
    collapsed = fn.enumerate_support(expand=False)
    assert collapsed.shape == (len(values), 1, 3)
    assert torch.equal(collapsed.expand_as(values), values)


@families
def test_log_probabilities_are_linear_between_the_values(name):
    fn = made(name)
    one, other = fn.enumerate_support()[:2]
    share = torch.tensor(0.3, requires_grad=True)
    between = fn.log_prob(share * one + (1 - share) * other)
    torch.testing.assert_close(between, 0.3 * fn.log_prob(one) + 0.7 * fn.log_prob(other))
    (slope,) = torch.autograd.grad(between, share)
    torch.testing.assert_close(slope, fn.log_prob(one) - fn.log_prob(other))


@families
def test_expanding_repeats_rows(name):
    fn = made(name, 4)
    wide = fn.expand([5, 4])
    assert type(wide) is type(fn)
    assert (wide.batch_shape, wide.event_shape) == ((5, 4), (3,))
    value = wide.sample()
    torch.testing.assert_close(wide.log_prob(value)[2], fn.log_prob(value[2]))
    for setting in ("temperature", "hard"):
        assert getattr(wide, setting, None) == getattr(fn, setting, None)


@pytest.mark.parametrize("one", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_kl_is_the_mean_over_all_values(one, other):
    q, p = made(one, 4), made(other, 4)
    if isinstance(q, BitVector) != isinstance(p, BitVector):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)
        return
    values = q.enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    torch.testing.assert_close(kl_divergence(q, p), (log_q.exp() * (log_q - log_p)).sum(0))
    if isinstance(q, OneHotCategorical):
        categorical = [Categorical(logits=fn.logits) for fn in (q, p)]
        torch.testing.assert_close(kl_divergence(q, p), kl_divergence(*categorical))


def test_impossible_values_have_no_part_in_others():
    fn = OneHotCategorical(logits=torch.tensor([0.0, -torch.inf, 1.0]))
    logits = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(fn.log_prob(torch.tensor([0.0, 0.0, 1.0])), logits[1])
    assert fn.log_prob(torch.tensor([0.0, 1.0, 0.0])) < -1e300


@families
def test_values_beyond_the_simplex_or_the_cube_are_refused(name):
    fn = FAMILIES[name](torch.zeros(3))
    fn._validate_args = True
    with pytest.raises(ValueError, match=r"entries from -1 to 2; expected 3 entries"):
        fn.log_prob(torch.tensor([2.0, -1.0, 0.0]))


def test_long_vectors_of_bits_are_not_enumerated():
    with pytest.raises(ValueError, match=r"11 bits has 2 \*\* 11 values.*at most 10"):
        BitVector(torch.zeros(11)).enumerate_support()


DRAWS = 20_000


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("family", [RelaxedOneHot, RelaxedBits])
def test_draws_round_to_values_of_their_probabilities(family, hard):
    """The largest entry of a relaxed one-hot draw, and which half a relaxed bit lies in."""
    fn = family(torch.randn(3), 0.7, hard=hard)
    z = fn.rsample([DRAWS])
    if family is RelaxedOneHot:
        hits = nn.functional.one_hot(z.argmax(-1), 3).double().mean(0)
        torch.testing.assert_close(z.sum(-1), torch.ones(DRAWS))
    else:
        hits = (z > 0.5).double().mean(0)
    error = (fn.probs * (1 - fn.probs) / DRAWS).sqrt()
    assert ((hits - fn.probs).abs() < 4.5 * error).all()
    exact = ((z == 0) | (z == 1)).all()
    assert exact == hard


@pytest.mark.parametrize("family", [RelaxedOneHot, RelaxedBits])
def test_relaxed_draws_have_the_concrete_density(family):
    """Means of a function of the draws, against Pyro's distributions."""
    logits, temperature = torch.randn(3), 0.7
    z = family(logits, temperature).rsample([DRAWS])
    t = torch.tensor(temperature)
    if family is RelaxedOneHot:
        other = dist.RelaxedOneHotCategorical(t, logits=logits).sample(torch.Size([DRAWS]))
    else:
        other = dist.RelaxedBernoulli(t, logits=logits).sample(torch.Size([DRAWS]))
    for power in (1, 2):
        ours, theirs = z**power, other**power
        error = ((ours.var(0) + theirs.var(0)) / DRAWS).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("family", [RelaxedOneHot, RelaxedBits])
def test_straight_through_draws_are_values_with_the_relaxed_gradient(family):
    logits = torch.randn(500, 3, requires_grad=True)
    weight = torch.randn(500, 3)
    drawn, slopes = {}, {}
    for hard in (True, False):
        torch.manual_seed(1)
        drawn[hard] = family(logits, 0.5, hard=hard).rsample()
        (slopes[hard],) = torch.autograd.grad((weight * drawn[hard]).sum(), logits)
    discrete: Any = OneHotCategorical if family is RelaxedOneHot else BitVector
    assert discrete(logits=logits).support.check(drawn[True]).all()
    rounded = drawn[False].round() if family is RelaxedBits else drawn[False]
    assert torch.equal(drawn[True].argmax(-1), rounded.argmax(-1))
    torch.testing.assert_close(slopes[True], slopes[False])


# -- conditionals ------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["enumerate", "score", "relaxed", "straight-through"])
@pytest.mark.parametrize("head", [Labels, Bits])
def test_a_conditional_draws_by_its_estimator_and_discretely_in_evaluation(head, estimator):
    q = head(nn.Linear(4, 3), estimator=estimator)
    x = torch.randn(6, 4)
    relaxes = estimator in ("relaxed", "straight-through")
    assert q(x).has_rsample is relaxes
    expected = {"enumerate": {"enumerate": "parallel"}, "score": {}}
    assert q.infer_of(x) == expected.get(estimator, {"relaxed": True})
    q.eval()
    assert not q(x).has_rsample
    assert q.infer_of(x) == expected.get(estimator, {})
    value = q(x).sample()
    assert q(x).support.check(value).all()
    torch.testing.assert_close(q(x).log_prob(value), q.train()(x).log_prob(value))


def test_labels_of_several_variables():
    q: Any = Labels(nn.Linear(4, 6), variables=2)
    fn = q(torch.randn(5, 4))
    assert (fn.batch_shape, fn.event_shape) == ((5,), (2, 3))
    apart = OneHotCategorical(logits=q.net.weight.new_zeros(5, 2, 3))
    value = apart.sample()
    logits = q.net(x := torch.randn(5, 4)).reshape(5, 2, 3)
    expected = OneHotCategorical(logits=logits).log_prob(value).sum(-1)
    torch.testing.assert_close(q(x).log_prob(value), expected)
    with pytest.raises(ValueError, match="6 outputs; expected a multiple of the 4 variables"):
        Labels(nn.Linear(4, 6), variables=4)(x)


def test_several_tensors_of_context_are_joined_also_for_the_baseline():
    q = Bits(MLP(7, 3), baseline="net")
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(2, 5, 3)
    baseline = q.infer_of(x, y)["baseline"]
    assert baseline["nn_baseline_input"].shape == (2, 5, 7)
    assert not baseline["nn_baseline_input"].requires_grad
    assert baseline["nn_baseline"](baseline["nn_baseline_input"]).shape == (2, 5)
    assert any(name.startswith("baseline.net") for name, _ in q.named_parameters())
    assert infer_of(Normal(nn.Linear(4, 2)), x) == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"estimator": "exact"}, "estimator='exact'.*enumerate, score, relaxed, straight-through"),
        ({"baseline": "mean"}, "baseline='mean'.*expected one of average, net, both, or None"),
        ({"estimator": "relaxed", "baseline": "net"}, 'a baseline goes with estimator="score"'),
        ({"temperature": 0.0}, r"temperature=0\.0.*positive and finite"),
        ({"temperature": torch.inf}, "temperature=inf"),
        ({"baseline": "average", "baseline_net": MLP(4, 1)}, 'a net goes with baseline="net"'),
        ({"variables": 0}, "variables=0.*at least 1"),
        ({"variables": 2, "estimator": "enumerate"}, "too many to sum over"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Labels(nn.Linear(4, 6), **settings)


def test_a_baseline_needs_a_net_whose_inputs_are_known():
    with pytest.raises(ValueError, match=r"Sequential, does not state its inputs.*baseline_net"):
        Bits(nn.Sequential(nn.Linear(4, 3)), baseline="both")
    Bits(nn.Sequential(nn.Linear(4, 3)), baseline="both", baseline_net=MLP(4, 1))
    with pytest.raises(ValueError, match="at least 1 bit"):
        IndependentBits(0)


# -- guides ------------------------------------------------------------------------------------


def with_labels(self, x):
    """y and bits above z, above x."""
    y = pyro.sample("y", OneHotCategorical(logits=torch.zeros(3)))
    b = pyro.sample("b", BitVector(torch.zeros(2)))
    z = pyro.sample("z", dist.Normal(y + b[..., :1], 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("family", [MeanField, Autoregressive])
def test_derived_guides_draw_discrete_sites_and_condition_on_them(family, program):
    model, x = program(with_labels), torch.randn(6, 3)
    guide = family(model, MLP(3, 7), x)
    assert [type(head).__name__ for head in guide.heads.values()] == ["Labels", "Bits", "Normal"]
    estimators = [guide.heads[name].estimator for name in ("y", "b")]
    assert estimators == ["enumerate", "score"]
    check_pair(model, guide, x)
    with own_parameters(guide):
        nodes: Any = poutine.trace(guide).get_trace(x).nodes
        given = {name: nodes[name]["value"] for name in ("y", "b")}
        other = {**given, "y": given["y"].roll(1, -1)}
        traces: list[Any] = [
            poutine.trace(poutine.condition(guide, data)).get_trace(x) for data in (given, other)
        ]
        fns = [trace.nodes["z"]["fn"] for trace in traces]
    value = nodes["z"]["value"]
    same = torch.equal(fns[0].log_prob(value), fns[1].log_prob(value))
    assert same is (family is MeanField)


def test_settings_of_a_derived_guide_reach_its_heads(program):
    x = torch.randn(6, 3)
    guide = MeanField(program(with_labels), MLP(3, 7), x, discrete="relaxed", temperature=0.3)
    assert {(guide.heads[n].estimator, guide.heads[n].temperature) for n in "yb"} == {
        ("relaxed", 0.3)
    }
    # By default the label is summed over, and has no use for the baseline of the bits.
    guide = MeanField(program(with_labels), MLP(3, 7), x, baseline="both")
    assert guide.heads["y"].baseline is None
    assert guide.heads["b"].baseline is not None
    with pytest.raises(ValueError, match=r"MeanField.*expected one of enumerate, score"):
        MeanField(program(with_labels), MLP(3, 7), x, discrete="sum")
    with pytest.raises(PairError, match=r"FullRank: site 'y' is discrete.*MeanField"):
        FullRank(program(with_labels), MLP(3, 7), x)


@pytest.mark.parametrize(
    "family", [dist.Categorical(torch.ones(3)), dist.Poisson(1.0), dist.Bernoulli(0.5)], ids=str
)
def test_other_discrete_sites_are_refused(family, program):
    def story(self, x):
        pyro.sample("k", family)
        return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    with pytest.raises(PairError, match=r"site 'k' is discrete.*one-hot vectors.*vector of bits"):
        MeanField(program(story), MLP(2, 4), torch.randn(3, 2))


@pytest.mark.parametrize("estimator", ["score", "relaxed", "straight-through"])
def test_evaluation_is_that_of_the_discrete_model(estimator):
    """log p(x) by importance sampling, and by the sum over all bits."""
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork([3], Bernoulli(MLP(3, 4))).double()
    guide = Factorized(z1=(Bits(MLP(4, 3), estimator=estimator, temperature=1.0), ["x"]))
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(40, -1)
    total = torch.stack(
        [
            model.z_dist(1).log_prob(z) + model.x_dist(z).log_prob(x[0])
            for z in torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
        ]
    ).logsumexp(0)
    found = evaluate(model, guide, {"train": x, "test": x}, samples=1000, compile=False)
    assert found.nll == pytest.approx(-total.item(), abs=5 * found.nll_se + 1e-3)
    assert found.nll_se < 0.01


def test_relaxed_draws_pass_as_draws_of_a_discrete_site():
    torch.manual_seed(0)
    model = CategoricalVAE.toy().double()
    x = model.simulate(6)["x"]
    for discrete in ("relaxed", "straight-through"):
        check_pair(model, MeanField(model, MLP(6, 8), x, discrete=discrete), x)
    # What says so is the site, not its values.
    relaxed = Factorized(z=(Unmarked(), ["x"]))
    with pytest.raises(PairError, match=r"a draw of the guide.*outside the model's support"):
        check_pair(model, relaxed, x)


def test_a_relaxed_guide_of_a_continuous_site_is_refused(program):
    """Draws of the guide need not be values, but those of the model have to be."""

    def shares(self, x):
        pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    guide = Factorized(z=(Labels(nn.Linear(2, 3), estimator="relaxed"), ["x"]))
    with pytest.raises(PairError, match=r"a draw of the model.*outside the guide's support"):
        check_pair(program(shares), guide, torch.randn(4, 2))


class Unmarked(nn.Module):
    def forward(self, x):
        return RelaxedOneHot(torch.zeros(len(x), 2, 3), 1.0).to_event(1)


def test_a_recorded_step_learns_baselines_as_an_eager_one():
    """Loss, gradients and running mean, of the same draws."""
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork.toy().double()
    x = model.simulate(6)["x"]
    heads: Any = (Bits(MLP(6, 3), baseline="both"), Bits(MLP(3, 2), baseline="average"))
    guide = Factorized(z1=(heads[0], ["x"]), z2=(heads[1], ["z1"]))
    held = parameters(model, guide)
    means = [head.baseline.mean for head in heads]
    steps = [head.baseline.steps for head in heads]

    def step(x):
        for parameter in held:
            parameter.grad = None
        with own_parameters(model, guide):
            loss = backward(TraceGraph_ELBO(), model, guide, x)
        return loss, [p.grad for p in held]

    with traceable():
        _, graph = record(step, x)
    found = []
    for run in (step, graph):
        for mean, count in zip(means, steps, strict=True):
            mean.fill_(-1.0)
            count.fill_(3.0)
        torch.manual_seed(1)
        loss, gradients = run(x)
        found.append([loss, *gradients, *(mean.clone() for mean in means)])
    assert all(mean != -1 for mean in means)
    for eager, recorded in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(eager).double(), torch.as_tensor(recorded))
