"""TopDown: exact in linear-Gaussian hierarchies, and the model's own program run as a guide."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae.graphs import record
from ppl_vae.guides.top_down import TopDown
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import GenerativeModel, own_parameters, sample_nodes
from ppl_vae.models.deep_ladder import DeepLadder
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward
from ppl_vae.priors import StandardNormal
from ppl_vae.residual import ConvLadder, MLPLadder
from ppl_vae.sites import PairError, check_pair, paired_traces
from ppl_vae.svi import SVI, parameters
from ppl_vae.traceable import traceable

pytestmark = pytest.mark.usefixtures("float64")

N, Z, X = 4, 2, 4
A, B = (1.3, -0.6), (0.8, 2.0)  # z1 = A z2 + noise; x = (B z1, B z1) + noise, entry by entry
S, T = 0.7, 0.5  # scales of the noise of z1 and x

both_merges = pytest.mark.parametrize("merge", ["precision", "residual"])


class Diagonal(nn.Module):
    """Location of each entry in proportion to one of the context, which is repeated."""

    factors: Tensor

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors))

    def forward(self, z: Tensor) -> Tensor:
        return self.factors * torch.cat([z] * (len(self.factors) // z.shape[-1]), -1)


def linear() -> Hierarchy:
    """Each entry of z2 and z1 has two entries of x to itself."""
    return Hierarchy(StandardNormal(Z), [Gaussian(Diagonal(*A), S)], Gaussian(Diagonal(*B, *B), T))


def evidence(x: Tensor) -> Tensor:
    """log p(x), ``(N,)``: z2 and z1 integrated out, entry by entry."""
    a, b = torch.tensor(A), torch.tensor(B)
    shared = torch.diag((b * a) ** 2 + (b * S) ** 2).repeat(2, 2)
    covariance = shared + T**2 * torch.eye(X)
    return dist.MultivariateNormal(torch.zeros(X), covariance).log_prob(x)


def exact(model: Hierarchy) -> TopDown:
    """Heads that state the likelihood of each site: x given z2, and x given z1, as normals."""
    guide = TopDown(model, nn.Identity(), torch.zeros(1, X))
    a, b, t = torch.tensor(A), torch.tensor(B), T / math.sqrt(2)  # two entries of x, averaged
    below = {"z2": (a * b, torch.hypot(b * S, torch.tensor(t))), "z1": (b, torch.tensor(t))}
    mean = torch.eye(Z).repeat(1, 2) / 2
    with torch.no_grad():
        for name, (factor, scale) in below.items():
            head = guide.heads[name]
            raw = (scale / factor.abs() - torch.finfo(torch.float64).eps).expm1().log()
            head.weight.copy_(torch.cat([mean / factor.unsqueeze(-1), torch.zeros(Z, X)]))
            head.bias.copy_(torch.cat([torch.zeros(Z), raw]))
    return guide


def test_heads_that_state_the_likelihood_make_the_exact_posterior() -> None:
    model = linear()
    x = model.simulate(N)["x"]
    guide = exact(model)
    for seed in range(3):
        torch.manual_seed(seed)
        with own_parameters(model, guide):
            traces = paired_traces(model, guide, x)
        log_p, log_q = (
            sum(node["fn"].log_prob(node["value"]) for _, node in sample_nodes(trace))
            for trace in traces
        )
        torch.testing.assert_close(log_p - log_q, evidence(x))


def test_training_finds_the_exact_posterior() -> None:
    model = linear()
    x = model.simulate(64)["x"]
    guide = TopDown(model, nn.Identity(), x)
    held = parameters(model, guide)
    assert held == list(guide.parameters())
    optimizer = torch.optim.LBFGS(held, max_iter=100, line_search_fn="strong_wolfe")
    elbo = Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=1)

    def loss() -> Tensor:
        torch.manual_seed(1)  # of the same draws each time
        optimizer.zero_grad()
        with own_parameters(model, guide):
            value = elbo.differentiable_loss(model, guide, x) / len(x)
        value.backward()
        return value

    optimizer.step(loss)
    torch.manual_seed(2)
    with own_parameters(model, guide):
        found = -elbo.loss(model, guide, x) / len(x)
    assert found == pytest.approx(evidence(x).mean().item(), abs=1e-2)


def run(guide: TopDown, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
    with own_parameters(guide):
        return dict(sample_nodes(poutine.trace(guide).get_trace(*args, **kwargs)))


def pair(merge: str = "precision", encoder: nn.Module | None = None) -> tuple[Hierarchy, TopDown]:
    model = Hierarchy.toy()
    x = torch.zeros(1, 6)
    return model, TopDown(model, encoder or MLP(6, 5), x, merge=merge)


def evidence_of(guide: TopDown, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    return guide.heads[name](guide.encoder(x)).chunk(2, -1)


def test_precision_merge_is_the_normalized_product() -> None:
    model, guide = pair()
    x = torch.randn(N, 6)
    drawn = run(guide, x)
    above: list[Tensor] = []
    for name, node in drawn.items():
        z, q = node["value"], node["fn"].base_dist
        p = model.z_dist(int(name[1:]), *above).base_dist.expand(z.shape)
        loc, raw = evidence_of(guide, name, x)
        e = dist.Normal(loc, nn.functional.softplus(raw))
        # log q - log p - log e is the same number at any value, minus its log-normalizer.
        values = torch.randn(7, *z.shape)
        left = (q.log_prob(values) - p.log_prob(values) - e.log_prob(values)).detach()
        normalizer = dist.Normal(p.loc, torch.hypot(p.scale, e.scale)).log_prob(loc)
        torch.testing.assert_close(left, -normalizer.detach().expand(7, *z.shape))
        above.append(z)


def test_residual_merge_shifts_and_scales_by_the_evidence() -> None:
    """The KL in the form of the NVAE paper, eq. 2: of shift and factor alone, per entry of z."""
    model, guide = pair("residual")
    x = torch.randn(N, 6)
    above: list[Tensor] = []
    for name, node in run(guide, x).items():
        p = model.z_dist(int(name[1:]), *above).base_dist.expand(node["value"].shape)
        shift, raw = evidence_of(guide, name, x)
        factor = (1 + (math.e - 1) * raw.exp()).log()
        expected = (shift**2 / p.scale**2 + factor**2) / 2 - factor.log() - 0.5
        torch.testing.assert_close(kl_divergence(node["fn"].base_dist, p), expected)
        above.append(node["value"])
    for head in guide.heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    with own_parameters(model, guide):
        traces = paired_traces(model, guide, x)
    p, q = (dict(sample_nodes(trace)) for trace in traces)
    for name in q:
        assert kl_divergence(q[name]["fn"], p[name]["fn"]).abs().max() < 1e-14


@both_merges
def test_guide_draws_the_latents_alone_and_never_decodes(merge: str) -> None:
    model, guide = pair(merge)
    calls: list[Any] = []
    model.likelihood.register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(N, 6).bernoulli(torch.tensor(0.5))
    particles = pyro.plate("particles", 3, dim=-2)
    for _ in range(2):  # a second run finds Pyro's handlers and plates as the first did
        drawn = run(guide, x, total=2 * N)
        assert list(drawn) == ["z3", "z2", "z1"]
        assert {node["scale"] for node in drawn.values()} == {2.0}
        assert all(node["value"].shape[:-1] == (N,) for node in drawn.values())
    assert not calls
    with own_parameters(model, guide):
        together = dict(sample_nodes(poutine.trace(particles(guide)).get_trace(x)))
        trace = poutine.trace(guide, param_only=True).get_trace(x)
    assert [node["value"].shape[:-1] for node in together.values()] == [(3, N)] * 3
    held = {name for name, _ in guide.named_parameters()}
    assert {name.replace("$$$", ".") for name in trace.param_nodes} == held
    check_pair(model, guide, x, total=5 * N)
    assert not set(parameters(model)) & set(parameters(guide))
    assert calls, "the model alone decodes"


def test_a_copied_guide_runs_the_copied_model() -> None:
    model, guide = pair()
    x = torch.randn(N, 6)
    run(guide, x)
    other, other_guide = copy.deepcopy((model, guide))
    with torch.no_grad():
        other.levels[0].net[0].bias += 1
    assert other_guide.model[0] is other
    torch.manual_seed(1)
    before = run(guide, x)["z2"]["value"]
    torch.manual_seed(1)
    assert not torch.allclose(run(other_guide, x)["z2"]["value"], before)
    assert guide.state_dict().keys() == {n for n, _ in guide.named_parameters()}


@pytest.mark.parametrize("name", ["z3", "z2", "z1"])
def test_a_ladder_gives_each_site_the_features_of_its_level(name: str) -> None:
    """A rung above a site's, and its head, have no part in what is drawn there."""
    model, guide = pair(encoder=MLPLadder(6, 5, 4, 3))
    assert [head.in_features for head in guide.heads.values()] == [3, 4, 5]
    x = torch.randn(N, 6)
    with own_parameters(guide):
        nodes = poutine.trace(guide).get_trace(x).nodes
    values = {k: nodes[k]["value"].detach() for k in ("z3", "z2", "z1")}
    replayed = poutine.condition(guide, values)
    with own_parameters(guide):
        trace = poutine.trace(replayed).get_trace(x)
        trace.nodes[name]["fn"].log_prob(values[name]).sum().backward()
    level = int(name[1:])
    reached = [rung for rung in range(3) if guide.encoder.rungs[rung][0].weight.grad.any()]
    assert reached == list(range(level))
    assert model.z_dist(3).event_shape == values["z3"].shape[1:]


def scalar_story(self: Any, x: Tensor | None) -> Tensor:
    """Latents of no and of two event dims, in place of flat ones."""
    u = pyro.sample("u", dist.Normal(self.w if hasattr(self, "w") else 0.0, 1.0))
    v = pyro.sample("v", dist.Normal(u[..., None, None], torch.ones(2, 3)).to_event(2))
    return pyro.sample("x", dist.Normal(v.sum(-1), 1.0).to_event(1), obs=x)


def whole(self: Any) -> None:
    self.w = pyro.sample("w", dist.Normal(0.0, 1.0))


def test_global_latents_and_events_of_any_shape(program: Any) -> None:
    model = program(scalar_story, whole)
    x = torch.randn(N, 2)
    guide = TopDown(model, MLP(2, 5), x)
    check_pair(model, guide, x, total=3 * N)
    with own_parameters(model, guide):
        drawn = dict(sample_nodes(poutine.trace(guide).get_trace(x)))
    assert [name for name in drawn if "unconstrained" not in name] == ["w", "u", "v"]
    w, loc, raw = drawn["w"]["value"], *(part.squeeze(-1) for part in evidence_of(guide, "u", x))
    variance = nn.functional.softplus(raw) ** 2
    expected = (w * variance + loc) / (1 + variance)  # p(u) is Normal(w, 1): w as it was drawn
    torch.testing.assert_close(drawn["u"]["fn"].loc, expected)
    assert (drawn["v"]["fn"].event_shape, drawn["v"]["fn"].batch_shape) == ((2, 3), (N,))


class Observing(VAE):
    """A VAE whose latent may be observed, and another below it."""

    def forward(
        self,
        x: Tensor | None = None,
        z: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, z, n=n, total=total):
            z = pyro.sample("z", self.z_dist(), obs=z)
            y = pyro.sample("y", dist.Normal(z, 1.0).to_event(1))
            return pyro.sample("x", self.x_dist(y), obs=x)


def test_observed_latents_go_on_to_the_model_and_are_not_drawn() -> None:
    model = Observing(StandardNormal(Z), Gaussian(nn.Linear(Z, X)))
    x, z = torch.randn(N, X), 1e3 + torch.randn(N, Z)
    guide = TopDown(model, MLP(X, 5), x, merge="residual")
    drawn = run(guide, x, z)
    assert list(drawn) == ["y"]
    assert (drawn["y"]["fn"].base_dist.loc - z).abs().max() < 10
    check_pair(model, guide, x, z)
    assert list(run(guide, x)) == ["z", "y"]
    guide.names = ("x", "z", "y")
    assert not run(guide, x, z, z)  # nothing to draw: the model is not run, and takes no y


def family_of(p: Any) -> Any:
    """A story of a latent from p, observed by one normal."""

    def story(self: Any, x: Tensor | None) -> Tensor:
        z = pyro.sample("z", p)
        return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return story


def enumerated(self: Any, x: Tensor | None) -> Tensor:
    y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
    z = pyro.sample("z", dist.Normal(y[..., None] * torch.ones(2), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_models_and_encoders_that_do_not_fit_are_refused(program: Any) -> None:
    x = torch.zeros(3, 2)
    refused = {
        "LogNormal": dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
        "MultivariateNormal": dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        "Dirichlet": dist.Dirichlet(torch.ones(2)),
    }
    for family, p in refused.items():
        with pytest.raises(PairError, match=f"TopDown: site 'z' is {family}, .*MeanField"):
            TopDown(program(family_of(p)), MLP(2, 4), x)
    with pytest.raises(PairError, match="site 'y' is enumerated, but z may depend on it"):
        TopDown(program(enumerated), MLP(2, 4), x)
    with pytest.raises(PairError, match=r"features of 2 levels, the model 3 .*\(z3, z2, z1\)"):
        pair(encoder=MLPLadder(6, 4, 3))
    with pytest.raises(ValueError, match=r"TopDown\(merge='sum'\): expected one of precision, "):
        pair("sum")
    _, guide = pair()
    with pytest.raises(ValueError, match="'x' is missing"):
        guide(n=3)


def deep() -> tuple[DeepLadder, TopDown]:
    model = DeepLadder((1, 6, 2), Bernoulli, depth=2, width=2, latents=1)
    return model, TopDown(model, ConvLadder((1, 6, 2), depth=2, width=2), torch.zeros(1, 12))


PAIRS: dict[str, Callable[[], tuple[GenerativeModel, TopDown]]] = {
    "precision": lambda: pair("precision", MLPLadder(6, 5, 4, 3)),
    "residual": lambda: pair("residual", MLPLadder(6, 5, 4, 3)),
    "deep": deep,
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_recorded_step_gives_the_bits_of_the_eager_one(name: str) -> None:
    model, guide = PAIRS[name]()
    held = parameters(model, guide)

    def step(x: Tensor) -> tuple[Any, list[Tensor | None]]:
        for parameter in held:
            parameter.grad = None
        with own_parameters(model, guide):
            loss = backward(Trace_ELBO(), model, guide, x, total=32)
        return loss, [parameter.grad for parameter in held]

    x = model.simulate(8)["x"]
    with traceable():
        _, graph = record(step, x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected, gradients = step(x)
        torch.manual_seed(seed)
        loss, recorded = graph(x)
        assert float(loss) == float(expected)
        for gradient, other in zip(gradients, recorded, strict=True):
            assert gradient is not None
            assert torch.equal(gradient, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_compiled_steps_lead_where_eager_ones_do(name: str) -> None:
    def trained(compile: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model, guide = PAIRS[name]()
        x = model.simulate(8)["x"]
        held = parameters(model, guide)
        adam = torch.optim.Adam(held, 1e-2, fused=True)
        svi = SVI(model, guide, adam, Trace_ELBO(), compile=compile)
        torch.manual_seed(1)
        losses = [svi.step(x, total=32) for _ in range(30)]
        assert (svi.compile_seconds > 0) is compile
        assert not svi.refused
        return losses, list(held)

    (losses, held), (expected, expected_held) = trained(True), trained(False)
    assert losses == pytest.approx(expected, rel=1e-9)
    for one, other in zip(held, expected_held, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
