"""The benchmarks' programs are sound, and what is timed against each other computes the same."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import agreement, by_hand
from benchmarks.contender import Absent, Contender, Task, make
from benchmarks.programs import pair
from benchmarks.sizes import SIZES
from benchmarks.targets import Target
from ppl_vae.model import ROWS
from ppl_vae.objectives import backward
from ppl_vae.sites import check_pair, read_sites

sizes = pytest.mark.parametrize("size", SIZES)
one_of_each_program = pytest.mark.parametrize("size", ["tiny", "two-level", "m2", "belief-net"])


PRECISION = 1e-3  # relative: a few draws are enough for it


def small(size: str) -> Task:
    return Task.make(replace(SIZES[size], batch=8), batches=2)


@sizes
def test_model_and_guide_fit_each_other(size: str) -> None:
    task = small(size)
    programs = pair(task.size, task.nets())
    check_pair(programs.model, programs.guide, task.batches[0])


@pytest.mark.parametrize("size", ["two-level", "m2", "belief-net"])
def test_story_has_a_line_a_site_with_its_plate_and_event_shape(size: str) -> None:
    model = pair(SIZES[size], SIZES[size].build()).model
    lines = re.findall(
        r"^ *(\w+)_n +~ .+# +\w+ +(\w+) \| (\w+)$", inspect.getdoc(model) or "", re.M
    )
    sites = read_sites(model, n=3)
    assert [name for name, _, _ in lines] == list(sites)
    widths: dict[str, int] = {}
    for name, plate, symbol in lines:
        assert sites[name].plates == (plate,) == (ROWS,)
        assert sites[name].event_shape == (widths.setdefault(symbol, *sites[name].event_shape),)


@sizes
def test_a_gradient_reaches_every_parameter(size: str) -> None:
    task = small(size)
    nets = task.nets()
    programs = pair(task.size, nets)
    held = {*programs.model.parameters(), *programs.guide.parameters()}
    assert held == set(nets.parameters())
    backward(programs.elbo(), programs.model, programs.guide, task.batches[0])
    for name, parameter in nets.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def contender(name: str, task: Task) -> Contender:
    try:
        return make(name, task)
    except Absent as reason:
        pytest.skip(str(reason))


@one_of_each_program
@pytest.mark.parametrize("name", ["hand", "ours eager", "pyro", "numpyro", "pythae"])
def test_contenders_compute_the_same_loss(name: str, size: str) -> None:
    task = small(size)
    means = agreement.check(task, {name: contender(name, task)}, PRECISION)
    assert means[name].error <= PRECISION * means[name].mean


@one_of_each_program
@pytest.mark.parametrize("name", ["hand", "ours eager"])
def test_a_contender_with_another_bias_is_refused(name: str, size: str) -> None:
    task = small(size)
    honest = contender(name, task)

    def load(weights: dict[str, torch.Tensor]) -> None:
        bias = [key for key in weights if key.startswith("decoder") and key.endswith("bias")][-1]
        honest.load({**weights, bias: weights[bias] + 0.5})

    with pytest.raises(agreement.Disagreement, match=f"^{name}: "):
        agreement.check(task, {name: replace(honest, load=load)}, PRECISION)


@one_of_each_program
@pytest.mark.parametrize("factor", ["objective", "loss"])
def test_a_wrong_formula_by_hand_is_found(
    factor: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small(size)
    right = by_hand.LOSSES[task.size.program]

    def wrong(nets, x):
        objective, loss = right(nets, x)
        off = 1 + 1e-5
        return (objective * off, loss) if factor == "objective" else (objective, loss * off)

    monkeypatch.setitem(by_hand.LOSSES, task.size.program, wrong)
    with pytest.raises(agreement.Disagreement, match=r"gradients|a loss of"):
        agreement.check_by_hand(task)


@one_of_each_program
@pytest.mark.parametrize("name", ["hand", "pyro"])
def test_loading_undoes_steps(name: str, size: str) -> None:
    """Else the losses of a check would be of weights that have moved."""
    task = small(size)
    made = contender(name, task)
    made.run(5)
    agreement.check(task, {name: made}, PRECISION)


def test_steps_train() -> None:
    task = small("tiny")
    made = make("hand", task)
    assert made.run(100) < agreement.by_hand(task, PRECISION).mean - 50


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("hand graph", "tiny", "CUDA"),
        ("numpyro", "m2", "numpyro|NumPyro"),
        ("pythae", "m2", "pythae"),
    ],
)
def test_absent_contenders_say_why(name: str, size: str, reason: str) -> None:
    with pytest.raises(Absent, match=reason):
        make(name, small(size))


def test_a_target_takes_the_fastest_of_several_contenders() -> None:
    target = Target("cpu", "tiny", ("ours",), ("a", "b"), at_most=1.0)
    assert target.row({"ours": 2.0, "a": 4.0, "b": 1.0})[-2:] == ("2.00", "no")
    assert target.row({"ours": 2.0, "a": 4.0})[-2:] == ("0.50", "yes")
    assert target.row({"ours": 2.0})[-2:] == ("not measured", "")
