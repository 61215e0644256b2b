from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_vae.model import ROWS, GenerativeModel, Program, by_name, own_parameters, sample_nodes
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")


class Pair(GenerativeModel):
    """Two observables and a scale; what stands after the star is none."""

    def forward(self, x=None, y=None, *, n=None, total=None):
        with self.rows(x, y, n=n, total=total):
            y = pyro.sample("y", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=y)
            return pyro.sample("x", dist.Normal(y.expand(-1, 2), 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def rows(*shapes, n=None, total=None):
    observed = [None if shape is None else torch.zeros(shape) for shape in shapes]
    return Program().rows(*observed, n=n, total=total)


@pytest.mark.parametrize(
    ("shapes", "options", "size", "full"),
    [
        ([(5, 2)], {}, 5, 5),
        ([(5, 2), (5,), None], {}, 5, 5),
        ([None], {"n": 3}, 3, 3),
        ([], {"n": 1}, 1, 1),
        ([(5, 2)], {"n": 5}, 5, 5),
        ([(5, 2)], {"total": 20}, 5, 20),
        ([(5, 2)], {"total": 5}, 5, 5),
        ([None], {"n": 3, "total": 30}, 3, 30),
    ],
)
def test_rows_have_the_datas_size_and_stand_for_the_total(shapes, options, size, full):
    plate = rows(*shapes, **options)
    assert (plate.name, plate.subsample_size, plate.size) == (ROWS, size, full)
    with poutine.trace() as tape, plate as indices:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    assert indices.tolist() == list(range(size))
    assert z.shape == (size,)
    node = tape.trace.nodes["z"]
    assert node["scale"] == full / size
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).mean() * full
    torch.testing.assert_close(tape.trace.log_prob_sum(lambda name, _: name == "z"), expected)


@pytest.mark.parametrize(
    ("shapes", "options", "sentence"),
    [
        ([None], {}, "Program: give data, or n=, the number of rows to draw"),
        ([], {"total": 5}, "Program: give data, or n="),
        (
            [(5, 2), (4,)],
            {},
            r"shapes \[\(5, 2\), \(4,\)\] and n=None; expected one number of rows",
        ),
        ([(5, 2)], {"n": 4}, r"shapes \[\(5, 2\)\] and n=4; expected one number of rows"),
        ([(0, 2)], {}, r"shapes \[\(0, 2\)\].*at least 1"),
        ([None], {"n": 0}, r"shapes \[\] and n=0; .*at least 1"),
        ([None], {"n": -1}, "n=-1; .*at least 1"),
        ([(5, 2)], {"total": 4}, "total=4 is smaller than the 5 rows given"),
        ([None], {"n": 3, "total": 0}, "total=0 is smaller than the 3 rows"),
    ],
)
def test_rows_that_do_not_agree_are_refused(shapes, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        rows(*shapes, **options)


def test_observed_are_the_columns_that_forward_takes():
    x, y = torch.zeros(3, 2), torch.ones(3, 1)
    assert Pair().observables == ("x", "y")
    assert VAE.toy().observables == ("x",)
    seen = Pair().observed({"y": y, "n": x, "total": x, "id": y, "x": x})
    assert list(seen) == ["x", "y"]
    assert seen["x"] is x
    assert Pair().observed({"label": y}) == {}


def test_simulate_draws_every_site_of_so_many_rows():
    model = Template.toy()
    torch.manual_seed(3)
    drawn = model.simulate(7)
    assert {name: tuple(v.shape) for name, v in drawn.items()} == {
        "w": (4,),
        "z": (7, 1),
        "x": (7, 4),
    }
    assert not PPCA.toy().simulate(2)["x"].requires_grad
    assert not list(pyro.get_param_store())
    torch.manual_seed(3)
    again = model.simulate(7)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(model.simulate(7)["z"], drawn["z"])


def test_simulated_rows_follow_the_story():
    drawn = Pair().simulate(4000)
    x, y = drawn["x"], drawn["y"]
    covariance = torch.cov(torch.cat([y, x], 1).T)  # y 1, x 2, together 1
    expected = torch.tensor([[1.0, 1, 1], [1, 2, 1], [1, 1, 2]])
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.2)


def test_by_name_binds_positions_and_names_and_drops_none():
    x, y = torch.zeros(1), torch.ones(1)
    for bound in (by_name(("x", "y"), (x, y), {}), by_name(("x", "y"), (), {"y": y, "x": x})):
        assert list(bound) == ["x", "y"]
        assert bound["x"] is x
        assert bound["y"] is y
    assert list(by_name(("x", "y"), (None, y), {})) == ["y"]
    assert by_name(("x", "y"), (), {"x": None}) == {}


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((1, 2, 3), {}, "too many positional arguments; observable sites are x, y"),
        ((1,), {"x": 2}, "multiple values for argument 'x'; observable sites are x, y"),
        ((), {"z": 2}, "unexpected keyword argument 'z'; observable sites are x, y"),
    ],
)
def test_arguments_that_are_no_observables_are_refused(args, kwargs, sentence):
    with pytest.raises(TypeError, match=sentence):
        by_name(("x", "y"), args, kwargs)


def test_sample_nodes_are_neither_plates_nor_parameters():
    model = VAE.toy()
    with own_parameters(model):
        trace = poutine.trace(model).get_trace(n=2)
    assert {"param", "sample"} <= {node["type"] for node in trace.nodes.values()}
    assert ROWS in trace.nodes
    assert [name for name, _ in sample_nodes(trace)] == ["z", "x"]


def test_own_parameters_hide_the_store_from_modules_only():
    pyro.param("loc", torch.tensor(3.0))
    with own_parameters(nn.Linear(1, 1), Program()):
        assert "loc" not in pyro.get_param_store()
        pyro.param("inner", torch.tensor(1.0))
    assert list(pyro.get_param_store()) == ["loc"]
    with own_parameters(Program(), lambda: None):  # a function keeps its parameters nowhere else
        assert pyro.param("loc").item() == 3.0
    with pytest.raises(KeyError), own_parameters(Program()):
        raise KeyError
    assert list(pyro.get_param_store()) == ["loc"]


def test_programs_cannot_be_made_without_their_methods():
    class Half(GenerativeModel):
        @classmethod
        def toy(cls):
            return cls()

    with pytest.raises(TypeError, match=r"abstract method '?forward"):
        Half()
