"""What objectives refuse, and in which sentence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ppl_vae.objectives import (
    DIPVAE,
    IWAE,
    Beta,
    BetaTC,
    Capacity,
    DReG,
    FactorVAE,
    FreeBits,
    InfoVAE,
    StickingTheLanding,
)
from ppl_vae.sites import PairError

pytestmark = pytest.mark.usefixtures("float64")
DISCRIMINATOR = nn.Linear(2, 1).double()


def rows(x, name="data", **options):
    return pyro.plate(name, len(x), **options)


def normal(name, size=2):
    return pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))


def plain(x):
    with rows(x):
        normal("z")
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def plain_guide(x):
    with rows(x):
        normal("z")


def coin(x, **infer):
    with rows(x):
        pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1), infer=infer)


def die(x):
    with rows(x):
        pyro.sample("z", dist.Categorical(torch.ones(3) / 3))


def enumerated(x):
    coin(x, enumerate="parallel")


def enumerated_for_all(x):
    pyro.sample("w", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
    plain(x)


def two_plates(x):
    with rows(x), pyro.plate("pixels", 2, dim=-3):
        normal("z")


def taken_dim(x):
    with rows(x), pyro.plate("pixels", 2, dim=-2):
        normal("z")


def topics(x):
    with pyro.plate("topics", len(x)):
        normal("t")
    plain(x)


def topics_guide(x):
    with pyro.plate("topics", len(x)):
        normal("t")
    plain_guide(x)


def no_plate(x):
    normal("z")


def nothing(x):
    pass


def with_auxiliary(x):
    with rows(x):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1).to_event(1), infer={"is_auxiliary": 1})
        pyro.sample("z", dist.Delta(u, event_dim=1))


def whole(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


REFUSED = {
    "enumerated for all": (enumerated_for_all, nothing, "'w' is enumerated"),
    "coin": (coin, coin, r"'z' is drawn without reparameterization \((Independent|Bernoulli)\)"),
    "die": (die, die, r"'z' is drawn without reparameterization \(Categorical\)"),
    "two plates": (two_plates, two_plates, "stands in plate 'pixels' besides the rows'"),
    "taken dim": (taken_dim, taken_dim, "collide at dim=-2"),
    "topics": (topics, topics_guide, "plates at dim -1: 'topics' and 'data'; expected one"),
    "no plate": (no_plate, no_plate, "plates at dim -1: none; expected one"),
    "not drawn": (plain, nothing, "guide does not draw 'z'"),
    "whole": (plain, whole, "'z' stands in a plate at dim -1 in one of model and guide only"),
    "auxiliary": (plain, with_auxiliary, "'u' of the guide is no latent of the model's rows"),
    "autoguide": (plain, AutoNormal(plain), "'z_unconstrained' of the guide is no latent"),
}


@pytest.mark.parametrize("objective", [Beta(2.0), DReG(2)], ids=repr)
@pytest.mark.parametrize("case", REFUSED)
def test_programs_without_terms_of_rows_are_refused(case, objective):
    model, guide, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        objective.loss_and_grads(model, guide, torch.randn(3, 2))


@pytest.mark.parametrize("objective", [DReG(2), StickingTheLanding()], ids=repr)
@pytest.mark.parametrize("side", ["model", "guide"])
def test_path_derivatives_have_none_through_an_enumerated_site(side, objective):
    programs = (enumerated, nothing) if side == "model" else (coin, enumerated)
    with pytest.raises(PairError, match=r"'z' is enumerated: .* draws every latent"):
        objective.loss_and_grads(*programs, torch.randn(3, 2))


def global_latent(x):
    normal("w")
    plain(x)


def global_guide(x):
    normal("w")
    plain_guide(x)


def only_observed(x):
    with rows(x):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("objective", [IWAE(2), DReG(2), StickingTheLanding(2)], ids=repr)
def test_weights_that_are_no_rows_are_refused(objective):
    x = torch.randn(3, 2)
    for run in (objective.loss, objective.loss_and_grads):
        with pytest.raises(PairError, match="latent 'w' stands outside the plate of rows"):
            run(global_latent, global_guide, x)
        with pytest.raises(PairError, match="weighs draws, and the model has no latent"):
            run(only_observed, nothing, x)


def pair_of_sites(x):
    with rows(x):
        normal("z1")
        normal("z2")


def gamma(x):
    with rows(x):
        pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))


def mixture(x):
    with rows(x):
        parts = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts))


AGGREGATE = [BetaTC(2.0), FactorVAE(DISCRIMINATOR), DIPVAE(1.0, 1.0), InfoVAE()]


@pytest.mark.parametrize("objective", AGGREGATE, ids=repr)
def test_an_aggregate_posterior_is_of_one_site(objective):
    x = torch.randn(3, 2)
    with pytest.raises(PairError, match="needs one latent site a row, found z1, z2"):
        objective.loss(pair_of_sites, pair_of_sites, x)
    with pytest.raises(PairError, match="needs one latent site a row, found none"):
        objective.loss(only_observed, nothing, x)


@pytest.mark.parametrize(
    ("objective", "model", "guide", "sentence"),
    [
        (BetaTC(2.0), gamma, gamma, "'z' of the guide is Gamma"),
        (DIPVAE(1.0, 1.0), gamma, gamma, "'z' of the guide is Gamma"),
        (FreeBits(1.0), gamma, gamma, "'z' of the model is Gamma"),
        (FreeBits(1.0), mixture, plain_guide, "'z' of the model is MixtureSameFamily"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_other_families_than_normals_are_refused_where_normals_are_needed(
    objective, model, guide, sentence
):
    with pytest.raises(PairError, match=sentence):
        objective.loss(model, guide, torch.randn(3, 2))


@pytest.mark.parametrize(
    "objective", [*AGGREGATE, Capacity(1.0, 0), *(FreeBits(1.0, p) for p in ("latent", "all"))]
)
def test_a_batch_as_a_whole_has_no_masked_rows(objective):
    mask = torch.tensor([True, False, True])
    masked = [poutine.mask(program, mask=mask) for program in (plain, plain_guide)]
    with pytest.raises(PairError, match="takes all rows of a batch alike, and latent 'z' is mask"):
        objective.loss(*masked, torch.randn(3, 2))
    kept = [poutine.mask(program, mask=True) for program in (plain, plain_guide)]
    assert objective.loss(*kept, torch.randn(3, 2)).isfinite()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Beta(-1.0),
        lambda: Beta(1.0, draws=0),
        lambda: Capacity(-1.0, 1),
        lambda: Capacity(1.0, -1),
        lambda: Capacity(1.0, 1, gamma=-1),
        lambda: FreeBits(-1.0),
        lambda: FreeBits(1.0, "row"),
        lambda: FreeBits(math.nan),
        lambda: IWAE(0),
        lambda: DReG(0),
        lambda: StickingTheLanding(-1),
        lambda: BetaTC(-1.0),
        lambda: BetaTC(1.0, alpha=-1.0),
        lambda: BetaTC(1.0, gamma=-1.0),
        lambda: BetaTC(1.0, estimator="naive"),
        lambda: FactorVAE(DISCRIMINATOR, gamma=-1.0),
        lambda: DIPVAE(-1.0, 1.0),
        lambda: DIPVAE(1.0, -1.0),
        lambda: DIPVAE(1.0, 1.0, "III"),
        lambda: InfoVAE(alpha=1.5),
        lambda: InfoVAE(alpha=-0.5),
        lambda: InfoVAE(alpha=0.5, lam=0.2),
    ],
)
def test_arguments_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match=r"^\w+\(.*: expected "):
        make()
