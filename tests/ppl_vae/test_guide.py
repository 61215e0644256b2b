from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from ppl_vae.conditionals import Conditional, Normal
from ppl_vae.guide import AmortizedGuide, Factorized, unconstrained_size
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.model import GenerativeModel
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP
from ppl_vae.sites import PairError, read_sites
from ppl_vae.svi import SVI, parameters

pytestmark = pytest.mark.usefixtures("float64")
ROWS, X, Y, Z = 4, 5, 3, 2


class Categorical(Conditional):
    def distribution(self, parameters):
        return dist.OneHotCategorical(logits=parameters)


@pytest.fixture
def m2_guide():
    """The example of Factorized's docstring: q(y | x) q(z | x, y)."""
    q_y, q_z = Categorical(nn.Linear(X, Y)), Normal(nn.Linear(X + Y, 2 * Z))
    return Factorized(y=(q_y, ["x"]), z=(q_z, ["x", "y"]))


def traced(guide, *args, **kwargs):
    nodes = poutine.trace(guide).get_trace(*args, **kwargs).nodes
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and name != "data" and not node["infer"].get("is_auxiliary")
    }


def labels():
    return torch.eye(Y)[[0, 2, 1, 1]]


def test_factorized_draws_in_order_each_site_from_its_context(m2_guide):
    x = torch.randn(ROWS, X)
    drawn = traced(m2_guide, x, total=10)
    assert list(drawn) == ["y", "z"]
    y, z = (drawn[name]["value"] for name in "yz")
    assert (y.shape, z.shape) == ((ROWS, Y), (ROWS, Z))
    assert {node["scale"] for node in drawn.values()} == {2.5}
    q_y, q_z = m2_guide.conditionals["y"], m2_guide.conditionals["z"]
    torch.testing.assert_close(drawn["y"]["fn"].log_prob(y), q_y(x).log_prob(y))
    context = torch.cat([x, y], -1)  # joined in the order of names
    torch.testing.assert_close(drawn["z"]["fn"].log_prob(z), q_z(context).log_prob(z))


@pytest.mark.parametrize("positional", [True, False])
def test_a_given_site_is_not_drawn(m2_guide, positional):
    x, y = torch.randn(ROWS, X), labels()
    args, kwargs = ((x, y), {}) if positional else ((), {"y": y, "x": x})
    drawn = traced(m2_guide, *args, **kwargs)
    assert list(drawn) == ["z"]
    expected = m2_guide.conditionals["z"](torch.cat([x, y], -1))
    torch.testing.assert_close(drawn["z"]["fn"].base_dist.loc, expected.base_dist.loc)
    values = m2_guide(*args, **kwargs)
    assert values["y"] is y
    assert set(values) == {"x", "y", "z"}
    assert list(traced(m2_guide, x, None)) == ["y", "z"]  # None: not given


def test_a_missing_context_is_named(m2_guide):
    with pytest.raises(ValueError, match="site 'y' is conditioned on 'x': give it"):
        m2_guide(n=3)
    with pytest.raises(ValueError, match="site 'z' is conditioned on 'x': give it"):
        m2_guide(y=labels())
    with pytest.raises(TypeError, match="observable sites are x, y, z"):
        m2_guide(torch.zeros(ROWS, X), labels(), None, labels())


def test_what_no_site_is_conditioned_on_is_ignored(m2_guide):
    """The model may observe more than the guide."""
    more = m2_guide(x=torch.zeros(ROWS, X), y=labels(), w=torch.zeros(ROWS))
    assert {"x", "y", "z"} <= set(more)


@pytest.mark.parametrize(
    ("contexts", "late"),
    [({"z": ["x", "z"]}, "'z' is conditioned on 'z'"), ({"z": ["y"], "y": ["x"]}, "'z'.* on 'y'")],
)
def test_a_site_cannot_be_conditioned_on_a_later_one(contexts, late):
    sites = {name: (Normal(nn.Linear(1, 2)), context) for name, context in contexts.items()}
    with pytest.raises(ValueError, match=f"{late}, which is not drawn before it"):
        Factorized(**sites)


def test_posterior_of_factorized_is_that_of_its_only_site(m2_guide):
    q = Normal(nn.Linear(X, 2 * Z))
    x, z = torch.randn(ROWS, X), torch.randn(ROWS, Z)
    posterior = Factorized(z=(q, ["x"])).posterior(x)
    torch.testing.assert_close(posterior.log_prob(z), q(x).log_prob(z))
    with pytest.raises(TypeError, match="one site expected, found y, z"):
        m2_guide.posterior(x)


class M2(GenerativeModel):
    """y ~ OneHotCategorical, given or latent; z ~ Normal(0, I); x ~ Normal([y z], 1)."""

    def __init__(self, **infer):
        super().__init__()
        self.infer = infer

    def forward(self, x=None, y=None, *, n=None, total=None):
        with self.rows(x, y, n=n, total=total):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(Y)), obs=y, infer=self.infer)
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            loc = torch.cat(torch.broadcast_tensors(y[..., :Z], z), -1)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def test_an_amortized_guide_takes_what_the_example_gives_as_context():
    x, y = torch.randn(ROWS, 2 * Z), labels()
    guide = MeanField(M2(), MLP(2 * Z + Y, 7, 6), x, y)
    assert (guide.context, guide.features, list(guide.local_sites)) == (("x", "y"), 6, ["z"])
    drawn = traced(guide, y=y, x=x, total=8)
    assert list(drawn) == ["z"]
    assert drawn["z"]["scale"] == 2.0
    torch.testing.assert_close(guide.encode({"y": y, "x": x}), guide.encoder(torch.cat([x, y], 1)))
    for missing in ({"x": x}, {"x": x, "y": None}):
        with pytest.raises(ValueError, match="MeanField was built on x, y; 'y' is missing"):
            guide(**missing)


def test_enumerated_sites_are_left_out_and_latent_ones_that_are_given_not_drawn():
    x = torch.randn(ROWS, 2 * Z)
    guide = MeanField(M2(enumerate="parallel"), MLP(2 * Z, 6), x)
    assert list(traced(guide, x)) == ["z"]
    assert list(traced(guide, x, labels())) == ["z"]
    model = PPCA(Z, X)
    given = FullRank(model, MLP(X, 6), torch.zeros(1, X))
    given.names = ("x", "z")  # a model that could observe z too
    assert not traced(given, torch.zeros(3, X), torch.zeros(3, Z))


def nested(self, x):
    with pyro.plate("parts", 2, dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("family", [MeanField, FullRank])
def test_guides_refuse_models_that_they_cannot_cover(family, program):
    x = torch.randn(ROWS, 2 * Z)
    name = family.__name__
    if family is FullRank:
        with pytest.raises(PairError, match=r"FullRank: site 'y' is discrete \(OneHotC.*MeanField"):
            family(M2(), MLP(2 * Z, 6), x)
    with pytest.raises(PairError, match=rf"{name}: site 'z' stands in plates .*parts.*\.to_event"):
        family(program(nested), MLP(2, 6), x[:, :2])
    with pytest.raises(ValueError, match=f"{name}: give an example batch of x, y"):
        family(M2(), MLP(2 * Z, 6))
    with pytest.raises(TypeError, match="observable sites are x, y"):
        family(M2(), MLP(2 * Z, 6), label=x)


@pytest.fixture
def template():
    torch.manual_seed(0)
    model = Template.toy()
    x = model.simulate(ROWS)["x"].double()
    before = torch.random.get_rng_state()
    guide = MeanField(model, nn.Linear(4, 6, bias=False), x=x)
    return model, guide, x, before


def test_global_sites_get_a_normal_whose_parameters_exist_at_once(template):
    model, guide, x, _ = template
    assert guide.global_sites == ("w",)
    held = {name for name, _ in guide.named_parameters() if name.startswith("global_guide")}
    assert held == {f"global_guide.{part}.w_unconstrained" for part in ("locs", "scales")}
    assert not list(pyro.get_param_store())
    held = parameters(model, guide)
    start = [p.detach().clone() for p in held]
    SVI(model, guide, torch.optim.SGD(held, 0.01), TraceMeanField_ELBO()).step(x, total=9)
    assert all(not torch.equal(p, s) for p, s in zip(held, start, strict=True))
    assert not any(model is module for module in guide.modules())
    drawn = traced(guide, x, total=2 * ROWS)
    assert list(drawn) == ["w", "z"]
    assert [(d["scale"], tuple(d["value"].shape)) for d in drawn.values()] == [
        (1.0, (4,)),
        (2.0, (ROWS, 1)),
    ]
    assert list(traced(guide, x[:2])) == ["w", "z"]  # another number of rows than the example


def test_only_a_family_with_a_closed_form_has_a_posterior(template):
    _, guide, x, _ = template
    q = guide.posterior(x)
    assert (q.batch_shape, q.event_shape) == ((ROWS,), (1,))  # the one local site

    class Silent(AmortizedGuide):
        def build(self):
            pass

        def sample_rows(self, features, given):
            pass

    model, example = PPCA(Z, X), torch.zeros(2, X)
    with pytest.raises(TypeError, match="Silent has no tractable posterior"):
        Silent(model, MLP(X, 2), example).posterior(example)


def two_latents(self, x):
    for name in ("z1", "z2"):
        pyro.sample(name, dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def summed_latent(self, x):
    y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    return pyro.sample("x", dist.Normal(y.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("story", "found"), [(two_latents, "z1, z2"), (summed_latent, "none")], ids=["two", "none"]
)
def test_a_posterior_needs_one_local_site(program, story, found):
    x = torch.zeros(3, 2)
    guide = MeanField(program(story), MLP(2, 4), x)
    with pytest.raises(TypeError, match=f"one local site expected, found {found}"):
        guide.posterior(x)


def test_unconstrained_size_counts_free_coordinates(program):
    sites = read_sites(program(two_latents), n=3)
    assert [unconstrained_size(site) for site in sites.values()] == [4, 4, 2]


def test_an_observable_of_one_number_a_row_is_refused():
    """Joined as it is, a vector of labels would be appended to every row."""
    model = PPCA(2, X)
    with pytest.raises(PairError, match=r"'x' has shape \(4,\).*needs vectors"):
        MeanField(model, MLP(X, 4), torch.zeros(4))
