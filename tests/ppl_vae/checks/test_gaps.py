"""Gaps against models whose evidence, and whose best q of a family, are known."""

from __future__ import annotations

import math
import runpy
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from benchmarks.conjugate import Clusters, exact
from ppl_vae.checks.gaps import gaps
from ppl_vae.checks.result import CheckResult, NotApplicable
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized, Prior
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.categorical_vae import CategoricalVAE
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

OPTIONS: dict[str, Any] = {
    "steps": 150,
    "draws": 8,
    "learning_rate": 0.1,
    "samples": 1000,
    "compile": False,
}


class Asis(nn.Module):
    """An encoder whose features are the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def linear(float64):
    model = PPCA(2, 4, scale=0.7)
    with torch.no_grad():
        model.likelihood.net.weight[:, 1] += 0.7 * model.likelihood.net.weight[:, 0]
    return model, {"train": model.simulate(6)["x"], "test": model.simulate(5)["x"]}


def exact_guide(model: PPCA, factor: float = 1.0) -> FullRank:
    """The posterior, its standard deviations times a factor, by the weights of a full-rank guide:
    its location is linear in x, its factor is the same for all x."""
    guide = FullRank(model, Asis(), torch.zeros(2, 4))
    with torch.no_grad():
        rows = torch.cat([torch.zeros(1, 4), torch.eye(4)])
        q = model.posterior(rows)
        tril = factor * q.scale_tril[0]
        loc = q.mean
        guide.head.weight.zero_()
        guide.head.weight[:2] = (loc[1:] - loc[0]).T
        guide.head.bias[:2] = loc[0]
        guide.head.bias[2:4] = tril.diagonal().expm1().log()
        guide.head.bias[4:] = tril[1, 0]
    return guide


def of_rows(result: CheckResult, name: str) -> Tensor:
    return torch.from_numpy(result.groups["gaps"][name].values)


def both(data: dict[str, Tensor]) -> Tensor:
    """All rows, in the order of the result's: a subset as large as the split is all, ascending."""
    return torch.cat([data["train"], data["test"]])


def near(found: Tensor, expected: Tensor | float, atol: float) -> None:
    expected = torch.as_tensor(expected).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_the_exact_posterior_has_no_gaps(linear) -> None:
    model, data = linear
    result = gaps(model, exact_guide(model), data, **OPTIONS)
    evidence = model.evidence(both(data)).detach()
    near(of_rows(result, "elbo"), evidence, 1e-9)
    near(of_rows(result, "log_evidence"), evidence, 1e-2)
    for name in ("inference", "amortization", "approximation", "by_full_rank", "rest"):
        near(of_rows(result, name), 0.0, 5e-2)
    assert result.verdict == "measured"
    assert result.p is None
    assert "nothing need be done" in result.meaning


def test_a_wrong_scale_is_all_of_it_the_encoders(linear) -> None:
    model, data = linear
    factor = 0.5
    result = gaps(model, exact_guide(model, factor), data, **OPTIONS)
    kl = factor**2 - 1 - 2 * math.log(factor)  # of two coordinates, each half of it
    near(of_rows(result, "inference"), kl, 0.15)
    near(of_rows(result, "inference").mean(), kl, 0.05)
    near(of_rows(result, "amortization").mean(), kl, 0.05)
    near(of_rows(result, "approximation"), 0.0, 0.05)
    assert "SemiAmortized" in result.meaning


def test_a_mean_field_guide_splits_as_in_closed_form(linear) -> None:
    model, data = linear
    guide = MeanField(model, MLP(4, 8, 3), data["train"])
    result = gaps(model, guide, data, **OPTIONS | {"steps": 300})
    x = both(data)
    with torch.no_grad():
        posterior, evidence = model.posterior(x), model.evidence(x)
        q = guide.posterior(x).base_dist
        q = dist.MultivariateNormal(q.loc, q.scale.square().diag_embed())
        inference = torch.distributions.kl_divergence(q, posterior)
        precision = posterior.precision_matrix
        diagonal = precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        approximation = 0.5 * (diagonal - precision.logdet()).expand(len(x))
    near(of_rows(result, "log_evidence"), evidence, 0.02)
    near(of_rows(result, "inference").mean(), inference.mean(), 0.1)
    near(of_rows(result, "approximation"), approximation, 0.1)
    near(of_rows(result, "amortization").mean(), (inference - approximation).mean(), 0.1)
    near(of_rows(result, "rest"), 0.0, 0.03)  # a normal with covariances is the posterior
    near(of_rows(result, "by_full_rank"), approximation, 0.1)
    assert approximation.mean() > 0.15


def test_two_levels_together_reach_the_evidence(float64, program) -> None:
    def story(self, x):
        one = torch.ones(1)
        z2 = pyro.sample("z2", dist.Normal(0 * one, one).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z1, 0.5).to_event(1), obs=x)

    model = program(story)
    x = dist.Normal(0.0, 1.5).sample((8, 1))
    result = gaps(model, MeanField(model, MLP(1, 4, 3), x), {"train": x, "test": x}, **OPTIONS)
    x = both({"train": x, "test": x})
    evidence = dist.Normal(0.0, math.sqrt(2.25)).log_prob(x).sum(-1)
    # Precision of (z2, z1) given x: [[2, -1], [-1, 1 + 1 / 0.25]].
    approximation = 0.5 * math.log(2 * 5 / (2 * 5 - 1))
    near(of_rows(result, "log_evidence"), evidence, 0.02)
    near(of_rows(result, "approximation"), approximation, 0.08)
    near(of_rows(result, "rest"), 0.0, 0.02)


@pytest.mark.parametrize("estimator", ["enumerate", "score", "relaxed"])
def test_a_class_is_summed_out_whatever_its_estimator(float64, estimator) -> None:
    model = Clusters()
    x = model.simulate(8)["x"]
    head = Labels(nn.Linear(2, 4), estimator=estimator)
    guide = Factorized(y=(head, ["x"]))
    options = OPTIONS | {"draws": 1, "samples": 8, "steps": 200}
    result = gaps(model, guide, {"train": x, "test": x}, **options)
    with torch.no_grad():
        p = model.posterior(x)
        kl = torch.distributions.kl_divergence(head.eval()(x), p)
        logits = model.logits.log_softmax(0)
        density = dist.Normal(model.means, 1.0).log_prob(x.unsqueeze(1)).sum(-1)
        evidence = (logits + density).logsumexp(-1)
    near(of_rows(result, "log_evidence")[:8], evidence, 1e-9)
    near(of_rows(result, "inference")[8:], kl, 1e-6)
    near(of_rows(result, "approximation"), 0.0, 3e-2)
    assert "No normal with all covariances" in result.meaning


def test_a_global_latent_is_held(float64, program) -> None:
    def whole(self):
        self.w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def story(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + self.w, 1.0).to_event(1), obs=x)

    model = program(story, whole)
    x = dist.Normal(0.0, 1.5).sample((6, 2))
    guide = MeanField(model, MLP(2, 4, 3), x)
    with torch.no_grad():
        for name, parameter in guide.global_guide.named_parameters():
            parameter.fill_(-12.0 if "scale" in name else 0.7)  # w is 0.7
    result = gaps(model, guide, {"train": x, "test": x}, **OPTIONS)
    evidence = dist.Normal(0.7, math.sqrt(2)).log_prob(both({"train": x, "test": x})).sum(-1)
    near(of_rows(result, "log_evidence"), evidence, 0.02)
    near(of_rows(result, "approximation"), 0.0, 0.05)  # coordinates are independent


@pytest.mark.slow
def test_withheld_labels_are_summed_out(labeled_recipes) -> None:
    recipe = runpy.run_path(str(labeled_recipes))["bits"]()
    found = []
    for estimator in ("enumerate", "score"):
        recipe.guide.conditionals["y"].estimator = estimator
        options = OPTIONS | {"steps": 30, "rows": 20, "draws": 2}
        found.append(gaps(recipe.model, recipe.guide, recipe.data, **options))
    one, other = (of_rows(result, "log_evidence") for result in found)
    near(one, other, 0.1)  # log p(x), whichever way the guide is trained
    assert (of_rows(found[0], "amortization").mean() > 0.05).all()


def test_refining_is_never_worse_than_the_guide(linear) -> None:
    """With steps that only do harm, every row keeps what it had."""
    model, data = linear
    harm = OPTIONS | {"steps": 3, "learning_rate": 50.0}
    result = gaps(model, exact_guide(model), data, **harm)
    assert (of_rows(result, "amortization") == 0).all()
    assert (of_rows(result, "by_full_rank").abs() < 1e-6).all()


def test_records_pictures_and_random_state(linear) -> None:
    model, data = linear
    guide = MeanField(model, MLP(4, 8, 3), data["train"])
    quick = OPTIONS | {"steps": 5, "samples": 40, "rows": 3}
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    result = gaps(model, guide, data, **quick)
    assert torch.equal(torch.rand(1), expected)
    again = gaps(model, guide, data, **quick)
    assert result.to_json() == again.to_json()
    assert gaps(model, guide, data, seed=1, **quick).to_json() != result.to_json()
    assert len({tuple(record) for record in result.statistics}) == 1
    value = {(r["split"], r["figure"]): r["value"] for r in result.statistics}
    for split in ("train", "test"):
        parts = ("amortization gap", "approximation gap")
        total = sum(value[split, part] for part in parts)
        assert value[split, "inference gap"] == pytest.approx(total)
    assert value["test less train", "amortization gap"] == pytest.approx(
        value["test", "amortization gap"] - value["train", "amortization gap"]
    )
    group = result.groups["gaps"]
    assert group.sizes["row"] == 6
    assert group["split"].values.tolist() == ["train"] * 3 + ["test"] * 3
    assert np.isfinite(group["amortization"].values).all()
    assert next(iter(result.pictures)) == result.name
    for picture in result.pictures:
        assert result.plot(picture).axes


def test_not_applicable(float64, linear) -> None:
    model, data = linear
    with pytest.raises(NotApplicable, match="Factorized has no net"):
        gaps(model, exact(model), data)
    with pytest.raises(NotApplicable, match="has no net"):
        gaps(model, Prior(model), data)
    discrete = CategoricalVAE.toy().double()
    x = discrete.simulate(4)["x"]
    guide = MeanField(discrete, MLP(x.shape[-1], 8, 4), x)
    with pytest.raises(NotApplicable, match="values cannot be listed"):
        gaps(discrete, guide, {"train": x, "test": x})


@pytest.mark.parametrize("fault", [{"rows": 1}, {"samples": 7}, {"steps": 0}])
def test_refuses_settings(linear, fault) -> None:
    model, data = linear
    guide = MeanField(model, MLP(4, 8, 3), data["train"])
    with pytest.raises(ValueError, match="expected at least"):
        gaps(model, guide, data, **fault)
