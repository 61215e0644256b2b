"""Faults put into programs by hand, and programs without one."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
from torch import nn

from ppl_vae.checks.result import NotApplicable
from ppl_vae.checks.structure import structure
from ppl_vae.conditionals import Normal
from ppl_vae.flows import Planar
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.guides.normalizing_flow import NormalizingFlow
from ppl_vae.likelihoods import Gaussian
from ppl_vae.models._template import Template
from ppl_vae.models.conditional import BaselineNet
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

CHECKS = {
    f"{what} of the {who}"
    for who in ("model", "guide")
    for what in ("scale", "subsets", "rows", "gradients")
} | {"inputs of the guide"}


def as_test(x):
    return {"train": x, "test": x}


def ppca(encoder=None, decoder=None):
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=5)
    if decoder is not None:
        model.likelihood.net = decoder
    guide = MeanField(model, encoder or MLP(5, 8, 6), x=torch.zeros(2, 5))
    with torch.no_grad():
        # Heads may start at 0, where nothing is read yet.
        for p in guide.parameters():
            p += 0.1 * torch.randn_like(p)
    return model, guide


def faults(result):
    return {record["check"] for record in result.statistics if record["verdict"] == "fail"}


def detail(result, check):
    return next(r["detail"] for r in result.statistics if r["check"] == check)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(50, 5)


def test_a_pair_without_a_fault_passes(x):
    model, guide = ppca()
    result = structure(model, guide, as_test(x))
    assert result.verdict == "pass", result.meaning
    assert {record["check"] for record in result.statistics} == CHECKS
    assert (result.error_rate, result.p) == (0.0, None)
    assert detail(result, "inputs of the guide") == "the guide reads all 5 varying coordinates"


class ByHand(PPCA):
    """Written without ``self.rows``, as in many examples."""

    plate = staticmethod(lambda n, total: pyro.plate("data", n))

    def forward(self, x=None, *, n=None, total=None):
        with self.plate(n if x is None else len(x), total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(z), obs=x)


def test_a_model_that_ignores_total(x):
    _, guide = ppca()
    result = structure(ByHand(2, 5), guide, as_test(x))
    assert faults(result) == {"scale of the model"}
    assert "'x' counts 1 times instead of 3" in result.meaning


def test_rows_in_a_plate_of_another_name(x):
    class Named(ByHand):
        plate = staticmethod(lambda n, total: pyro.plate("batch", n))

    class NamedGuide(Factorized):
        def forward(self, x=None, *, n=None, total=None, **others):
            with pyro.plate("batch", len(x)):
                pyro.sample("z", self.conditionals["z"](x))

    guide = NamedGuide(z=(Normal(MLP(5, 8, 4)), ["x"]))
    result = structure(Named(2, 5), guide, as_test(x))
    assert {"scale of the model", "scale of the guide"} <= faults(result)
    assert "'z' stands in no plate 'data'" in result.meaning


def test_a_guide_that_ignores_total_and_one_that_takes_none(x):
    model, _ = ppca()

    class Ignores(Factorized):
        def forward(self, x=None, *, n=None, total=None, **others):
            return super().forward(x=x, n=n, **others)

    class Refuses(Factorized):
        def forward(self, x=None):
            return super().forward(x=x)

    for kind, said in ((Ignores, "counts 1 times"), (Refuses, "takes no total=")):
        result = structure(model, kind(z=(Normal(MLP(5, 8, 4)), ["x"])), as_test(x))
        assert faults(result) == {"scale of the guide"}
        assert said in result.meaning


def test_a_global_latent_is_counted_once(float64):
    torch.manual_seed(0)
    model = Template.toy().double()
    x = model.simulate(20)["x"]
    guide = MeanField(model, MLP(4, 8, 7), x)
    assert structure(model, guide, as_test(x)).passed

    class EachTime(Template):
        def w_dist(self):
            return super().w_dist()

        def forward(self, x=None, *, n=None, total=None):
            rows = len(x) if x is not None else n
            with pyro.poutine.scale(scale=(total or rows) / rows):
                w = pyro.sample("w", self.w_dist())
            with self.rows(x, n=n, total=total):
                z = pyro.sample("z", self.z_dist())
                pyro.sample("x", self.x_dist(w, z), obs=x)

    result = structure(EachTime.toy().double(), guide, as_test(x))
    assert faults(result) == {"scale of the model"}
    assert "'w' counts 3 times instead of 1" in result.meaning


class Company(nn.Module):
    """A net with something of the other rows in it."""

    def __init__(self, inner, mix):
        super().__init__()
        self.inner, self.mix = inner, mix
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def forward(self, x):
        return self.mix(self.inner(x))


MIXES = {
    "batch norm": lambda h: nn.functional.batch_norm(h, None, None, training=True),
    "cumulative sum": lambda h: h.cumsum(0),
    "attention": lambda h: h + (h @ h.T).softmax(-1) @ h,
}


@pytest.mark.parametrize("mix", MIXES)
def test_rows_that_depend_on_each_other(x, mix):
    model, guide = ppca(encoder=Company(MLP(5, 8, 6), MIXES[mix]))
    result = structure(model, guide, as_test(x))
    assert "rows of the guide" in faults(result) <= {"subsets of the guide", "rows of the guide"}
    moves = "do not move with their rows" in detail(result, "rows of the guide")
    assert moves == (mix == "cumulative sum")
    model, guide = ppca(decoder=Company(MLP(2, 8, 5), MIXES[mix]))
    result = structure(model, guide, as_test(x))
    assert "rows of the model" in faults(result) <= {"subsets of the model", "rows of the model"}


def test_terms_that_stay_with_their_place(x):
    shift = torch.linspace(0, 1, 500)
    model, guide = ppca(encoder=Company(MLP(5, 8, 6), lambda h: h + shift[: len(h), None]))
    result = structure(model, guide, as_test(x))
    assert "rows of the guide" in faults(result)


class Some(nn.Module):
    """A net that reads some of its inputs."""

    def __init__(self, read):
        super().__init__()
        self.net, self.read = MLP(3, 8, 6), read
        self.inputs, self.outputs = 5, 6

    def forward(self, x):
        return self.net(self.read(x))


def test_a_guide_that_ignores_inputs(x):
    model, guide = ppca(encoder=Some(lambda x: x[..., :3]))
    result = structure(model, guide, as_test(x))
    assert faults(result) == {"inputs of the guide"}
    assert "all but 2 of 5 varying coordinates (ignored: x[3], x[4])" in result.meaning
    # What tells nothing of latents need not be read.
    with torch.no_grad():
        model.likelihood.net.weight[3:] = 0
    result = structure(model, guide, as_test(x))
    assert result.passed
    assert "x[3], x[4]" in detail(result, "inputs of the guide")
    # What does not vary cannot be.
    x[:, 3:] = 1.0
    assert detail(structure(model, guide, as_test(x)), "inputs of the guide").endswith(
        "all 3 varying coordinates"
    )


def test_an_input_behind_a_threshold_is_read(x):
    def both(x):
        return torch.cat([x[..., :2], (x[..., 2:] > 0).to(x).sum(-1, keepdim=True)], -1)

    model, guide = ppca(encoder=Some(both))
    result = structure(model, guide, as_test(x))
    assert result.passed
    assert "all 5 varying" in detail(result, "inputs of the guide")


def test_a_guide_that_reads_one_of_two_observables():
    torch.manual_seed(0)
    model = M2(StandardNormal(2), Gaussian(MLP(3 + 2, 8, 4)), classes=3)
    drawn = model.simulate(40)
    data = as_test({"x": drawn["x"], "y": drawn["y"].argmax(1)})
    guides = (
        Factorized(z=(Normal(MLP(4, 8, 4)), ["x"])),
        Factorized(z=(Normal(MLP(4 + 3, 8, 4)), ["x", "y"])),
    )
    without, with_labels = (structure(model, guide, data) for guide in guides)
    assert faults(without) == {"inputs of the guide"}
    assert "y[0], y[1], y[2]" in without.meaning
    assert with_labels.passed, with_labels.meaning


def test_the_prior_ignores_its_inputs_on_purpose(x):
    model, _ = ppca()
    result = structure(model, Prior(model), as_test(x))
    assert result.passed, result.meaning
    assert "on purpose" in result.meaning


def test_a_site_that_the_model_sums_out():
    torch.manual_seed(0)
    model = MixtureVAE.toy()
    guide = Factorized(z=(Normal(MLP(6, 8, 4)), ["x"]))
    result = structure(model, guide, as_test(model.simulate(40)["x"]))
    assert result.passed, result.meaning


def test_a_conditional_model_without_a_latent():
    torch.manual_seed(0)
    model = BaselineNet.toy()
    data = as_test(model.simulate(40, **model.example_covariates(40)))
    result = structure(model, Prior(model), data)
    assert result.passed, result.meaning
    inapplicable = {r["check"] for r in result.statistics if r["verdict"] == "not applicable"}
    assert inapplicable == {
        f"{what} of the guide" for what in ("subsets", "rows", "inputs", "gradients")
    }


def test_a_guide_that_scores_its_own_draws_only(x):
    model, _ = ppca()
    flow = partial(Planar, layers=2)
    guide = NormalizingFlow(model, MLP(5, 8, 6), x=torch.zeros(2, 5), flow=flow)
    result = structure(model, guide, as_test(x))
    assert result.passed
    assert {r["check"] for r in result.statistics} == CHECKS
    assert "Planar" in detail(result, "rows of the guide")


def test_parameters_without_a_gradient(x):
    model, guide = ppca()
    model.spare = nn.Parameter(torch.ones(2))
    guide.register_parameter("idle", nn.Parameter(torch.ones(2)))
    result = structure(model, guide, as_test(x))
    assert faults(result) == {"gradients of the model", "gradients of the guide"}
    assert "no gradient reaches spare" in result.meaning
    model.spare.requires_grad_(False)
    del guide.idle
    result = structure(model, guide, as_test(x))
    assert result.passed
    assert detail(result, "gradients of the model") == "frozen: spare"


def test_a_gradient_that_is_cut_off(x):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.inputs, self.outputs = MLP(5, 8, 6), 5, 6

        def forward(self, x):
            return self.net(x).detach()

    result = structure(*ppca(encoder=Cut()), as_test(x))
    assert "gradients of the guide" in faults(result)
    assert "encoder.net" in detail(result, "gradients of the guide")


def test_nothing_is_left_behind(x):
    model, guide = ppca()
    model.likelihood.net.weight.grad = kept = torch.ones(5, 2)
    state, mode = torch.get_rng_state(), model.training
    first, again = (structure(model, guide, as_test(x), seed=3) for _ in range(2))
    assert first.to_json() == again.to_json()
    assert torch.equal(state, torch.get_rng_state())
    assert model.training == mode
    assert model.likelihood.net.weight.grad is kept
    assert torch.equal(kept, torch.ones(5, 2))
    assert all(p.grad is None for p in guide.parameters())


def test_too_few_rows(x):
    with pytest.raises(NotApplicable, match="3 rows of 'test'"):
        structure(*ppca(), as_test(x[:3]))


def test_a_large_image_in_single_precision():
    torch.manual_seed(0)
    model = VAE(StandardNormal(8), Gaussian(MLP(8, 64, 784), 0.01))
    guide = MeanField(model, MLP(784, 64, 64), x=torch.zeros(2, 784))
    result = structure(model, guide, as_test(model.simulate(40)["x"]))
    assert result.passed, result.meaning
