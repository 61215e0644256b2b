from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_vae.conditionals import Normal, constrained
from ppl_vae.evaluation import evaluate
from ppl_vae.flow import FlowNormal
from ppl_vae.flows import Coupling, InverseAutoregressive, Planar
from ppl_vae.guide import Factorized
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.loop import load_weights, weights
from ppl_vae.mixtures import Mixture, MixtureOfGaussians, VampPrior
from ppl_vae.model import own_parameters, sample_nodes
from ppl_vae.models.hierarchy import Hierarchy
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward, plain_elbo
from ppl_vae.priors import StandardNormal
from ppl_vae.recorded import RecordedStep
from ppl_vae.signature import Signature
from ppl_vae.sites import PairError, check_pair, paired_traces
from ppl_vae.svi import SVI, parameters

pytestmark = pytest.mark.usefixtures("float64")

D, Z, K, N = 4, 2, 3, 6


class Flow(nn.Module):
    """A normal of x, then a transform that a module gives, of x too if it is conditional."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.base, self.transform = Normal(MLP(D, 5, 2 * Z)), transform

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        condition = getattr(self.transform, "condition", lambda _: self.transform)
        return dist.TransformedDistribution(self.base(x), [condition(x)])


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = Normal(MLP(D, 5, 2 * Z))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        support = dist.constraints.independent(dist.constraints.positive, 1)
        return constrained(self.base(x), support, torch.Size([Z]))


def derived(family: type) -> Callable[[Tensor], dist.TorchDistribution]:
    model = VAE(StandardNormal(Z), Bernoulli(MLP(Z, 5, D)))
    return family(model, MLP(D, 5, 7), torch.zeros(2, D)).posterior


POSTERIORS = {
    "conditional": lambda: Normal(MLP(D, 5, 2 * Z)),
    "of MeanField": partial(derived, MeanField),
    "of FullRank": partial(derived, FullRank),
    "of Factorized": lambda: Factorized(z=(Normal(MLP(D, 5, 2 * Z)), ["x"])).posterior,
    "Pyro's autoregressive flow": lambda: Flow(transforms.conditional_affine_autoregressive(Z, D)),
    **{
        flow.__name__: lambda flow=flow: FlowNormal(MLP(D, 5, 2 * Z), flow(Z, D, layers=2))
        for flow in (InverseAutoregressive, Coupling)
    },
    "on another support": Positive,
}
posteriors = pytest.mark.parametrize("name", POSTERIORS)


def uneven(prior: nn.Module) -> None:
    with torch.no_grad():
        prior.logits += torch.arange(float(K))


def pair(learned_weights: bool = False) -> tuple[VAE, MeanField, Tensor]:
    """A VAE with a VampPrior of its derived guide."""
    model = VAE(StandardNormal(Z), Bernoulli(MLP(Z, 5, D)))
    x = torch.randint(2, (N, D)).double()
    guide = MeanField(model, MLP(D, 5, 7), x)
    model.prior = VampPrior(guide.posterior, torch.rand(K, D), learned_weights=learned_weights)
    return model, guide, x


@posteriors
@pytest.mark.parametrize("learned", [False, True])
def test_density_is_the_weighted_sum_over_posteriors_at_pseudo_inputs(
    name: str, learned: bool
) -> None:
    posterior = POSTERIORS[name]()
    prior = VampPrior(posterior, torch.rand(K, D), learned_weights=learned)
    if learned:
        uneven(prior)
    p = prior()
    assert (p.batch_shape, p.event_shape) == ((), (Z,))
    for shape in ((), (5,), (3, 5)):
        z = p.sample(shape)
        rows = z.reshape(-1, Z)
        w = torch.tensor([1.0, math.e, math.e**2]) if learned else torch.ones(K)
        density = sum(
            w[k] / w.sum() * posterior(prior.pseudo_inputs[k : k + 1]).log_prob(rows).exp()
            for k in range(K)
        )
        assert z.shape == (*shape, Z)
        torch.testing.assert_close(p.log_prob(z), density.log().reshape(shape))
        wide = p.expand((3, 5))
        assert wide.sample().shape == (3, 5, Z)
        torch.testing.assert_close(wide.log_prob(z), p.log_prob(z).expand(3, 5))


def test_mixture_of_gaussians_is_torchs() -> None:
    prior = MixtureOfGaussians(Z, K)
    uneven(prior)
    components = dist.Normal(prior.loc, prior.log_scale.exp()).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits), components)
    z = torch.randn(7, 5, Z)
    torch.testing.assert_close(prior().log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(
        [*torch.autograd.grad(prior().log_prob(z).sum(), [*prior.parameters()])],
        [*torch.autograd.grad(expected.log_prob(z).sum(), [*prior.parameters()])],
    )


def test_narrow_normals_far_from_0_lose_nothing_in_single_precision() -> None:
    """Their squares written out do: 1e7 less 1e7, in float32."""
    loc = (30 + torch.randn(9, 4)).float()
    scale = torch.full_like(loc, 0.01)
    value = loc + scale * torch.randn(9, 4).float()

    def mixture(kind: type, dtype: torch.dtype) -> Tensor:
        components = dist.Normal(loc.to(dtype), scale.to(dtype)).to_event(1)
        weights = torch.zeros(9, dtype=dtype)
        if kind is Mixture:
            return Mixture(weights, components, lambda _: components).log_prob(value.to(dtype))
        logits = dist.Categorical(logits=weights)
        return dist.MixtureSameFamily(logits, components).log_prob(value.to(dtype))

    found = mixture(Mixture, torch.float32)
    assert found.dtype == torch.float32
    exact = mixture(dist.MixtureSameFamily, torch.float64)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_mixture_of_gaussians_starts_spread_with_unit_variance() -> None:
    z = MixtureOfGaussians(1, 20_000)().sample((20_000,))
    assert z.var().item() == pytest.approx(1, abs=0.05)
    assert MixtureOfGaussians(1, 20_000).loc.var().item() == pytest.approx(0.5, abs=0.03)


PRIORS = {
    "MixtureOfGaussians": lambda: MixtureOfGaussians(Z, K),
    **{
        f"VampPrior {name}": lambda make=make: VampPrior(
            make(), 3 * torch.rand(K, D), learned_weights=True, bounds=(0, 3)
        )
        for name, make in POSTERIORS.items()
        if name != "on another support"
    },
}
priors = pytest.mark.parametrize("name", PRIORS)


@priors
def test_density_integrates_to_one(name: str) -> None:
    prior = PRIORS[name]()
    uneven(prior)
    axis = torch.linspace(-12, 12, 241)
    grid = torch.cartesian_prod(axis, axis)
    mass = prior().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["MixtureOfGaussians", "VampPrior conditional"])
def test_draws_have_the_moments_of_the_mixture(name: str) -> None:
    prior = PRIORS[name]()
    uneven(prior)
    p, draws = prior(), 40_000
    w = prior.logits.softmax(-1).unsqueeze(-1)
    loc, scale = p.components.base_dist.loc, p.components.base_dist.scale
    mean = (w * loc).sum(0)
    second = torch.einsum("k,ki,kj->ij", w[:, 0], loc, loc) + torch.diag((w * scale**2).sum(0))
    for z in (p.sample((draws,)), p.expand((draws,)).sample()):
        error = second.diagonal().sqrt() / math.sqrt(draws)
        assert ((z.mean(0) - mean).abs() < 5 * error).all()
        torch.testing.assert_close(z.T @ z / draws, second, rtol=0.05, atol=0.02)


def test_posteriors_parameters_get_gradients_and_stay_the_guides() -> None:
    model, guide, x = pair(learned_weights=True)
    assert set(model.prior.state_dict()) == {"pseudo_inputs", "logits"}
    assert set(dict(model.prior.named_parameters())) == {"pseudo_inputs", "logits"}
    trained = parameters(model, guide)
    assert len(trained) == len({*map(id, trained)})
    assert {*map(id, trained)} == {id(p) for m in (model, guide) for p in m.parameters()}
    z = torch.randn(5, Z)
    (-model.prior().log_prob(z).sum()).backward()
    through = [*model.prior.parameters(), *guide.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in through)
    with own_parameters(model, guide):
        backward(plain_elbo(model, guide, x), model, guide, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_equal_weights_and_fixed_inputs_are_not_learned() -> None:
    prior = VampPrior(Normal(MLP(D, 2 * Z)), torch.rand(K, D), trainable=False)
    assert not list(prior.parameters())
    assert set(prior.state_dict()) == {"pseudo_inputs"}
    assert prior.float().logits.dtype == torch.float32


def test_an_entry_beyond_a_bound_stands_on_it_and_stays() -> None:
    prior = VampPrior(Normal(nn.Linear(D, 2 * Z)), torch.rand(K, D))
    z = torch.randn(N, Z)
    with torch.no_grad():
        prior.pseudo_inputs[0] = torch.tensor([0.0, 1.0, 0.2, 0.3])
        on_bounds = prior().log_prob(z)
        prior.pseudo_inputs[0] = torch.tensor([-0.5, 1.5, 0.2, 0.3])
    beyond = prior().log_prob(z)
    torch.testing.assert_close(beyond, on_bounds)
    beyond.sum().backward()
    inside = (prior.pseudo_inputs > 0) & (prior.pseudo_inputs < 1)
    assert inside.sum() == K * D - 2
    assert ((prior.pseudo_inputs.grad != 0) == inside).all()


@pytest.mark.parametrize("components", [1, N])
def test_start_from_data_and_from_noise(components: int) -> None:
    x = torch.randint(2, (N, D))
    posterior = Normal(MLP(D, 2 * Z))
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, same = (
        VampPrior.from_data(posterior, x, components, noise=0.0, generator=g) for g in seeded
    )
    torch.testing.assert_close(one.pseudo_inputs, same.pseudo_inputs)
    rows = {tuple(row) for row in x.tolist()}
    assert {tuple(row) for row in one.pseudo_inputs.long().tolist()} <= rows
    if components == N:  # each row once
        assert torch.equal(one.pseudo_inputs.sum(0), x.double().sum(0))
    noisy = VampPrior.from_data(posterior, torch.full((999, D), 0.5), 900, learned_weights=True)
    assert noisy.pseudo_inputs.std().item() == pytest.approx(0.01, rel=0.1)
    assert isinstance(noisy.logits, nn.Parameter)
    bits = VampPrior.from_data(posterior, x, components).pseudo_inputs
    assert ((bits > 0) & (bits < 1)).all(), "reflected, so that each entry can learn"
    noise = VampPrior.from_noise(posterior, D, 999, mean=0.2, noise=0.03).pseudo_inputs
    assert noise.shape == (999, D)
    assert noise.mean().item() == pytest.approx(0.2, abs=0.003)
    assert noise.std().item() == pytest.approx(0.03, rel=0.1)


def test_a_copy_of_model_and_guide_has_the_copied_posterior() -> None:
    model, guide, _ = pair()
    z = torch.randn(N, Z)
    before = model.prior().log_prob(z)
    other, other_guide = copy.deepcopy((model, guide))
    torch.testing.assert_close(other.prior().log_prob(z), before)
    with torch.no_grad():
        for parameter in other_guide.parameters():
            parameter += 0.5
    assert (other.prior().log_prob(z) != before).all()
    torch.testing.assert_close(model.prior().log_prob(z), before)


def test_saved_weights_restore_the_prior() -> None:
    model, guide, _ = pair(learned_weights=True)
    uneven(model.prior)
    other, other_guide, _ = pair(learned_weights=True)
    z = torch.randn(N, Z)
    assert (other.prior().log_prob(z) != model.prior().log_prob(z)).all()
    load_weights(other, other_guide, weights(model, guide))
    torch.testing.assert_close(other.prior().log_prob(z), model.prior().log_prob(z))


def test_particles_are_as_many_runs() -> None:
    model, guide, x = pair()
    particles = pyro.plate("particles", 4, dim=-2)
    with own_parameters(model, guide):
        together, _ = paired_traces(particles(model), particles(guide), x)
    node = dict(sample_nodes(together))["z"]
    assert node["value"].shape == (4, N, Z)
    for i in range(4):
        torch.testing.assert_close(
            node["fn"].log_prob(node["value"])[i], model.z_dist().log_prob(node["value"][i])
        )


@pytest.mark.parametrize("levels", [1, 2])
def test_fits_guides_that_are_written_out(levels: int) -> None:
    top = Normal(MLP(D, 5, 2 * Z))
    prior = VampPrior(top, torch.rand(K, D))
    if levels == 1:
        model = VAE(prior, Bernoulli(MLP(Z, 5, D)))
        guide = Factorized(z=(top, ["x"]))
    else:
        middle = Normal(MLP(Z, 5, 2 * 3))
        model = Hierarchy(prior, [middle], Bernoulli(MLP(Z + 3, 5, D)), skip=True)
        guide = Factorized(z2=(top, ["x"]), z1=(Normal(MLP(D + Z, 5, 2 * 3)), ["x", "z2"]))
    check_pair(model, guide, torch.rand(N, D).round(), total=10 * N)
    assert model.simulate(N)["x"].shape == (N, D)


class Unit(PyroModule):
    """A conditional that states its parameters to Pyro when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroModule[nn.Linear](D, Z)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.loc(x), 1.0).to_event(1)


def test_parameter_statements_of_the_posterior_are_not_the_models(program) -> None:
    def guided(self, x):
        return pyro.sample("z", self.q(x))

    guide = program(guided, q=Unit())
    model = VAE(VampPrior(guide.q, torch.rand(K, D)), Bernoulli(MLP(Z, 5, D)))
    check_pair(model, guide, torch.rand(N, D).round())


def test_evaluation_is_that_of_the_standard_normal_which_the_posteriors_are() -> None:
    model, guide, x = pair()
    with torch.no_grad():
        for parameter in guide.heads.parameters():
            parameter.zero_()
        guide.heads["z"].net.bias[Z:] = math.log(math.e - 1)  # softplus takes it to 1
    plain = VAE(StandardNormal(Z), model.likelihood)
    figures = [
        evaluate(m, guide, {"train": x, "test": x}, samples=3, compile=False)
        for m in (model, plain)
    ]
    assert figures[0].nll == pytest.approx(figures[1].nll, rel=1e-12)
    assert figures[0].kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_can_be_recorded(learned: bool) -> None:
    """Recording compares the graph with an eager step, on other draws."""
    model, guide, x = pair(learned)
    optimizer = torch.optim.Adam(parameters(model, guide), fused=True)
    svi = SVI(model, guide, optimizer, plain_elbo(model, guide, x), compile=False)
    svi.step(x)
    RecordedStep(svi, Signature((x,), {}), varying=False)


@pytest.mark.parametrize(
    "posterior",
    [
        lambda: Flow(transforms.Radial(Z)),
        lambda: Flow(transforms.conditional_planar(Z, D)),
        lambda: FlowNormal(MLP(D, 5, 2 * Z), Planar(Z, D, layers=2)),
    ],
)
def test_flows_that_cannot_score_the_draws_of_others_are_refused(
    posterior: Callable[[], nn.Module],
) -> None:
    with pytest.raises(PairError, match="cannot score a value that it did not draw"):
        VampPrior(posterior(), torch.rand(K, D))


def test_building_leaves_the_random_state() -> None:
    posterior, start = Normal(MLP(D, 2 * Z)), torch.rand(K, D)
    before = torch.get_rng_state()
    VampPrior(posterior, start)
    assert torch.equal(before, torch.get_rng_state())


SOUND = Normal(MLP(4, 2 * Z).double())
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "one row": (lambda: VampPrior(SOUND, torch.rand(D)), r"shape \(4,\); expected \(K, D\)"),
    "images": (lambda: VampPrior(SOUND, torch.rand(2, 1, 2, 2)), "flatten images"),
    "no row": (lambda: VampPrior(SOUND, torch.rand(0, D)), "at least 1 component"),
    "whole numbers": (lambda: VampPrior(SOUND, torch.ones(K, D).long()), "int64 from 1 to 1;"),
    "NaN": (lambda: VampPrior(SOUND, torch.full((K, D), math.nan)), "from nan to nan; .* finite"),
    "bounds": (lambda: VampPrior(SOUND, torch.rand(K, D), bounds=(1, 0)), r"bounds=\(1, 0\)"),
    "out of bounds": (lambda: VampPrior(SOUND, torch.full((K, D), 7.0)), "reach from 7 to 7"),
    "data out of bounds": (
        lambda: VampPrior.from_data(SOUND, torch.full((K, D), 1.5), 2),
        "reach from 1.5 to 1.5; give the data's bounds",
    ),
    "width": (lambda: VampPrior(SOUND, torch.rand(K, 5)), r"does not take .*\(2, 5\)"),
    "batch": (
        lambda: VampPrior(lambda x: dist.Normal(x[:, :2], 1.0), torch.rand(K, D)),
        r"batch shape \(2, 2\); expected \(2,\).*to_event",
    ),
    "no data": (lambda: VampPrior.from_data(SOUND, torch.rand(2, D), 0), "expected 1 to 2"),
    "few data": (lambda: VampPrior.from_data(SOUND, torch.rand(2, D), 3), "expected 1 to 2"),
    "no rows of noise": (lambda: VampPrior.from_noise(SOUND, D, 0), r"shape \(0, 4\)"),
    "no components": (lambda: MixtureOfGaussians(2, 0), "components=0"),
    "no latents": (lambda: MixtureOfGaussians(0, 2), "size=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
