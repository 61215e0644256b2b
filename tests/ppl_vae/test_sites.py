from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroParam
from torch import nn
from torch.distributions import constraints

from ppl_vae.conditionals import entrywise
from ppl_vae.likelihoods import Binomial, ContinuousBernoulli, Gaussian
from ppl_vae.model import sample_nodes
from ppl_vae.models.vae import VAE
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import (
    PairError,
    Site,
    aside,
    check_data,
    check_pair,
    evaluating,
    paired_traces,
    read_sites,
)

pytestmark = pytest.mark.usefixtures("float64")
ROWS = 40
NORMAL, LOGNORMAL = dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)


def offset(self):
    return pyro.sample("w", dist.Gamma(2.0, torch.ones(3)).to_event(1))


def everything(self, x):
    """A site of each kind below the plate of rows."""
    y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)), infer={"enumerate": "parallel"})
    with pyro.plate("channels", 2, dim=-2):
        pyro.sample("k", dist.Poisson(1.0), infer={"is_auxiliary": True})
    z = pyro.sample("z", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))
    loc = z[..., 0, :1] + y[..., :1]
    return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def test_read_sites_shows_each_site_as_it_is(program):
    model = program(everything, offset)
    sites = read_sites(model, x=torch.zeros(5, 1), total=9)
    assert list(sites) == ["w", "y", "k", "z", "x"]
    shapes = {n: (s.plates, tuple(s.batch_shape), tuple(s.event_shape)) for n, s in sites.items()}
    assert shapes == {
        "w": ((), (), (3,)),
        "y": (("data",), (5,), (3,)),
        "k": (("data", "channels"), (2, 5), ()),
        "z": (("data",), (5,), (2, 4)),
        "x": (("data",), (5,), (1,)),
    }
    flags = ("observed", "enumerated", "auxiliary", "local")
    on = {flag: {n for n, s in sites.items() if getattr(s, flag)} for flag in flags}
    assert on == {
        "observed": {"x"},
        "enumerated": {"y"},
        "auxiliary": {"k"},
        "local": {"y", "k", "z", "x"},
    }
    families = ["Gamma", "OneHotCategorical", "Poisson", "Normal", "Normal"]
    assert [s.family for s in sites.values()] == families
    supports = [entrywise(s.support) for s in sites.values()]
    assert supports[1:] == [
        constraints.one_hot,
        constraints.nonnegative_integer,
        constraints.real,
        constraints.real,
    ]
    assert str(supports[0]) == str(dist.Gamma(1.0, 1.0).support)
    assert all(isinstance(site, Site) for site in sites.values())
    assert not read_sites(model, n=5)["x"].observed


def test_coordinates_are_named_by_their_place_in_the_event(program):
    sites = read_sites(program(everything, offset), x=torch.zeros(5, 1))
    assert sites["k"].coordinates == ["k"]
    assert sites["w"].coordinates == ["w[0]", "w[1]", "w[2]"]
    assert (sites["z"].coordinates[5], len(sites["z"].coordinates)) == ("z[1, 1]", 8)


def test_reading_and_checking_leave_the_random_state_and_the_store(program, draw, gaussian_story):
    decoded = both(lambda self, x: self.decoder(torch.zeros(2)), gaussian_story)
    model, guide = program(decoded, decoder=nn.Linear(2, 2)), program(draw("z", NORMAL))
    before = torch.random.get_rng_state()
    read_sites(model, n=3)
    check_pair(model, guide, torch.zeros(3, 2))
    check_data(model, [{"x": torch.zeros(3, 2)}])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(pyro.get_param_store())


def test_aside_restores_the_random_state_after_errors_too():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)

    def fail():
        with aside():
            torch.manual_seed(7)
            raise KeyError(torch.randn(100))

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.randn(3), expected)


def test_evaluating_restores_modes_and_has_a_seed_of_its_own():
    net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    draws = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        with evaluating(3, net):
            assert not any(m.training for m in net.modules())
            assert not torch.is_grad_enabled()
            draws.append(torch.randn(2))
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.randn(1)
    assert torch.equal(*draws)
    assert [m.training for m in net.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_paired_traces_replay_the_guides_draws(program, draw, gaussian_story):
    x = torch.zeros(4, 2)
    model, guide = paired_traces(program(gaussian_story), program(draw("z", NORMAL)), x)
    assert model.nodes["z"]["value"] is guide.nodes["z"]["value"]
    assert [name for name, _ in sample_nodes(model)] == ["z", "x"]


def both(*stories):
    return lambda self, x: [story(self, x) for story in stories]


def global_draw(name, family):
    return lambda self: pyro.sample(name, family)


def loc_in_the_store(self, x):
    pyro.param("loc", torch.zeros(2))


def nothing(self, x):
    pass


def test_pairs_that_fit_are_accepted(program, draw, gaussian_story):
    x = torch.zeros(ROWS, 2)
    auxiliary = draw("u", NORMAL, is_auxiliary=True)
    check_pair(program(gaussian_story), program(both(auxiliary, draw("z", NORMAL))), x)
    check_pair(
        program(everything, offset),
        program(
            both(
                draw("k", dist.Poisson(1.0), is_auxiliary=True),
                lambda self, x: pyro.sample("z", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2)),
            ),
            offset,
        ),
        x[:, :1],
    )  # the enumerated site needs none
    positive = program(draw("z", dist.Gamma(2.0, 1.0)))
    check_pair(positive, program(draw("z", LOGNORMAL)), x)
    held = program(lambda self, x: self.loc, loc=PyroParam(torch.ones(2), constraints.positive))
    check_pair(program(nothing), held, x)


# fault: (story of the model or None, story of the guide, the sentence)
def misfits(draw):
    z, real, positive = draw("z", NORMAL), draw("z", NORMAL), draw("z", LOGNORMAL)
    outside = "lies outside the {}'s support"
    return {
        "missing": (None, nothing, "the guide has no site 'z', which is latent.*known: none"),
        "misspelled": (None, draw("Z", NORMAL), "the guide has no site 'z'.*did you mean 'Z'"),
        "extra": (
            None,
            both(z, draw("zz", NORMAL)),
            r"the model has no site 'zz', which the guide draws; did you mean 'z'\?"
            r" \(or mark it with infer=.*is_auxiliary",
        ),
        "observed": (
            None,
            both(z, draw("x", NORMAL)),
            "the guide draws 'x', which is observed in the model",
        ),
        "event": (
            None,
            draw("z", NORMAL, size=3),
            r"at site 'z' the guide has event shape \(3,\), the model \(2,\)",
        ),
        "normal for positive": (
            positive,
            real,
            r"the guide is Normal on .*, the model .*Normal on .*: a draw of the guide, -.* "
            + outside.format("model"),
        ),
        "positive for normal": (
            real,
            positive,
            "a draw of the model, -.* " + outside.format("guide"),
        ),
        "parameter of the guide": (
            None,
            both(z, loc_in_the_store),
            r"pyro.param\('loc'\) is not a parameter of the module.*self.name = PyroParam",
        ),
        "parameter of the model": (both(z, loc_in_the_store), z, r"pyro.param\('loc'\) is not"),
    }


@pytest.mark.parametrize("fault", misfits(lambda *args, **kwargs: None))
def test_pairs_that_do_not_fit_are_refused(fault, program, draw, gaussian_story):
    model, guide, sentence = misfits(draw)[fault]
    model, guide = program(model or gaussian_story), program(guide)
    with pytest.raises(PairError, match=rf"(?s)^Program.*{sentence}"):
        check_pair(model, guide, torch.zeros(ROWS, 2))


@pytest.mark.parametrize(
    ("mine", "theirs", "sentence"),
    [
        (None, NORMAL, r"guide has plates \('data',\), the model \(\)"),
        (NORMAL.expand([3]), NORMAL, r"guide has batch shape \(3,\), the model \(\)"),
        (
            dist.Normal(-9 * torch.ones(2), 1.0).to_event(1),
            LOGNORMAL.expand([2]).to_event(1),
            "a draw of the guide, -.*, lies outside the model's support",
        ),
        pytest.param(
            dist.Normal(-9.0, 1.0),
            LOGNORMAL,
            "a draw of the guide, -.*, lies outside",
        ),
    ],
    ids=["plates", "batch shape", "support of a vector", "support of a number"],
)
def test_global_sites_that_do_not_fit_are_refused(program, mine, theirs, sentence):
    model = program(nothing, global_draw("w", theirs))
    local = lambda self, x: pyro.sample("w", NORMAL)  # noqa: E731
    guide = program(nothing, global_draw("w", mine)) if mine else program(local)
    with pytest.raises(PairError, match=sentence):
        check_pair(model, guide, torch.zeros(ROWS, 2))


def test_functions_are_named_and_may_use_the_store(gaussian_story):
    def story(x):
        gaussian_story(None, x)

    def my_guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    check_pair(story, my_guide, torch.zeros(2))
    with pytest.raises(PairError, match=r"^story and <lambda>: the guide has no site 'z'"):
        check_pair(story, lambda x: None, torch.zeros(2))


def emitter(likelihood, *args):
    return VAE(StandardNormal(2), likelihood(nn.Linear(2, 3), *args))


GREY = 0.4


@pytest.mark.parametrize(
    ("model", "value", "sentence"),
    [
        (VAE.toy, GREY, r"hold 0.4, which Bernoulli cannot emit.*[bB]inarize.*ContinuousBernoulli"),
        (VAE.toy, float("nan"), "hold nan, which Bernoulli cannot emit"),
        (
            lambda: emitter(Binomial, 5),
            7.0,
            "hold 7, .*Expected whole numbers from 0 to total_coun",
        ),
        (lambda: emitter(Binomial, 5), 1.5, "hold 1.5, which Binomial cannot emit"),
        (lambda: emitter(ContinuousBernoulli), 255.0, "hold 255, .*divide by the largest value"),
        (lambda: emitter(Gaussian), float("nan"), "hold nan, which Normal cannot emit"),
    ],
)
def test_values_that_the_model_cannot_emit_are_named_by_row(model, value, sentence):
    model = model()
    good = torch.zeros(4, read_sites(model, n=1)["x"].event_shape[0])
    bad = good[:3].clone()  # another number of rows than the batch before
    bad[1, 2] = value
    bad[2, 0] = -99.0  # only the first is named
    check_data(model, [{"x": good}, {"x": good}])
    with pytest.raises(PairError, match=rf"(?s)data 'x', row 9, {sentence}"):
        check_data(model, [{"x": good}, {"x": good}, {"x": bad}])


def test_data_of_another_shape_or_name_are_refused():
    model, bits = VAE.toy(), torch.zeros(4, 6)
    with pytest.raises(PairError, match=r"rows of shape \(5,\), but VAE emits \(6,\): build the"):
        check_data(model, [{"x": bits[:, :5]}])
    with pytest.raises(PairError, match=r"rows of shape \(2, 3\), but VAE emits \(6,\)"):
        check_data(model, [{"x": bits.reshape(4, 2, 3)}])
    with pytest.raises(PairError, match=r"VAE has no site 'X'; did you mean 'x'\?"):
        check_data(model, [{"X": bits}])


def test_a_constraint_on_whole_rows_names_their_first_entry(program):
    def shares(self, x):
        return pyro.sample("x", dist.Dirichlet(torch.ones(3)), obs=x)

    rows = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.2]])
    check_data(program(shares), [{"x": rows[:1]}])
    with pytest.raises(PairError, match=r"row 1, hold 0.7, which Dirichlet cannot emit"):
        check_data(program(shares), [{"x": rows}])
