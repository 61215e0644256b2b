from __future__ import annotations

import math
from math import log

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae import codes as codes_module
from ppl_vae.codes import posterior_codes
from ppl_vae.data import from_arrays
from ppl_vae.disentanglement import (
    METRICS,
    beta_vae,
    dci,
    disentanglement,
    disentanglement_of,
    factor_vae,
    mig,
    sap,
)
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Gaussian
from ppl_vae.models.vae import VAE
from ppl_vae.priors import StandardNormal

SIZES = (3, 4, 5, 6)
GRID = np.stack(np.indices(SIZES), -1).reshape(-1, len(SIZES))
FACTORS = np.tile(GRID, (6, 1))  # each combination six times
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.normal(size=(len(FACTORS), 4))
STANDARD = (FACTORS - FACTORS.mean(0)) / FACTORS.std(0)
NAMES = {
    "mig",
    "sap",
    "dci_disentanglement",
    "dci_completeness",
    "dci_informativeness",
    "beta_vae",
    "factor_vae",
}


def test_a_coordinate_for_each_factor_gets_1_of_every_metric():
    code = FACTORS[:, [2, 0, 3, 1]] * np.array([1.0, -3.0, 0.01, 100.0]) + 7
    figures = disentanglement(code, FACTORS)
    assert set(figures) == NAMES
    assert figures == pytest.approx(dict.fromkeys(NAMES, 1), abs=1e-9)
    # Coordinates without information take away no more than what they seem to know by chance.
    figures = disentanglement(torch.from_numpy(np.c_[NOISE, code]), torch.from_numpy(FACTORS))
    assert figures == pytest.approx(dict.fromkeys(NAMES, 1), abs=0.06)


@pytest.mark.parametrize("code", [NOISE, np.zeros_like(NOISE)], ids=["noise", "constant"])
def test_a_code_without_information_gets_0_or_chance(code):
    chance = dict.fromkeys(NAMES, 0.0) | {"beta_vae": 1 / 4, "factor_vae": 1 / 4}
    assert disentanglement(code, FACTORS) == pytest.approx(chance, abs=0.05)


def test_mig_is_that_of_mutual_informations_by_hand():
    first, second = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]
    code = [0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0, 9.0], [5.0, 5.0, -5.0, -5.0, 5.0, 5.0, -5.0, 5.0]
    # Joint shares of (coordinate, factor), over the product of their marginals.
    one_one = 3 / 8 * log(2) + 1 / 8 * log(8 / 20) + 4 / 8 * log(8 / 5)
    one_two = 2 / 8 * log(16 / 12) + 1 / 8 * log(8 / 12) + 2 / 8 * log(16 / 20) + 3 / 8 * log(1.2)
    two_one = 2 / 8 * log(16 / 12) + 2 / 8 * log(16 / 20) + 1 / 8 * log(8 / 12) + 3 / 8 * log(1.2)
    two_two = 4 / 8 * log(8 / 5) + 3 / 8 * log(2) + 1 / 8 * log(8 / 20)
    expected = ((one_one - two_one) + (two_two - one_two)) / log(2) / 2
    found = mig(np.transpose(code), np.transpose([first, second]))
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_factor_split_over_two_coordinates_lowers_the_gap():
    """One of six values as one of three and one of two: log 3 and log 2 of log 6 nats."""
    code = np.c_[FACTORS[:, :3], FACTORS[:, 3] // 2, FACTORS[:, 3] % 2]
    assert mig(code, FACTORS) == pytest.approx((3 + log(3 / 2) / log(6)) / 4, abs=1e-12)
    whole = dci(FACTORS, FACTORS)
    split = dci(code, FACTORS)
    assert split.completeness < whole.completeness - 0.1
    assert split.disentanglement == pytest.approx(1)
    assert mig(code[:, [2, 4, 0, 1, 3]], FACTORS) == mig(code, FACTORS)


def test_sap_is_the_gap_between_accuracies():
    """Bits that are told with errors: 1 - 2 e of them, of both classes, beyond guessing."""
    counts = [180, 180, 20, 20]  # the first bit is seldom 1
    bits = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], counts, axis=0)
    part = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    told = bits[:, [0, 0, 1]] ^ (part[:, None] < [0.2, 0.3, 0.35])
    expected = ((0.6 - 0.4) + (0.3 - 0.0)) / 2
    assert sap(told, bits) == pytest.approx(expected, abs=1e-12)


def test_dci_is_that_of_importances_which_are_known():
    half = log(2) / log(3)  # the entropy of two equal shares among three
    one, two, three = STANDARD[:, 1:].T
    # Two copies share a factor, which leaves each of them with one factor.
    copies = dci(np.c_[one, one, two], FACTORS[:, 1:3])
    assert copies.disentanglement == pytest.approx(1)
    assert copies.completeness == pytest.approx((1 - half + 1) / 2, abs=0.03)
    # One coordinate for two factors, which leaves each of them with one coordinate.
    mixed = dci(np.c_[FACTORS[:, 1] + 10 * FACTORS[:, 2], three], FACTORS[:, 1:])
    assert mixed.completeness == pytest.approx(1)
    assert mixed.disentanglement == pytest.approx(2 / 3 * (1 - half) + 1 / 3, abs=1e-9)
    assert copies.informativeness == mixed.informativeness == 1


def test_what_a_code_leaves_out_scores_by_chance():
    """Two of four factors known. A pair alike in one of the others differs in all coordinates, so
    that a classifier guesses which of the two it is; a vote for them goes to a coordinate that is
    another factor's."""
    assert beta_vae(FACTORS[:, :2], FACTORS) == pytest.approx(3 / 4, abs=0.03)
    assert factor_vae(FACTORS[:, :2], FACTORS) == pytest.approx(2 / 4, abs=0.03)


def test_a_rotation_mixes_the_factors():
    turned = STANDARD @ np.linalg.qr(RANDOM.normal(size=(4, 4)))[0]
    figures = disentanglement(turned, FACTORS)
    assert figures["dci_disentanglement"] < 0.7
    assert figures["dci_completeness"] < 0.7
    assert figures["mig"] < 0.3
    assert figures["sap"] < 0.3
    assert figures["dci_informativeness"] > 0.8, "what is known is still known"
    assert figures["beta_vae"] > 0.9, "a linear map of differences is a map of them"


def test_the_order_of_coordinates_and_the_names_of_classes_do_not_matter():
    code = STANDARD + 0.3 * NOISE
    order = [3, 1, 0, 2]
    figures = disentanglement(code, FACTORS)
    assert 0.1 < figures["mig"] < 0.95
    permuted = disentanglement(code[:, order] * np.array([2.0, 8.0, 0.5, 4.0]), FACTORS)
    assert permuted == pytest.approx(figures, abs=0.02)
    assert permuted["mig"] == pytest.approx(figures["mig"], abs=1e-12)
    renamed = disentanglement(code, 0.5 * FACTORS - 3.0)
    assert renamed == figures


@pytest.mark.parametrize("metric", [beta_vae, factor_vae, dci])
def test_one_seed_gives_one_figure(metric):
    assert metric(NOISE, FACTORS, seed=1) == metric(NOISE, FACTORS, seed=1)
    assert metric(NOISE, FACTORS, seed=1) != metric(NOISE, FACTORS, seed=2)


@pytest.mark.parametrize(
    ("codes", "factors", "problem"),
    [
        (FACTORS[1:], FACTORS, r"codes of shape \(2159, 4\) and factors of shape \(2160, 4\)"),
        (FACTORS[:, 0], FACTORS, r"codes of shape \(2160,\).*expected \(rows, Z\)"),
        (FACTORS, FACTORS[:, :1], r"factors of shape \(2160, 1\): expected at least 2"),
        (FACTORS, np.c_[FACTORS[:, 0], FACTORS[:, 1] * 0], "column 1 of factors is 0 in every row"),
        (FACTORS[:, :0], FACTORS, r"codes of shape \(2160, 0\)"),
        (FACTORS[:0], FACTORS[:0], "column 0 of factors is empty"),
        (FACTORS, NOISE, "column 0 of factors has 2160 values in 2160 rows: expected classes"),
        (
            np.where(FACTORS == 5, math.nan, FACTORS),
            FACTORS,
            "codes hold nan in row 5, column 3",
        ),
    ],
)
def test_tables_that_fit_no_metric_are_refused(codes, factors, problem):
    for name in METRICS:
        with pytest.raises(ValueError, match=problem):
            disentanglement(codes, factors, metrics=[name])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="no metric 'MIG', only mig, sap"):
        disentanglement(FACTORS, FACTORS, metrics=["MIG"])


class Reads(nn.Module):
    """q(z | x): centered at the first entries of x."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return dist.Normal(self.weight * x[..., : self.size], 1.0).to_event(1)


@pytest.fixture
def pair():
    return (
        VAE(StandardNormal(4), Gaussian(nn.Linear(4, 5))),
        Factorized(z=(Reads(4), ["x"])),
    )


@pytest.mark.usefixtures("float64")
def test_a_pair_is_judged_by_its_centers_on_rows_that_were_held_out(pair, monkeypatch):
    x = np.c_[STANDARD + 0.3 * NOISE, NOISE[:, 0]]
    data = from_arrays({"x": x, "factors": np.c_[0 * FACTORS[:, 0], FACTORS].astype(np.uint8)})
    test = data.splits["test"]
    metrics = ("mig", "factor_vae")
    state = torch.get_rng_state()
    found = disentanglement_of(*pair, data, metrics=metrics, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    # The constant factor, such as the color of dSprites, is left out.
    assert found == disentanglement(
        test["x"][:, :4], test["factors"][:, 1:], metrics=metrics, seed=3
    )
    monkeypatch.setattr(codes_module, "rows_at_once", lambda width: 50)
    assert disentanglement_of(*pair, data, metrics=metrics, seed=3) == found
    some = disentanglement_of(*pair, data, split="train", rows=500, metrics=["mig"])
    assert some["mig"] == pytest.approx(found["mig"], abs=0.15)
    assert some != disentanglement_of(*pair, data, split="train", rows=500, metrics=["mig"], seed=1)


@pytest.mark.usefixtures("float64")
def test_data_without_factors_are_refused(pair):
    with pytest.raises(ValueError, match=r"columns x, but none of 'factors'.*sprites"):
        disentanglement_of(*pair, {"x": np.zeros((30, 5))})


@pytest.mark.usefixtures("float64")
def test_codes_are_all_local_latents(program):
    def story(self, x):
        pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("z2", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=x)

    def whole(self):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide_story(self, x):
        pyro.sample("z1", dist.Normal(x[:, :2], 1.0).to_event(1))
        pyro.sample("z2", dist.Normal(x[:, 1:].unsqueeze(-2) * torch.ones(2, 1), 1.0).to_event(2))

    model, guide = program(story, whole), program(guide_story, whole)
    x = torch.randn(7, 4)
    with torch.no_grad():
        codes = posterior_codes(model, guide, {"x": x})
    torch.testing.assert_close(codes, torch.cat([x[:, :2], x[:, 1:], x[:, 1:]], 1))
    no_latent = program(lambda self, x: pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x))
    with pytest.raises(ValueError, match="no local latent"):
        posterior_codes(no_latent, program(lambda self, x: None), {"x": x})
