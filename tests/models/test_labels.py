"""Models of labels: joint densities against their stories written out."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import ppl_vae
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Gaussian
from ppl_vae.mixtures import MixtureOfGaussians
from ppl_vae.model import GenerativeModel, own_parameters
from ppl_vae.models.auxiliary import ADGM, SDGM
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.stacked import M1M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import EnumeratedELBO, plain_elbo

pytestmark = pytest.mark.usefixtures("float64")

ROWS, K = 5, 3


def normal(net: nn.Module, *context: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = net(torch.cat(context, -1)).chunk(2, -1)
    return loc, nn.functional.softplus(scale)


def log_normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale)
    density = -0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
    return density.sum(-1)


def log_bits(x: Tensor, logits: Tensor) -> Tensor:
    return (x * logits - nn.functional.softplus(logits)).sum(-1)


def of_m2(model: M2, v: dict[str, Tensor]) -> Tensor:
    logits = model.likelihood.net(torch.cat([v["y"], v["z"]], -1))
    return -math.log(K) + log_normal(v["z"], 0.0, 1.0) + log_bits(v["x"], logits)


def of_adgm(model: ADGM, v: dict[str, Tensor]) -> Tensor:
    a = log_normal(v["a"], *normal(model.auxiliary.net, v["x"], v["y"], v["z"]))
    return of_m2(model, v) + a  # pyright: ignore


def of_sdgm(model: SDGM, v: dict[str, Tensor]) -> Tensor:
    logits = model.likelihood.net(torch.cat([v["a"], v["y"], v["z"]], -1))
    a = log_normal(v["a"], *normal(model.auxiliary.net, v["y"], v["z"]))
    return -math.log(K) + log_normal(v["z"], 0.0, 1.0) + a + log_bits(v["x"], logits)


def of_m1m2(model: M1M2, v: dict[str, Tensor]) -> Tensor:
    z1 = log_normal(v["z1"], *normal(model.features.net, v["y"], v["z2"]))
    log_x = log_bits(v["x"], model.likelihood.net(v["z1"]))
    return -math.log(K) + log_normal(v["z2"], 0.0, 1.0) + z1 + log_x


def of_clusters(model: MixtureVAE, v: dict[str, Tensor]) -> Tensor:
    log_pi = (v["y"] * model.logits.log_softmax(0)).sum(-1)
    z = log_normal(v["z"], *normal(model.component.net, v["y"]))
    return log_pi + z + log_bits(v["x"], model.likelihood.net(v["z"]))


JOINTS: dict[type[Any], Any] = {
    M2: of_m2,
    ADGM: of_adgm,
    SDGM: of_sdgm,
    M1M2: of_m1m2,
    MixtureVAE: of_clusters,
}


def log_joint(model: GenerativeModel, values: dict[str, Tensor]) -> Tensor:
    with own_parameters(model):
        trace: Any = poutine.trace(poutine.condition(model, data=values)).get_trace(n=ROWS)
    trace.compute_log_prob()
    nodes = (n for n in trace.nodes.values() if n["type"] == "sample")
    return sum((n["log_prob"] for n in nodes if n["name"] in values), torch.zeros(ROWS))


@pytest.mark.parametrize("family", JOINTS, ids=lambda f: f.__name__)
def test_the_joint_density_is_that_of_the_story(family):
    torch.manual_seed(0)
    model = family.toy()
    if family is MixtureVAE:
        nn.init.normal_(model.logits)
    values = model.simulate(ROWS)
    torch.testing.assert_close(log_joint(model, values), JOINTS[family](model, values))
    # Given values are the same sites, observed.
    with own_parameters(model):
        trace: Any = poutine.trace(model).get_trace(x=values["x"], y=values["y"])
    assert all(trace.nodes[name]["is_observed"] for name in ("x", "y"))
    assert torch.equal(trace.nodes["y"]["value"], values["y"])


@pytest.mark.parametrize("family", JOINTS, ids=lambda f: f.__name__)
def test_labels_of_data_come_one_hot(family):
    model = family.toy().float()
    y = torch.tensor([2, 0, -1, 1])
    found = model.observed({"x": torch.zeros(4, 6), "y": y, "other": torch.ones(4)})
    assert set(found) == {"x", "y"}
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert torch.equal(found["y"], expected)
    assert found["y"].dtype == torch.float32
    assert model.double().observed({"y": y})["y"].dtype == torch.float64
    assert torch.equal(model.observed({"y": expected})["y"], expected), "one-hot rows stay"


@pytest.mark.parametrize("family", JOINTS, ids=lambda f: f.__name__)
def test_one_class_is_none(family):
    arguments: dict[Any, int] = {M2: 2, MixtureVAE: 2}
    parts = [nn.Identity()] * arguments.get(family, 3)
    with pytest.raises(ValueError, match=rf"{family.__name__}\(classes=1\): expected at least 2"):
        family(*parts, classes=1)


# Guides that sum the label out


def guides(model: GenerativeModel) -> dict[str, Factorized]:
    """Of the papers."""

    def q(inputs: int, size: int) -> Normal:
        return Normal(MLP(inputs, 7, 2 * size))

    def labels(inputs: int) -> Labels:
        return Labels(MLP(inputs, 7, K), estimator="enumerate")

    x, z = 6, 2
    sites: dict[str, dict[str, Any]] = {
        "M2": {"y": (labels(x), ["x"]), "z": (q(x + K, z), ["x", "y"])},
        "ADGM": {
            "a": (q(x, 2), ["x"]),
            "y": (labels(2 + x), ["a", "x"]),
            "z": (q(x + K, z), ["x", "y"]),
        },
        "SDGM": {
            "a": (q(x, 2), ["x"]),
            "y": (labels(2 + x), ["a", "x"]),
            "z": (q(2 + K + x, z), ["a", "y", "x"]),
        },
        "M1M2": {
            "z1": (q(x, 3), ["x"]),
            "y": (labels(3), ["z1"]),
            "z2": (q(3 + K, z), ["z1", "y"]),
        },
    }
    return {type(model).__name__: Factorized(**sites[type(model).__name__])}


@pytest.mark.parametrize("family", [M2, ADGM, SDGM, M1M2], ids=lambda f: f.__name__)
def test_the_bound_without_a_label_is_a_sum_over_labels(family):
    """sum_y q(y | ...) (log p(x, y, ...) - log q(y, ...)), of the draws for each label."""
    torch.manual_seed(0)
    model = family.toy()
    guide = guides(model)[family.__name__]
    x = model.simulate(ROWS)["x"]
    objective = plain_elbo(model, guide, x)
    assert isinstance(objective, EnumeratedELBO)
    draws = 2000
    many = EnumeratedELBO(draws)
    torch.manual_seed(1)
    with own_parameters(model, guide), torch.no_grad():
        traces: Any = many._get_trace(model, guide, (x,), {})
        torch.manual_seed(1)
        loss = many.loss(model, guide, x)
        drawn = {n: traces[1].nodes[n]["value"] for n in guide.contexts}
        bound = torch.zeros(draws, ROWS)
        for k in range(K):
            values = {"x": x.expand(draws, ROWS, 6)}
            for name, value in drawn.items():
                # Label dims lead; what is drawn before the label has none.
                own = value[min(k, len(value) - 1)] if value.dim() == 4 else value
                values[name] = own.expand(draws, ROWS, own.shape[-1])
            values["y"] = torch.eye(K)[k].expand(draws, ROWS, K)
            log_q = torch.zeros(draws, ROWS)
            for name, context in guide.contexts.items():
                fn = guide.conditionals[name](*(values[c] for c in context))
                log_q = log_q + fn.log_prob(values[name])
            y_given = [values[c] for c in guide.contexts["y"]]
            q_y = guide.conditionals["y"](*y_given).log_prob(values["y"]).exp()
            bound += q_y * (JOINTS[family](model, values) - log_q)
    per_draw = bound.sum(1)
    error = float(per_draw.std()) / draws**0.5
    # KLs in closed form have another noise: they agree in the mean.
    assert float(per_draw.mean()) == pytest.approx(-float(loss), abs=6 * error)
    assert error < 0.2


def test_what_is_fixed_has_no_gradient_and_what_is_not_has_one(losses_of):
    """M1 fixed under M2, with labels and without."""
    torch.manual_seed(0)
    model = M1M2.toy()
    guide = guides(model)["M1M2"]
    fixed = [model.likelihood, guide.conditionals["z1"]]
    for part in fixed:
        part.requires_grad_(False)
    drawn = model.simulate(ROWS)
    for columns in ({"x": drawn["x"], "y": drawn["y"]}, {"x": drawn["x"]}):
        losses_of(model, guide, **columns)
        assert all(p.grad is None for part in fixed for p in part.parameters())
        moved = [model.features, guide.conditionals["z2"]]
        moved += [] if "y" in columns else [guide.conditionals["y"]]
        for part in moved:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


@pytest.fixture
def losses_of():
    def run(model: GenerativeModel, guide: nn.Module, **columns: Tensor) -> float:
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.grad = None
        with own_parameters(model, guide):
            objective = plain_elbo(model, guide, **columns)
            return float(ppl_vae.objectives.backward(objective, model, guide, **columns))

    return run


# Clusters


def test_clusters_summed_out_are_a_mixture_as_prior():
    """The NLL and the ELBO of a VAE whose prior is the mixture, on the same draws."""
    torch.manual_seed(0)
    z, d = 2, 4
    prior = MixtureOfGaussians(z, K)
    nn.init.normal_(prior.logits)
    likelihood = Gaussian(MLP(z, 5, d), 0.6)
    component = nn.Linear(K, 2 * z)
    with torch.no_grad():
        components = prior().components
        while isinstance(components, torch.distributions.Independent):
            components = components.base_dist
        loc, scale = components.loc, components.scale
        component.weight.copy_(torch.cat([loc, scale.expm1().log()], 1).T)
        component.bias.zero_()
    model = MixtureVAE(Normal(component), likelihood, K)
    with torch.no_grad():
        model.logits.copy_(prior.logits)
    q_z = Normal(nn.Linear(d, 2 * z))
    data = Dataset("rows", {"train": {"x": torch.randn(7, d)}})
    found, expected = (
        ppl_vae.evaluate(m, Factorized(z=(q_z, ["x"])), data, split="train", samples=30)
        for m in (model, VAE(prior, likelihood))
    )
    assert found.nll == pytest.approx(expected.nll, rel=1e-8)
    assert found.elbo == pytest.approx(expected.elbo, rel=1e-8)
    assert found.reconstruction == pytest.approx(expected.reconstruction, rel=1e-8)
    assert set(found.kl_per_site) == {"y", "z"}
    assert sum(found.kl_per_site.values()) == pytest.approx(expected.kl_per_site["z"], rel=1e-8)


def test_clusters_that_are_given_are_observed():
    """log p(x, y) where the data name the cluster, p(x) where it is withheld."""
    torch.manual_seed(0)
    model = MixtureVAE(Normal(nn.Linear(K, 4)), Gaussian(nn.Linear(2, 5), 0.8), K)
    guide = Factorized(z=(Normal(nn.Linear(5, 4)), ["x"]))
    drawn = model.simulate(20)
    rows = {"x": drawn["x"], "y": drawn["y"].argmax(1)}
    data = Dataset("rows", {"train": rows})
    weight, bias = (p.detach() for p in (model.likelihood.net.weight, model.likelihood.net.bias))
    log_p = []
    for k in range(K):
        loc, scale = normal(model.component.net, torch.eye(K)[k])
        covariance = weight @ torch.diag(scale.detach() ** 2) @ weight.T + 0.64 * torch.eye(5)
        given = dist.MultivariateNormal(weight @ loc.detach() + bias, covariance)
        log_p.append(given.log_prob(drawn["x"]) - math.log(K))
    every = torch.stack(log_p, 1)
    how: dict[str, Any] = {"split": "train", "samples": 30_000}
    both = ppl_vae.evaluate(model, guide, data, **how)
    alone = ppl_vae.evaluate(model, guide, data, withheld=["y"], **how)
    own = every.gather(1, rows["y"].unsqueeze(1))
    assert both.nll == pytest.approx(-float(own.mean()), abs=0.05)
    assert alone.nll == pytest.approx(-float(every.logsumexp(1).mean()), abs=0.05)
    assert both.labels is None
    assert alone.labels is not None
    posterior = every.softmax(1).gather(1, rows["y"].unsqueeze(1))
    found = alone.labels["importance"].log_loss
    assert found == pytest.approx(-float(posterior.log().mean()), abs=0.03)
