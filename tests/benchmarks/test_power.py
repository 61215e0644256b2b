from __future__ import annotations

import pytest
import torch

from benchmarks import power
from benchmarks.faults import FAULTS, SOUND, LabeledPPCA, Unscaled, fitted_ppca, ppca, rows_of
from ppl_vae.checks import CHECKS


def test_rates_are_shares_of_reports():
    verdicts = [
        {"support": "pass", "structure": "fail", "evidence": "fail"},
        {"support": "pass", "structure": "fail", "evidence": "measured"},
        {"support": "pass", "structure": "pass", "evidence": "it does not apply"},
        {"support": "fail", "structure": "not run", "evidence": "not run", "row_order": "no rows"},
    ]
    assert power.rates(verdicts) == {
        "report": 0.75,
        "support": 0.25,
        "structure": 0.5,
        "evidence": 0.25,
    }


def test_tables_name_what_fails_and_sum_up_false_alarms():
    result = power.record(
        "power",
        "cpu",
        level=0.05,
        replications=50,
        rates={
            "mode dropped": {"report": 1.0, "evidence": 0.5, "structure": 0.0, "row_order": 0.98},
            "PPCA": {"report": 0.02, "evidence": 0.02},
            "two modes": {"report": 0.0},
        },
    )
    text = power.show(result)
    line = next(line for line in text.splitlines() if line.startswith("| mode dropped"))
    assert "| 100 % " in line
    assert "row order 98 %, evidence 50 %" in line
    assert "structure" not in line
    assert "False alarms of the whole report: 1.0% +- 1.0% of 100 reports" in text


def test_maximum_likelihood_of_ppca_cannot_be_improved(float64):
    """Against the gradient of the closed-form evidence."""
    x = rows_of(ppca()).splits["train"]["x"]
    model = fitted_ppca(x, 2)
    model.evidence(x).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-6, name
    other = fitted_ppca(x[:40], 2)
    assert other.evidence(x).mean() < model.evidence(x).mean()


def test_the_posterior_given_labels_is_exact(float64):
    """Every draw's weight is the evidence."""
    model = LabeledPPCA()
    drawn = model.simulate(3)
    x, y = drawn["x"], drawn["y"]
    with torch.no_grad():
        q = model.posterior(x, y)
        z = q.sample((5,))
        joint = model.x_dist(y, z).log_prob(x) + model.z_dist().log_prob(z)
    weights = joint - q.log_prob(z)
    assert torch.allclose(weights, weights[:1].expand(5, 3))


def test_a_model_that_ignores_total():
    model = Unscaled(2, 6)
    x = torch.zeros(4, 6)
    traces = [torch.manual_seed(0) and model(x, total=total) for total in (None, 40)]
    assert torch.equal(*traces)


@pytest.mark.parametrize(
    ("name", "check"),
    [("Bernoulli for grey", "support"), ("missing plate scale", "structure")],
)
def test_faults_that_no_chance_hides(name, check):
    assert power.replicate(name, 0)[check] == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "correlations lost"])
def test_each_fault_is_found(name):
    """But for lost correlations, which may be weak: three of four are."""
    verdicts = [power.replicate(name, seed) for seed in range(4)]
    assert all("fail" in one.values() for one in verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_passes(name):
    """Seeds on which it does; how often it does not is measured, not tested."""
    verdicts = power.replicate(name, 0)
    assert "fail" not in verdicts.values()
    assert set(verdicts) == set(CHECKS) - set(power.SKIPPED)
