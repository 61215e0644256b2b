from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from matplotlib.patches import Rectangle
from torch import nn

from ppl_vae import evaluate
from ppl_vae.calibration import (
    LabelPosterior,
    calibrated_accuracy,
    expected_calibration_error,
    reliability,
)
from ppl_vae.checks import check, label_calibration, label_posterior, unknown_classes
from ppl_vae.checks.labels import calibration_test
from ppl_vae.data import as_dataset
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models._labels import LabeledModel
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

CENTERS = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5]])


class Clouds(LabeledModel):
    """A cloud of unit variance a class, and a latent that says nothing."""

    def __init__(self):
        super().__init__(3)
        self.prior, self.centers = StandardNormal(1), nn.Parameter(CENTERS.clone())

    def tell(self, y, x):
        pyro.sample("z", self.prior())
        return pyro.sample("x", dist.Normal(y @ self.centers, 1.0).to_event(1), obs=x)


class Apart(nn.Module):
    """A conditional that ignores its context."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        return self.prior()


def clouds(sharper=1.0):
    """The model, and a guide whose classifier is the posterior, its logits times ``sharper``."""
    model, net = Clouds(), nn.Linear(2, 3)
    with torch.no_grad():
        net.weight.copy_(sharper * CENTERS)
        net.bias.copy_(-sharper * CENTERS.square().sum(1) / 2)
    return model, Factorized(
        y=(Labels(net, estimator="enumerate"), ["x"]), z=(Apart(model.prior), ["x"])
    )


def simulated(model, rows, seed=0):
    torch.manual_seed(seed)
    drawn = model.simulate(rows)
    columns = {"x": drawn["x"], "y": drawn["y"].argmax(1)}
    return as_dataset({"train": columns, "test": columns}).labeled(6)


def calibrated(rows, seed):
    """Probabilities by one coordinate, and by both, of labels of clouds: both are right."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=stream)
    x = CENTERS[labels] + torch.randn(rows, 2, generator=stream)
    log_p = dist.Normal(CENTERS, 1.0).log_prob(x[:, None]).double()  # (rows, K, 2)
    return LabelPosterior(
        log_p[..., 0].softmax(1), log_p.sum(-1).softmax(1), torch.zeros(rows), labels
    )


def test_p_values_are_uniform_and_the_error_rate_is_as_stated():
    p, fails = [], []
    for seed in range(200):
        records, _ = calibration_test(
            calibrated(120, seed), level=0.05, replicates=99, bins=10, seed=seed
        )
        p.append([record["p"] for record in records])
        fails.append(any(record["verdict"] == "fail" for record in records))
    for own in np.array(p).T:
        # p lies on a grid of 0.01: half a step is taken off, so that a continuous law fits.
        assert scipy.stats.kstest(own - 0.005, "uniform").pvalue > 0.001
    assert np.mean(fails) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize(("sharper", "how"), [(3.0, "over-confident"), (0.4, "under-confident")])
def test_a_classifier_that_is_not_calibrated_is_found(sharper, how):
    model, guide = clouds(sharper)
    result = label_calibration(model, guide, simulated(model, 400), samples=1)
    verdicts = {record["source"]: record["verdict"] for record in result.statistics}
    assert verdicts == {"classifier": "fail", "importance": "pass"}
    assert result.verdict == "fail"
    assert f"mostly {how} (classifier" in result.meaning
    record = result.statistics[0]
    assert record["p"] == 0.001
    assert record["calibration_error"] > record["replicated_mean"] + 3 * record["replicated_sd"]


def test_right_probabilities_pass():
    model, guide = clouds()
    result = label_calibration(model, guide, simulated(model, 400), samples=1)
    assert result.passed
    assert "could have been drawn" in result.meaning
    # The latent says nothing: classifier and importance sampling are alike.
    one, two = result.statistics
    assert one["p"] == pytest.approx(two["p"], abs=0.01)
    assert one["log_loss"] == pytest.approx(two["log_loss"], rel=1e-4)


def test_accuracies_of_right_probabilities():
    """Mean and variance of each bin, of a sum of independent bits."""
    posterior = calibrated(300, 3)
    p = posterior.classifier
    drawn = calibrated_accuracy(p, 7, replicates=4000, seed=1)
    found = reliability(p, posterior.known(), 7)
    confidence = p.max(1).values
    bins = (confidence * 7).long().clamp(max=6)
    variance = torch.bincount(bins, confidence * (1 - confidence), minlength=7)
    variance = variance[variance > 0].numpy() / found.rows**2
    z = (drawn.mean(0) - found.confidence) / np.sqrt(variance / 4000)
    assert np.abs(z).max() < 4
    assert drawn.var(0) == pytest.approx(variance, rel=0.12)
    with pytest.raises(ValueError, match="replicates=0"):
        calibrated_accuracy(p, replicates=0)


def test_the_statistic_is_the_calibration_error():
    posterior = calibrated(200, 5)
    records, drawn = calibration_test(posterior, level=0.05, replicates=50, bins=15, seed=0)
    for record in records:
        p = posterior.probabilities[record["source"]]
        expected = expected_calibration_error(p, posterior.known())
        assert record["calibration_error"] == pytest.approx(expected, abs=1e-12)
        as_large = (drawn[record["source"]] >= expected - 1e-12).sum()
        assert record["p"] == (1 + as_large) / 51


def test_the_posterior_is_that_of_quadrature(float64):
    torch.manual_seed(2)
    model = M2(StandardNormal(1), Bernoulli(MLP(3 + 1, 8, 5)), classes=3)
    guide = Factorized(
        y=(Labels(MLP(5, 8, 3), estimator="score"), ["x"]),
        z=(Apart(model.prior), ["x"]),
    )
    x = torch.bernoulli(torch.full((4, 5), 0.5))
    labels = torch.tensor([0, 1, 2, 0])
    data = as_dataset({"train": {"x": x, "y": labels}, "test": {"x": x, "y": labels}})
    posterior = label_posterior(model, guide, data, samples=20000)
    grid = torch.linspace(-9, 9, 2001)
    each = torch.stack(
        [model.x_dist(y.expand(2001, 1, 3), grid[:, None, None]).log_prob(x) for y in torch.eye(3)],
        -1,
    )  # (grid, rows, K)
    prior = dist.Normal(0.0, 1.0).log_prob(grid)[:, None, None] + np.log(18 / 2000 / 3)
    joint = (each + prior).logsumexp(0).detach()
    assert posterior.importance.numpy() == pytest.approx(joint.softmax(1).numpy(), abs=0.01)
    assert posterior.log_evidence.numpy() == pytest.approx(joint.logsumexp(1).numpy(), abs=0.02)
    expected = guide.conditionals["y"](x).probs
    assert torch.allclose(posterior.classifier, expected.detach())
    assert torch.equal(posterior.known(), labels)
    assert posterior.scores()["classifier"].rows == 4


def test_evaluation_has_the_same_scores():
    model, guide = clouds(2.0)
    data = simulated(model, 60)
    posterior = label_posterior(model, guide, data, samples=5, seed=3)
    figures = evaluate(model, guide, data, samples=5, seed=3)
    assert figures.labels == posterior.scores()
    assert figures.nll == pytest.approx(-posterior.log_evidence.mean().item())


def test_unknown_classes_are_told_by_the_evidence_alone():
    model, guide = clouds()
    known = simulated(model, 150)
    torch.manual_seed(7)
    far = torch.tensor([9.0, 0.0]) + torch.randn(80, 2)  # beyond the first cloud
    found = unknown_classes(model, guide, known, {"train": far, "test": far}, samples=2)
    assert found.auroc["evidence"] > 0.99
    # So far beyond, the classifier is surer than ever.
    assert found.auroc["classifier"] < 0.1
    assert found.unknown.labels is None
    assert len(found.known.log_evidence) == 150
    inside, outside = (p.classifier.max(1).values for p in (found.known, found.unknown))
    below = (outside < inside[:, None]).double() + 0.5 * (outside == inside[:, None])
    assert found.auroc["classifier"] == pytest.approx(below.mean().item())
    axes = found.plot().axes
    assert [ax.get_title() for ax in axes] == [f"AUROC {a:.3f}" for a in found.auroc.values()]
    with pytest.raises(ValueError, match="no labels to compare with"):
        found.unknown.scores()


def test_labels_of_unknown_classes_may_be_any():
    model, guide = clouds()
    columns = {"x": torch.randn(20, 2), "y": torch.full((20,), 7)}
    unknown = as_dataset({"train": columns, "test": columns})
    assert unknown_classes(model, guide, simulated(model, 30), unknown, samples=1).auroc


def test_what_cannot_be_tested_is_refused():
    model, guide = clouds()
    data = simulated(model, 30)
    with pytest.raises(ValueError, match="even the worst model would pass; expected at least 39"):
        label_calibration(model, guide, data, replicates=38)
    with pytest.raises(ValueError, match="level=2"):
        label_calibration(model, guide, data, level=2)
    with pytest.raises(ValueError, match="no label that the model infers is withheld"):
        label_calibration(model, guide, data.without_labels(), samples=1)
    with pytest.raises(ValueError, match="no observable 'label'"):
        label_posterior(model, guide, data, withheld=["label"])
    with pytest.raises(ValueError, match="Clouds infers no site of"):
        label_posterior(model, guide, data, withheld=[])


def test_check_reports_labels_where_some_are_withheld(tmp_path):
    import matplotlib.pyplot as plt

    model, guide = clouds()
    data = simulated(model, 60)
    options: dict[str, Any] = {
        "only": ["population_predictive", "label_calibration"],
        "population_predictive": {"replicates": 300},
        "to_arviz": {"rows": 5, "draws": 4},
    }
    report = check(model, guide, data, out=tmp_path, label_calibration={"samples": 2}, **options)
    assert [r.name for r in report.results] == ["population_predictive", "label_calibration"]
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "population_predictive.png",
        "population_predictive-x-pit.png",
        "population_predictive-y-pava.png",
        "label_calibration.png",
        "label_calibration-confusion.png",
        "label_calibration-pava.png",
    }
    assert not plt.get_fignums()
    assert json.loads((tmp_path / "check.json").read_text()) == report.to_json()
    group = report.idata["label_posterior"].to_dataset()
    assert group["classifier"].shape == (60, 3)
    assert np.array_equal(group["label"].to_numpy(), data.splits["test"]["y"].numpy())
    assert report.idata["label_calibration"].sizes["draw"] == 999
    train = data.splits["test"]
    known = as_dataset({"train": train, "test": train})
    assert [r.name for r in check(model, guide, known, **options).results] == [
        "population_predictive"
    ]


def test_figures_hold_what_was_found():
    model, guide = clouds(3.0)
    result = label_calibration(model, guide, simulated(model, 200), samples=1)
    diagram = result.plot()
    line = next(one for one in diagram.axes[0].lines if one.get_label() == "data")
    posterior = label_posterior(model, guide, simulated(model, 200), samples=100)
    found = reliability(posterior.classifier, posterior.known())
    assert np.allclose(line.get_xydata(), np.stack([found.confidence, found.accuracy], 1))
    assert line.get_color() == "C3"
    heights = [cast(Rectangle, patch).get_height() for patch in diagram.axes[2].patches]
    assert heights == found.rows.tolist()
    table = np.zeros((3, 3))
    for text in result.plot("confusion").axes[0].texts:
        column, row = text.get_position()
        table[int(row), int(column)] = int(text.get_text())
    counts = np.zeros((3, 3))
    for truth, chosen in zip(posterior.known(), posterior.classifier.argmax(1), strict=True):
        counts[truth, chosen] += 1
    assert np.array_equal(table, counts)
    pava = result.plot("pava")
    lines = [y for one in pava.axes[0].lines if len(y := np.asarray(one.get_ydata())) == 200]
    assert lines
    assert (np.diff(lines[0]) >= 0).all()


def test_repeatable_and_leaves_the_random_state():
    model, guide = clouds()
    data = simulated(model, 50)
    state = torch.get_rng_state()
    one, two = (label_calibration(model, guide, data, samples=2, seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert one.to_json() == two.to_json()
