"""What every model, every guide and every pair of them must do: one suite over all discovered.

A new file in ``models/`` or ``guides/`` is in it without a line here. ``TwoLevels`` and ``Labeled``
stand for stories that the zoo does not tell.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Self

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn

from ppl_vae import zoo
from ppl_vae.checks.aggregate_posterior import aggregate_posterior
from ppl_vae.checks.generalization import generalization
from ppl_vae.checks.latent_use import latent_use
from ppl_vae.checks.result import CheckResult
from ppl_vae.checks.row_order import row_order
from ppl_vae.checks.structure import structure
from ppl_vae.conditionals import Normal, join
from ppl_vae.guide import AmortizedGuide, Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.loop import load_weights, weights
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.models._template import Template
from ppl_vae.nn import MLP
from ppl_vae.objectives import backward, plain_elbo
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError, Site, check_pair, paired_traces, read_sites


class TwoLevels(GenerativeModel):
    """A latent above a latent.

    z2_n ~ Normal(0, I)         # top       data | A
    z1_n ~ Normal(f(z2_n))      # latent    data | B
    x_n  ~ Bernoulli(g(z1_n))   # image     data | D
    """

    def __init__(self) -> None:
        super().__init__()
        self.prior = StandardNormal(2)
        self.middle = Normal(MLP(2, 8, 6))
        self.likelihood = Bernoulli(MLP(3, 8, 5))

    def z2_dist(self) -> TorchDistribution:
        return self.prior()

    def z1_dist(self, z2: Tensor) -> TorchDistribution:
        return self.middle(z2)

    def x_dist(self, z1: Tensor) -> TorchDistribution:
        return self.likelihood(z1)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> None:
        with self.rows(x, n=n, total=total):
            z2 = pyro.sample("z2", self.z2_dist())
            z1 = pyro.sample("z1", self.z1_dist(z2))
            pyro.sample("x", self.x_dist(z1), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls()


class Labeled(GenerativeModel):
    """Two observables, two local latents on different supports, and a global one.

    w   ~ Normal(0, I)              # offset    | D
    y_n ~ Normal(0, I)              # labels    data | K
    s_n ~ Dirichlet(1)              # shares    data | 3
    z_n ~ LogNormal(0, I)           # scale     data | 1
    x_n ~ Normal(f(y, s, z) + w, 1) # data      data | D
    """

    ones: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.decoder = MLP(2 + 3 + 1, 8, 4)
        self.register_buffer("ones", torch.ones(4))

    def w_dist(self) -> TorchDistribution:
        return dist.Normal(0 * self.ones, self.ones).to_event(1)

    def y_dist(self) -> TorchDistribution:
        return dist.Normal(0 * self.ones[:2], self.ones[:2]).to_event(1)

    def s_dist(self) -> TorchDistribution:
        return dist.Dirichlet(self.ones[:3])

    def z_dist(self) -> TorchDistribution:
        return dist.LogNormal(0 * self.ones[:1], self.ones[:1]).to_event(1)

    def x_dist(self, w: Tensor, y: Tensor, s: Tensor, z: Tensor) -> TorchDistribution:
        return dist.Normal(self.decoder(join(y, s, z)) + w, self.ones).to_event(1)

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        n: int | None = None,
        total: int | None = None,
    ) -> None:
        w = pyro.sample("w", self.w_dist())
        with self.rows(x, y, n=n, total=total):
            y = pyro.sample("y", self.y_dist(), obs=y)
            s = pyro.sample("s", self.s_dist())
            z = pyro.sample("z", self.z_dist())
            pyro.sample("x", self.x_dist(w, y, s, z), obs=x)

    @classmethod
    def toy(cls) -> Self:
        return cls()


MODELS: dict[str, type[GenerativeModel]] = {
    **zoo.models(),
    **{model.__name__: model for model in (Template, TwoLevels, Labeled)},
}
GUIDES = zoo.guides()
PAIRS = list(product(MODELS, GUIDES))
N = 6  # rows

model_names = pytest.mark.parametrize("name", MODELS)
pairs = pytest.mark.parametrize(("model_name", "guide_name"), PAIRS)

Pair = tuple[GenerativeModel, AmortizedGuide, dict[str, Tensor]]
Line = tuple[str, str, str, str]  # of a story: site, index, plate, event shape


def simulated(model: GenerativeModel) -> dict[str, Tensor]:
    """N rows of a toy, given its example covariates, which are among them."""
    return model.simulate(N, **model.example_covariates(N))


def build(model_name: str, guide_name: str) -> Pair:
    """A toy pair in float64, with data that the model itself emitted.

    Skips a model that no derived guide covers: such a one comes with a guide of its own.
    """
    torch.manual_seed(0)
    model = MODELS[model_name].toy().double()
    data = model.observed(simulated(model))
    latent = [s for s in read_sites(model, **data).values() if not s.observed]
    if summed := [s.name for s in latent if s.enumerated]:
        pytest.skip(f"the model sums over {', '.join(summed)}, which derived guides leave out")
    if flat := [name for name, x in data.items() if x.dim() < 2]:
        pytest.skip(f"no vectors, which derived guides are conditioned on: {', '.join(flat)}")
    if not any(site.local for site in latent):
        pytest.skip("no local latent, which derived guides amortize")
    width = sum(x.shape[-1] for x in data.values())
    try:
        guide = GUIDES[guide_name](model, MLP(width, 8, 7).double(), **data)
    except PairError as error:
        pytest.skip(f"refused: {error}")
    return model, guide.double(), data


def log_joint(model: GenerativeModel, values: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with own_parameters(model):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(**kwargs)
    return trace.log_prob_sum()


# -- models ------------------------------------------------------------------------------------


def by_level(story: list[Line], sites: dict[str, Site]) -> Iterator[Line]:
    """A story in which a line for all levels, such as ``z{l}``, stands once for each of them."""
    for name, index, plate, symbols in story:
        if (levels := re.fullmatch(r"(\w+){(\w)}", name)) is None:
            yield name, index, plate, symbols
            continue
        stem, letter = levels.groups()
        count = sum(re.fullmatch(rf"{stem}\d+", site) is not None for site in sites)
        for level in range(count, 0, -1):
            own = re.sub(rf"_{letter}\b", f"_{level}", symbols)
            yield f"{stem}{level}", index, plate, own


def context_of(name: str, method: Callable[..., Any], drawn: dict[str, Tensor]) -> list[Any]:
    """The arguments of a site's method, by their names: sites drawn before, and covariates."""
    context: list[Any] = []
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            context += [z for site, z in drawn.items() if site[-1].isdigit()]
        elif parameter.name == "level":
            context.append(int(re.sub(r"\D", "", name)))
        else:
            context.append(drawn[parameter.name])
    return context


@model_names
def test_story_says_which_plates_and_shapes_the_sites_have(name: str) -> None:
    model = MODELS[name].toy()
    lines: list[Line] = re.findall(
        r"^ *(\w+?(?:{\w})?)(_n)? +~ [^#]+# +\S[^|]*?(\w+)? *\| *([^\n]*)$",
        inspect.getdoc(model) or "",
        re.M,
    )
    sites = read_sites(model, n=N, **model.example_covariates(N))
    story = list(by_level(lines, sites))
    assert [line[0] for line in story] == list(sites), "one line a site, in the order of sampling"
    sizes: dict[str, int] = {}
    for site_name, index, plate, symbols in story:
        site = sites[site_name]
        assert site.plates == ((ROWS,) if index else ())
        assert (plate == ROWS) == bool(index)
        event = [s.strip() for s in symbols.split(",") if s.strip()]
        assert len(event) == len(site.event_shape), site_name
        for symbol, size in zip(event, site.event_shape, strict=True):
            expected = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size)
            assert size == expected, f"{symbol} of {site_name}"


@model_names
def test_each_site_has_a_method_that_returns_its_distribution(name: str) -> None:
    model = MODELS[name].toy()
    drawn = model.example_covariates(N)
    with own_parameters(model):
        trace = poutine.trace(model).get_trace(n=N, **drawn)
    for site_name, node in sample_nodes(trace):
        stem = site_name.rstrip("0123456789")  # one method may serve all levels
        method = getattr(model, f"{site_name}_dist", None) or getattr(model, f"{stem}_dist")
        again = method(*context_of(site_name, method, drawn))
        torch.testing.assert_close(
            again.log_prob(node["value"]), node["fn"].log_prob(node["value"])
        )
        drawn[site_name] = node["value"]


@model_names
def test_observables_are_sites_and_simulate_draws_them(name: str) -> None:
    model = MODELS[name].toy()
    given = model.example_covariates(N)
    draws = model.simulate(N, **given)
    # Given the draws, since a support may depend on them.
    sites = read_sites(poutine.condition(model, draws), n=N, **given)
    assert set(model.observables) <= set(sites)
    assert set(draws) == {*sites, *model.covariates}
    assert not set(sites) & set(model.covariates)
    for site_name, site in sites.items():
        expected = ((N,) if site.local else ()) + tuple(site.event_shape)
        assert tuple(draws[site_name].shape) == expected
        assert site.support.check(draws[site_name]).all()
    for x in model.observables:
        observed = [
            s.name for s in read_sites(model, **given, **{x: draws[x]}).values() if s.observed
        ]
        assert observed == [x]


@model_names
def test_batches_scaled_by_total_average_to_the_whole(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name].toy().double()
    given = model.example_covariates(N)
    values = model.simulate(N, **given)
    sites = read_sites(model, n=N, **given)
    whole = log_joint(model, values, n=N, **given)
    parts = []
    for rows in torch.arange(N).split(2):
        part = {k: v[rows] if sites[k].local else v for k, v in values.items() if k in sites}
        few = {name: value[rows] for name, value in given.items()}
        parts.append(log_joint(model, part, n=2, total=N, **few))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@model_names
def test_predictive_draws_in_parallel_as_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name].toy().double()
    covariates = model.example_covariates(N)
    sites = read_sites(model, n=N, **covariates)
    runs = [model.simulate(N, **covariates) for _ in range(3)]
    # Predictive's samples stand outside the plates: a global site needs a dim for the rows.
    samples = {
        s: torch.stack([r[s] if site.local else r[s].unsqueeze(0) for r in runs])
        for s, site in sites.items()
    }
    for x in model.observables:
        given = [s for s in sites if s != x]
        predict = {s: samples[s] for s in given}
        with own_parameters(model):
            predictive = Predictive(model, predict, num_samples=3, parallel=True)
            together = predictive.get_vectorized_trace(n=N, **covariates)
            for i, run in enumerate(runs):
                alone = poutine.condition(model, {s: run[s] for s in given})
                torch.testing.assert_close(
                    together.nodes[x]["fn"].log_prob(run[x]).reshape(3, N)[i],
                    poutine.trace(alone)
                    .get_trace(n=N, **covariates)
                    .nodes[x]["fn"]
                    .log_prob(run[x]),
                )
            drawn = Predictive(model, predict, num_samples=3)(n=N, **covariates)
        assert drawn[x].shape == (3, *runs[0][x].shape)


# -- pairs -------------------------------------------------------------------------------------


@pairs
def test_a_guide_that_refuses_a_model_names_the_site(model_name: str, guide_name: str) -> None:
    """Mean field refuses none, full rank discrete ones; others say what they cannot cover."""
    torch.manual_seed(0)
    model = MODELS[model_name].toy()
    data = model.observed(simulated(model))
    if all(site.observed for site in read_sites(model, **data).values()):
        pytest.skip("no latent: nothing for a guide to draw")
    why = ""
    try:
        GUIDES[guide_name](model, MLP(sum(x.shape[-1] for x in data.values()), 8), **data)
    except PairError as error:
        why = str(error)
    if why:
        sites = read_sites(model, **data)
        latent = {name: site for name, site in sites.items() if not site.observed}
        continuous = not any(site.support.is_discrete for site in latent.values())
        assert guide_name not in ("MeanField", *(["FullRank"] if continuous else []))
        assert any(f"'{name}'" in why for name in latent)


@pairs
def test_pair_fits_together(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    check_pair(model, guide, **data, total=10 * N)


@pairs
def test_every_parameter_gets_a_gradient(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    with own_parameters(model, guide):
        backward(plain_elbo(model, guide, **data), model, guide, **data)
    for role, module in (("model", model), ("guide", guide)):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{role}.{name}"
            assert parameter.grad.isfinite().all(), f"{role}.{name}"
            assert parameter.grad.any(), f"{role}.{name}"


@pairs
def test_the_check_of_structure_finds_no_fault(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    if "y" in data:
        if model.classes is None:
            pytest.skip("a data set holds labels as numbers")
        data["y"] = data["y"].argmax(1)
    result = structure(model, guide, {"train": data, "test": data})
    assert result.passed, result.meaning
    assert all(r["verdict"] != "not applicable" for r in result.statistics)


@pytest.mark.slow
@pytest.mark.parametrize("check", [generalization, latent_use, aggregate_posterior, row_order])
@pairs
def test_checks_of_rows_run_on_every_pair(
    check: Callable[..., CheckResult], model_name: str, guide_name: str
) -> None:
    model, guide, _ = build(model_name, guide_name)
    data = model.observed(model.simulate(100, **model.example_covariates(100)))
    if "y" in data:
        if model.classes is None:
            pytest.skip("a data set holds labels as numbers")
        data["y"] = data["y"].argmax(1)
    splits = {
        name: {column: values[rows] for column, values in data.items()}
        for name, rows in (("train", slice(50)), ("test", slice(50, 100)))
    }
    result = check(model, guide, splits)
    json.dumps(result.to_json(), allow_nan=False)
    for name in result.pictures:
        assert result.plot(name).axes


@pairs
def test_loss_is_linear_in_total(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    losses = []
    for total in (N, 2 * N, 3 * N):
        torch.manual_seed(1)
        with own_parameters(model, guide):
            losses.append(Trace_ELBO().loss(model, guide, **data, total=total))
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-10)
    sites = read_sites(model, **data).values()
    if all(site.local for site in sites):
        assert losses[1] == pytest.approx(2 * losses[0], rel=1e-10)


@pairs
def test_vectorized_particles_equal_looped_ones(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    particles = pyro.plate("particles", 4, dim=-2)
    with own_parameters(model, guide):
        model_trace, guide_trace = paired_traces(particles(model), particles(guide), **data)
        drawn = dict(sample_nodes(guide_trace))
        for i in range(4):
            values = {}
            for name, node in drawn.items():
                local = any(frame.name == ROWS for frame in node["cond_indep_stack"])
                values[name] = node["value"][i] if local else node["value"][i].squeeze(0)
            alone = [
                poutine.trace(poutine.condition(program, values)).get_trace(**data)
                for program in (model, guide)
            ]
            for together, one in zip((model_trace, guide_trace), alone, strict=True):
                for name, node in sample_nodes(one):
                    vectorized = together.nodes[name]
                    torch.testing.assert_close(
                        vectorized["fn"].log_prob(vectorized["value"])[i].reshape(-1),
                        node["fn"].log_prob(node["value"]).reshape(-1),
                    )


@pairs
def test_saved_weights_give_the_same_loss(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    torch.manual_seed(7)
    other = MODELS[model_name].toy().double()
    other_guide = GUIDES[guide_name](
        other, MLP(guide.encoder.inputs, 8, 7).double(), **data
    ).double()
    losses = []
    for before in (True, False):
        for pair in ((model, guide), (other, other_guide)):
            torch.manual_seed(1)
            with own_parameters(*pair):
                losses.append(Trace_ELBO().loss(*pair, **data))
        if before:
            load_weights(other, other_guide, weights(model, guide))
    assert losses[0] != losses[1], "different weights to begin with"
    assert losses[0] == losses[2] == losses[3]


@pairs
def test_posterior_is_what_the_guide_draws_from(model_name: str, guide_name: str) -> None:
    """In closed form for one local site, where the family has it; else refused."""
    model, guide, data = build(model_name, guide_name)
    if len(guide.local_sites) != 1 or type(guide).posterior is AmortizedGuide.posterior:
        with pytest.raises(TypeError, match=r"one local site|no tractable posterior"):
            guide.posterior(**data)
        return
    with own_parameters(model, guide):
        trace = poutine.trace(guide).get_trace(**data)
    (name,) = guide.local_sites
    node = trace.nodes[name]
    torch.testing.assert_close(
        guide.posterior(**data).log_prob(node["value"]), node["fn"].log_prob(node["value"])
    )


@pairs
def test_a_guide_without_one_of_the_sites_is_refused(model_name: str, guide_name: str) -> None:
    model, guide, data = build(model_name, guide_name)
    for site in (*guide.local_sites, *guide.global_sites):
        with pytest.raises(PairError, match=f"no site '{site}', which is latent in the model"):
            check_pair(model, poutine.block(guide, hide=[site]), **data)


@model_names
def test_a_guide_of_another_support_is_refused(name: str) -> None:
    """Far off on the real line for a bounded site, in a small interval of it for a real one."""

    class Elsewhere(nn.Module):
        def __init__(self, site: Site) -> None:
            super().__init__()
            self.shape = site.event_shape
            real = site.support.check(torch.full(self.shape, -1e3)).all()
            self.family = dist.Uniform(1e3, 1e3 + 1) if real else dist.Normal(-1e3, 1.0)

        def forward(self, x: Tensor, *others: Tensor) -> Any:
            return self.family.expand([len(x), *self.shape]).to_event(len(self.shape))

    torch.manual_seed(0)
    model = MODELS[name].toy().double()
    data = model.observed(simulated(model))
    sites = [s for s in read_sites(model, **data).values() if not s.observed]
    for site in sites:
        if not site.local or site.support.is_discrete:
            continue
        wrong = Factorized(**{site.name: (Elsewhere(site), list(data))})
        # The other sites are not the point here.
        alone = poutine.block(model, hide=[s.name for s in sites if s is not site])
        with pytest.raises(PairError, match=r"outside the (model|guide)'s support"):
            check_pair(alone, wrong, **data)
