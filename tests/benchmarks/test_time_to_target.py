"""Time to a target is counted right, and both contenders train to the same weights."""

from __future__ import annotations

import json
import time

import pyro.infer
import pytest
import torch

from benchmarks import fits, time_to_target
from benchmarks.agreement import Disagreement
from benchmarks.looks import Look, Stopwatch, Watch, first_within, thinned
from ppl_vae.recipes import build

ALIKE = {"epochs": 2, "batch_size": 63, "warmup": 2.0, "schedule": "cosine"}
"""Batches that divide the 1,197 rows; a warm-up and rates that change from step to step."""


def start(chosen=ALIKE):
    made = build("vae-digits", {"latents": 3, "hidden": 16}, 0)
    return made, fits.settings_of(made, chosen)


def watch(made, draws=5):
    return Watch(made, thinned(made.data), lambda epoch: True, draws)


def test_the_first_look_within_the_target_counts():
    curve = [Look(1, 2.0, 99.0), Look(2, 4.0, 90.0), Look(3, 6.0, 91.0), Look(4, 8.0, 80.0)]
    assert first_within(curve, 90.0) == curve[1]
    assert first_within(curve, 85.0) == curve[3]
    assert first_within(curve, 79.9) is None


def test_the_clock_stands_still_while_it_is_stopped(monkeypatch):
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Stopwatch()
    now = 13.0
    with clock.stopped() as shown:
        now = 50.0
    now = 52.0
    assert (shown, clock.seconds) == (3.0, 5.0)


@pytest.mark.parametrize("elbo", fits.ELBOS)
def test_weighted_losses_agree(elbo):
    fits.check(*start(), elbo, weight=0.3)


def test_a_kl_that_is_not_weighted_is_found(monkeypatch):
    monkeypatch.setattr(fits.Annealed, "_pyro_sample", lambda self, msg: None)
    with pytest.raises(Disagreement):
        fits.check(*start(), "Trace_ELBO", weight=0.3)


def test_both_contenders_train_to_the_same_weights():
    pairs, curves = [], []
    for contender in (fits.ours, fits.by_pyro):
        made, settings = start()
        looks = watch(made)
        found = contender(made, settings, "Trace_ELBO", looks)
        pairs.append([*made.model.parameters(), *made.guide.parameters()])
        curves.append(looks.curve)
        assert 0 < found["step_seconds"] < looks.curve[-1].seconds
        assert [look.epoch for look in looks.curve] == [1, 2]
    # A step changes a weight by up to 2e-3; another eps of Adam, by 1e-5.
    for own, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-6)
    for own, theirs in zip(*curves, strict=True):
        assert own.nll == pytest.approx(theirs.nll, rel=1e-6)


def test_looks_are_at_the_averages_with_which_the_fit_ends():
    made, settings = start(ALIKE | {"epochs": 6})
    looks = watch(made)
    fits.ours(made, settings, "Trace_ELBO", looks, average=3)
    ended = looks.figures(looks.split)["nll"]
    assert looks.curve[-1].nll == pytest.approx(ended, rel=1e-6)
    plain, settings = start(ALIKE | {"epochs": 6})
    looks = watch(plain)
    fits.ours(plain, settings, "Trace_ELBO", looks)
    assert looks.curve[-1].nll != pytest.approx(ended, rel=1e-4)


@pytest.mark.parametrize("validated", [True, False])
def test_pyro_validates_as_it_comes(validated, monkeypatch):
    seen = set()

    def step(self, *args, **kwargs):
        seen.add(torch.distributions.Normal(0.0, 1.0)._validate_args)

    monkeypatch.setattr(pyro.infer.SVI, "step", step)
    made, settings = start(ALIKE | {"schedule": None, "epochs": 1})
    fits.by_pyro(made, settings, "Trace_ELBO", watch(made, 1), validated=validated)
    assert seen == {validated}


def test_what_pyro_does_not_do_is_refused():
    made, _ = start()
    made.fit["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0"):
        fits.settings_of(made, {})
    with pytest.raises(ValueError, match="plateau"):
        fits.schedule_of({"schedule": "plateau", "epochs": 1})


def test_the_command_reports_both(capsys):
    options = (
        "--recipe vae-digits --targets 1e4,1 --epochs 3 --every 2 --draws 5 --split test --json"
    )
    time_to_target.main([*options.split(), "--threads", str(torch.get_num_threads())])
    result = json.loads(capsys.readouterr().out)
    assert list(result["contenders"]) == ["ours", "pyro"]
    for figures in result["contenders"].values():
        assert {"seconds", "compile_seconds", "ms_a_step", "test", "load"} <= set(figures)
        assert [look["epoch"] for look in figures["curve"]] == [2, 3]
        assert figures["reached"] == {"10000": figures["curve"][0], "1": None}
        assert figures["steps"] == 3 * 24
        assert figures["test"]["rows"] == 30
        assert figures["curve"][-1]["nll"] == figures["test"]["nll"]
    assert "not reached" in time_to_target.show(result)
