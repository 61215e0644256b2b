"""Sums over the values of discrete sites: against loops over them, closed forms and Pyro's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.discrete import Labels
from ppl_vae.distributions import OneHotCategorical
from ppl_vae.graphs import record
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Gaussian
from ppl_vae.model import own_parameters
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.objectives import IWAE, Beta, EnumeratedELBO, backward, plain_elbo
from ppl_vae.objectives.rows import RowTerms
from ppl_vae.priors import StandardNormal
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")

ROWS, TOTAL, K, Z, D = 4, 12, 3, 2, 5
NOISE = 0.7
EVERY = [torch.nn.functional.one_hot(torch.tensor(k), K).double() for k in range(K)]
ALL: dict[str, Any] = {"enumerate": "parallel"}


def labeled_pair(prior: nn.Module | None = None) -> tuple[M2, Factorized, Tensor]:
    """x ~ N(W_y y + W_z z + b, NOISE^2): all that is not discrete has a closed form."""
    torch.manual_seed(0)
    model = M2(prior or StandardNormal(Z), Gaussian(nn.Linear(K + Z, D), NOISE), K)
    sites: dict[str, Any] = {
        "y": (Labels(nn.Linear(D, K), estimator="enumerate"), ["x"]),
        "z": (Normal(nn.Linear(D + K, 2 * Z)), ["x", "y"]),
    }
    return model, Factorized(**sites), torch.randn(ROWS, D)


def clusters() -> tuple[MixtureVAE, Factorized, Tensor]:
    """The model sums over the cluster, the guide draws z alone."""
    torch.manual_seed(0)
    model = MixtureVAE(Normal(nn.Linear(K, 2 * Z)), Gaussian(MLP(Z, 4, D), NOISE), K)
    nn.init.normal_(model.logits)
    return model, Factorized(z=(Normal(nn.Linear(D, 2 * Z)), ["x"])), torch.randn(ROWS, D)


def number(value: Any) -> float:
    return float(torch.as_tensor(value).detach())


def each(x: Tensor, y: Tensor) -> Tensor:
    return y.expand(*x.shape[:-1], K)


def closed_parts(model: M2, guide: Factorized, x: Tensor) -> dict[str, Tensor]:
    """Of every label ``(K, rows)``: q(y | x), E log p(x | y, z), KL of z, log p(y)."""
    weight, bias = model.likelihood.net.weight, model.likelihood.net.bias
    found: dict[str, list[Tensor]] = {"q": [], "x": [], "z": [], "y": []}
    log_q = guide.conditionals["y"].net(x).log_softmax(-1)
    for k, y in enumerate(EVERY):
        loc, scale = guide.conditionals["z"].net(torch.cat([x, each(x, y)], -1)).chunk(2, -1)
        scale = nn.functional.softplus(scale)
        mean = torch.cat([each(x, y), loc], -1) @ weight.T + bias
        spread = (scale.unsqueeze(1) * weight[:, K:]).square().sum(-1)  # variance, by pixel
        log_x = -0.5 * ((x - mean).square() + spread) / NOISE**2 - math.log(NOISE)
        found["q"].append(log_q[:, k].exp())
        found["x"].append((log_x - 0.5 * math.log(2 * math.pi)).sum(-1))
        found["z"].append(0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum(-1))
        found["y"].append(torch.full((len(x),), -math.log(K)))
    return {name: torch.stack(values) for name, values in found.items()}


def closed_elbo(parts: dict[str, Tensor], weight: float = 1.0) -> Tensor:
    """``(rows,)``; the KLs weighted."""
    kl = parts["z"] + parts["q"].log() - parts["y"]
    return (parts["q"] * (parts["x"] - weight * kl)).sum(0)


def gradients(loss: Tensor, *programs: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters(*programs)))


def traces(objective: Any, model: Any, guide: Any, x: Tensor, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with own_parameters(model, guide):
        return objective._get_trace(model, guide, (x,), {"total": TOTAL})


def drawn(traced: Any, name: str) -> Tensor:
    """The values of a site, its enumerated dims first."""
    return traced[1].nodes[name]["value"].detach()


# In the guide


def test_the_mean_over_draws_is_the_sum_over_labels_in_closed_form():
    model, guide, x = labeled_pair()
    objective = EnumeratedELBO(40_000)
    terms = RowTerms(*traces(objective, model, guide, x))
    with torch.no_grad():
        parts = closed_parts(model, guide, x)
        found = terms.reconstruction - terms.weighted_kl()  # a figure a draw and row
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - closed_elbo(parts)).abs() < 4.5 * error).all()
        assert (error < 0.05).all()
        # KLs have no noise at all.
        torch.testing.assert_close(terms.kl("z")[0], (parts["q"] * parts["z"]).sum(0))
        kl_y = (parts["q"] * (parts["q"].log() - parts["y"])).sum(0)
        torch.testing.assert_close(terms.kl("y")[0], kl_y)
        per_latent = terms.kl_per_latent("z")
        assert per_latent.shape == (objective.draws, ROWS, Z)
        torch.testing.assert_close(per_latent.sum(-1), terms.kl("z"))
        assert number(terms.log_q["y"][0, 0]) == pytest.approx(
            number((parts["q"] * parts["q"].log()).sum(0)[0])
        )


def test_its_gradient_is_that_of_the_closed_form_in_the_mean(losses):
    model, guide, x = labeled_pair()
    expected = gradients(
        -TOTAL / ROWS * closed_elbo(closed_parts(model, guide, x)).sum(), model, guide
    )
    found = [
        losses(EnumeratedELBO(50), model, guide, x, total=TOTAL, seed=seed)[1] for seed in range(60)
    ]
    for mean, *sample in zip(expected, *found, strict=True):
        values = torch.stack(sample)
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - mean).abs() <= 4.5 * error + 1e-9).all()


class HeavyTails(nn.Module):
    """A prior whose KL has no closed form."""

    def forward(self) -> Any:
        return dist.StudentT(3.0, torch.zeros(Z), 1.0).to_event(1)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("pair", [lambda: labeled_pair(HeavyTails()), clusters], ids=["y", "model"])
def test_on_the_same_draws_it_is_that_of_pyro(losses, pair, draws):
    model, guide, x = pair()
    several = {"num_particles": draws, "max_plate_nesting": 1, "vectorize_particles": True}
    theirs = losses(TraceEnum_ELBO(**several), model, guide, x, total=TOTAL)
    found = losses(EnumeratedELBO(draws), model, guide, x, total=TOTAL)
    torch.testing.assert_close(found, theirs)


def test_it_is_that_of_pyro_in_the_mean():
    """Where KLs are in closed form, draws are not used alike."""
    model, guide, x = labeled_pair()
    found = []
    for objective in (EnumeratedELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        torch.manual_seed(2)
        with own_parameters(model, guide):
            found.append(
                torch.tensor([number(objective.loss(model, guide, x)) for _ in range(400)])
            )
    error = math.hypot(*(number(f.std()) / len(f) ** 0.5 for f in found))
    assert abs(number(found[0].mean() - found[1].mean())) < 4 * error


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_warm_up_weighs_the_kl_of_each_value_alone(losses, weight):
    """sum_y q(y) (log p(x | y, z_y) - w (KL of z given y + log q(y) - log p(y)))."""
    model, guide, x = labeled_pair()
    objective = EnumeratedELBO()
    z = drawn(traces(objective, model, guide, x), "z").squeeze(1)  # (K, rows, Z)
    parts = closed_parts(model, guide, x)
    log_x = []
    for k, y in enumerate(EVERY):
        loc, scale = guide.conditionals["z"].net(torch.cat([x, each(x, y)], -1)).chunk(2, -1)
        noise = ((z[k] - loc) / nn.functional.softplus(scale)).detach()
        again = loc + noise * nn.functional.softplus(scale)
        log_x.append(model.x_dist(each(x, y), again).log_prob(x))
    parts["x"] = torch.stack(log_x)
    expected = -closed_elbo(parts, weight).mean()
    training = Training(objective, TOTAL)
    training.weight = weight
    loss, found = losses(training, model, guide, x, total=TOTAL)
    assert loss == pytest.approx(number(expected))
    torch.testing.assert_close(found, gradients(expected, model, guide))
    # What is watched besides is not weighted; it takes log-ratios of draws.
    kl = number((parts["q"] * (parts["q"].log() - parts["y"])).sum(0).mean())
    assert number(training.terms.reconstruction) == pytest.approx(
        number((parts["q"] * parts["x"]).sum(0).mean())
    )
    log_ratio = torch.zeros(())
    for k, y in enumerate(EVERY):
        q = guide.conditionals["z"](x, each(x, y))
        ratio = q.log_prob(z[k]) - dist.Normal(0.0, 1.0).log_prob(z[k]).sum(-1)
        log_ratio = log_ratio + (parts["q"][k] * ratio).mean()
    assert number(training.terms.kl) == pytest.approx(kl + number(log_ratio))


@pytest.mark.parametrize("draws", [1, 4])
def test_iwae_sums_the_label_out_of_each_weight(losses, draws):
    model, guide, x = labeled_pair()
    z = drawn(traces(IWAE(draws), model, guide, x), "z")  # (K, draws, rows, Z)
    log_w = []
    for k, y in enumerate(EVERY):
        log_p = model.x_dist(each(z[k], y), z[k]).log_prob(x) - math.log(K)
        log_p = log_p + dist.Normal(0.0, 1.0).log_prob(z[k]).sum(-1)
        log_w.append(log_p - guide.conditionals["z"](x, each(x, y)).log_prob(z[k]))
    bound = torch.stack(log_w).exp().sum(0).mean(0).log()
    loss, _ = losses(IWAE(draws), model, guide, x, total=TOTAL)
    assert loss == pytest.approx(-TOTAL / ROWS * number(bound.sum()))


def test_iwae_comes_to_the_likelihood_with_many_draws(losses):
    """log p(x) of a linear-Gaussian model; a bound below it with few draws."""
    model, guide, x = labeled_pair()
    q_z = guide.conditionals["z"].net  # the prior, which covers the posterior
    nn.init.zeros_(q_z.weight)
    q_z.bias.data = torch.tensor([0.0] * Z + [math.log(math.e - 1)] * Z)
    weight, bias = (p.detach() for p in (model.likelihood.net.weight, model.likelihood.net.bias))
    covariance = weight[:, K:] @ weight[:, K:].T + NOISE**2 * torch.eye(D)
    given = [dist.MultivariateNormal(weight[:, k] + bias, covariance).log_prob(x) for k in range(K)]
    exact = number((torch.stack(given).logsumexp(0) - math.log(K)).sum())
    few, many = (
        -sum(losses(IWAE(n), model, guide, x, seed=s)[0] for s in range(8)) / 8 for n in (1, 20_000)
    )
    assert few < exact - 0.1
    assert many == pytest.approx(exact, abs=0.02)


# In the model


def test_clusters_are_summed_out_of_the_model(losses):
    """log p(x | z) + log sum_y pi_y p(z | y) - log q(z | x), z drawn."""
    model, guide, x = clusters()
    z = drawn(traces(EnumeratedELBO(), model, guide, x), "z").squeeze(0)
    q = guide.conditionals["z"](x)
    noise = ((z - q.base_dist.loc) / q.base_dist.scale).detach()
    z = q.base_dist.loc + noise * q.base_dist.scale
    log_pi = model.logits.log_softmax(0)
    log_z = torch.stack([log_pi[k] + model.z_dist(y).log_prob(z) for k, y in enumerate(EVERY)])
    bound = model.x_dist(z).log_prob(x) + log_z.logsumexp(0) - q.log_prob(z)
    expected = -TOTAL / ROWS * bound.sum()
    loss, found = losses(EnumeratedELBO(), model, guide, x, total=TOTAL)
    assert loss == pytest.approx(number(expected))
    torch.testing.assert_close(found, gradients(expected, model, guide))
    # Its parts: the cluster's posterior r(y) = p(y | z) is its guide.
    terms = RowTerms(*traces(EnumeratedELBO(), model, guide, x))
    log_r = log_z.log_softmax(0)
    kl_y = (log_r.exp() * (log_r - log_pi.unsqueeze(1))).sum(0)
    torch.testing.assert_close(terms.kl("y")[0], kl_y)
    kl_z = q.log_prob(z) - (log_r.exp() * (log_z - log_pi.unsqueeze(1))).sum(0)
    torch.testing.assert_close(terms.kl("z")[0], kl_z)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_warm_up_keeps_the_posterior_of_the_models_own_site(losses, weight):
    model, guide, x = clusters()
    z = drawn(traces(EnumeratedELBO(), model, guide, x), "z").squeeze(0)
    log_pi = model.logits.log_softmax(0)
    log_p = torch.stack([log_pi[k] + model.z_dist(y).log_prob(z) for k, y in enumerate(EVERY)])
    r = log_p.softmax(0)
    ratios = log_p - r.log() - guide.conditionals["z"](x).log_prob(z)
    expected = model.x_dist(z).log_prob(x) + weight * (r * ratios).sum(0)
    training = Training(EnumeratedELBO(), TOTAL)
    training.weight = weight
    loss, _ = losses(training, model, guide, x, total=TOTAL)
    assert loss == pytest.approx(-number(expected.mean()))
    assert number(training.terms.elbo) == pytest.approx(
        number((model.x_dist(z).log_prob(x) + (r * ratios).sum(0)).mean())
    )


class Groups(nn.Module):
    """Tables of log-probabilities, and what x depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K, 2))
        self.net = nn.Linear(K + 2 + Z, D)
        self.q_a = nn.Linear(D, K)
        self.q_z = nn.Linear(D + K, 2 * Z)


def groups(program: Any, of_guide: bool) -> Any:
    """a, b given a, z, and x given all: the model sums over b, and over a or the guide does."""
    torch.manual_seed(0)
    parts = Groups()

    def story(self: Any, x: Tensor | None) -> Tensor:
        infer = {} if of_guide else ALL
        a = pyro.sample("a", OneHotCategorical(logits=parts.a), infer=infer)
        z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
        b = pyro.sample("b", OneHotCategorical(logits=a @ parts.b), infer=ALL)
        batch = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1], z.shape[:-1])
        joined = torch.cat([t.expand(*batch, t.shape[-1]) for t in (a, b, z)], -1)
        return pyro.sample("x", dist.Normal(parts.net(joined), NOISE).to_event(1), obs=x)

    def guiding(self: Any, x: Tensor) -> None:
        if of_guide:
            a = pyro.sample("a", OneHotCategorical(logits=parts.q_a(x)), infer=ALL)
        else:
            a = torch.zeros(K)
        pyro.sample("z", q_z(x, a).to_event(1))

    def q_z(x: Tensor, a: Tensor) -> Any:
        batch = torch.broadcast_shapes(a.shape[:-1], x.shape[:-1])
        joined = torch.cat([x.expand(*batch, D), a.expand(*batch, K)], -1)
        loc, scale = parts.q_z(joined).chunk(2, -1)
        return dist.Normal(loc, scale.exp())

    return program(story, parts=parts), program(guiding), parts, q_z


def log_joint(parts: Groups, x: Tensor, z: Tensor, i: int, j: int) -> Tensor:
    """log p(x, a=i, b=j, z): ``(draws, rows)``."""
    a, b = EVERY[i], torch.eye(2)[j]
    joined = torch.cat([a.expand(*z.shape[:-1], K), b.expand(*z.shape[:-1], 2), z], -1)
    log_x = dist.Normal(parts.net(joined), NOISE).log_prob(x).sum(-1)
    log_ab = parts.a.log_softmax(0)[i] + parts.b[i].log_softmax(0)[j]
    return log_x + log_ab + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("objective", [EnumeratedELBO, IWAE])
def test_two_sites_of_the_model_are_summed_out_together(losses, program, objective, draws):
    model, guide, parts, q_z = groups(program, of_guide=False)
    x = torch.randn(ROWS, D)
    z = drawn(traces(objective(draws), model, guide, x), "z")
    every = [log_joint(parts, x, z, i, j) for i, j in itertools.product(range(K), range(2))]
    log_w = torch.stack(every).logsumexp(0) - q_z(x, torch.zeros(K)).log_prob(z).sum(-1)
    bound = log_w.mean(0) if objective is EnumeratedELBO else log_w.exp().mean(0).log()
    loss, _ = losses(objective(draws), model, guide, x, total=TOTAL)
    assert loss == pytest.approx(-TOTAL / ROWS * number(bound.sum()))
    if objective is IWAE:
        return
    terms = RowTerms(*traces(objective(draws), model, guide, x))
    joint = torch.stack(every).unflatten(0, (K, 2))
    r = joint.flatten(0, 1).softmax(0).unflatten(0, (K, 2))
    r_a = r.sum(1)
    log_b = parts.b.log_softmax(1)[..., None, None]
    kl_a = (r_a * (r_a.log() - parts.a.log_softmax(0)[:, None, None])).sum(0)
    torch.testing.assert_close(terms.kl("a"), kl_a)
    kl_b = (r * (r.log() - r_a.log().unsqueeze(1) - log_b)).sum((0, 1))
    torch.testing.assert_close(terms.kl("b"), kl_b)


@pytest.mark.parametrize("draws", [1, 3])
def test_guide_and_model_each_enumerate_a_site(losses, program, draws):
    model, guide, parts, q_z = groups(program, of_guide=True)
    x = torch.randn(ROWS, D)
    z = drawn(traces(EnumeratedELBO(draws), model, guide, x), "z")  # (K, draws, rows, Z)
    log_q = parts.q_a(x).log_softmax(-1)
    elbo, weights = [], []
    for i, a in enumerate(EVERY):
        log_p = torch.logsumexp(torch.stack([log_joint(parts, x, z[i], i, j) for j in (0, 1)]), 0)
        log_w = log_p - q_z(x, a).log_prob(z[i]).sum(-1)
        elbo.append(log_q[:, i].exp() * (log_w - log_q[:, i]))
        weights.append(log_w)
    loss, _ = losses(EnumeratedELBO(draws), model, guide, x, total=TOTAL)
    assert loss == pytest.approx(-TOTAL / ROWS * number(sum(elbo).mean(0).sum()))
    loss, _ = losses(IWAE(draws), model, guide, x, total=TOTAL)
    bound = torch.stack(weights).logsumexp(0).exp().mean(0).log()
    assert loss == pytest.approx(-TOTAL / ROWS * number(bound.sum()))


def test_without_other_latents_the_bound_is_the_likelihood(losses, program):
    """A mixture: x depends directly on the site that the model enumerates."""
    logits, means = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K, D))

    def story(self: Any, x: Tensor | None) -> Tensor:
        y = pyro.sample("y", OneHotCategorical(logits=self.logits), infer=ALL)
        return pyro.sample("x", dist.Normal(y @ self.means, 1.0).to_event(1), obs=x)

    model, guide = program(story, logits=logits, means=means), program(lambda self, x: None)
    x = torch.randn(ROWS, D)
    assert isinstance(plain_elbo(model, guide, x), EnumeratedELBO)
    given = dist.Normal(means.unsqueeze(1), 1.0).to_event(1).log_prob(x)
    expected = -(logits.log_softmax(0).unsqueeze(1) + given).logsumexp(0).sum()
    loss, found = losses(EnumeratedELBO(), model, guide, x)
    assert loss == pytest.approx(number(expected))
    torch.testing.assert_close(found, gradients(expected, model))


def test_an_impossible_value_takes_no_part(program):
    """Probability 0 under model and guide, and an infinite log-density of x there."""
    logits = torch.tensor([0.3, -torch.inf, 0.0])
    width = torch.tensor([1.0, 0.1, 2.0])

    def story(self: Any, x: Tensor | None) -> Tensor:
        y = pyro.sample("y", OneHotCategorical(logits=logits))
        bound = (y * width).sum(-1, keepdim=True)
        return pyro.sample("x", dist.Uniform(-bound, bound).to_event(1), obs=x)

    def guiding(self: Any, x: Tensor) -> None:
        pyro.sample("y", OneHotCategorical(logits=torch.tensor([0.0, -torch.inf, 0.0])), infer=ALL)

    x = torch.tensor([[0.5], [-0.9]])
    with pyro.validation_enabled(False):
        loss = EnumeratedELBO().loss(program(story), program(guiding), x)
    log_p = logits.softmax(0).log() - (2 * width).log()
    assert number(loss) == pytest.approx(-2 * number((log_p[0] + log_p[2]) / 2 + math.log(2)))


@pytest.mark.parametrize("objective", [Beta(3.0), Beta(3.0, draws=2)], ids=repr)
def test_other_objectives_of_rows_take_means_over_the_values(losses, objective):
    model, guide, x = labeled_pair()
    terms = RowTerms(*traces(objective, model, guide, x))
    parts = closed_parts(model, guide, x)
    kl = (parts["q"] * (parts["z"] + parts["q"].log() - parts["y"])).sum(0)
    expected = -TOTAL / ROWS * (terms.reconstruction.mean(0) - 3.0 * kl).sum()
    loss, _ = losses(objective, model, guide, x, total=TOTAL)
    assert loss == pytest.approx(number(expected))


# Recorded

OBJECTIVES = {"elbo": lambda: EnumeratedELBO(2), "iwae": lambda: IWAE(3)}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("pair", [labeled_pair, clusters], ids=["guide", "model"])
def test_a_recorded_graph_gives_the_same_loss_and_gradients(pair, name):
    """The loss to the bit. Gradients up to rounding: the backward pass adds up in place where a
    graph does not, and sums over what is laid out otherwise are in another order."""
    model, guide, x = pair()
    training = Training(OBJECTIVES[name](), TOTAL)
    training.weight = 0.5
    held = parameters(model, guide)

    def step(x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        for parameter in held:
            parameter.grad = None
        with own_parameters(model, guide):
            loss = backward(training, model, guide, x, total=TOTAL)
        return loss, [p.grad for p in held]

    with traceable():
        _, graph = record(step, x)
    for seed in (1, 2):
        data = x.roll(seed, 0)
        torch.manual_seed(seed)
        expected, grads = step(data)
        torch.manual_seed(seed)
        loss, recorded = graph(data)
        assert loss == expected
        torch.testing.assert_close(recorded, grads, rtol=1e-12, atol=1e-14)
        # Weights that are sums over the labels have no part for a classifier.
        unheard = 2 if pair is labeled_pair and name == "iwae" else 0
        assert sum(gradient is None for gradient in grads) == unheard
    training.weight = 0.0  # followed by the graph
    torch.manual_seed(3)
    expected, _ = step(x)
    torch.manual_seed(3)
    assert graph(x)[0] == expected


@pytest.mark.slow
def test_a_compiled_step_leads_where_the_eager_one_does():
    found = []
    for compiled in (False, True):
        model, guide, x = labeled_pair()
        held = parameters(model, guide)
        training = Training(EnumeratedELBO(), TOTAL)
        svi = SVI(model, guide, torch.optim.Adam(held, 1e-2), training, compile=compiled)
        torch.manual_seed(1)
        losses = [number(svi.step(x, total=TOTAL)) for _ in range(20)]
        assert not svi.refused
        found.append((losses, [p.detach() for p in held]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)
