"""Objectives in ``fit``: what is watched, kept, resumed and copied."""

from __future__ import annotations

import json

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.fitting import fit
from ppl_vae.guide import Factorized
from ppl_vae.loop import weights
from ppl_vae.models.ppca import PPCA
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
from ppl_vae.run import Run
from ppl_vae.training import Training

pytestmark = pytest.mark.usefixtures("float64")
OBJECTIVES = [
    Beta(4.0),
    Beta(4.0, draws=8),
    Capacity(2.0, 4.0),
    FreeBits(0.3, draws=8),
    IWAE(1),
    IWAE(8),
    StickingTheLanding(8),
    DReG(1),
    DReG(8),
    BetaTC(6.0),
    FactorVAE(nn.Linear(2, 1)),
    DIPVAE(1.0, 2.0),
    InfoVAE(),
]


class Spy(Factorized):
    """A guide that keeps what it was given and what it drew."""

    def forward(self, *args, **kwargs):
        values = super().forward(*args, **kwargs)
        self.last = values
        return values


def pair(seed=1, kind=Factorized):
    torch.manual_seed(seed)
    return PPCA(2, 3, scale=0.8), kind(z=(Normal(nn.Linear(3, 4)), ["x"]))


def fitted(data, objective, *programs, **options):
    fixed = {"compile": False, "progress": False, "precision": "64-true", "learning_rate": 1e-2}
    return fit(*(programs or pair()), data, objective=objective, **(fixed | options))


@pytest.fixture
def data():
    return {"train": torch.randn(50, 3), "validation": torch.randn(20, 3)}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_history_holds_the_plain_elbo_whatever_is_trained(objective, warmup):
    """In the first step, of the draws on which the loss is taken."""
    model, guide = pair(kind=Spy)
    result = fitted(
        {"train": torch.randn(30, 3)}, objective, model, guide,
        epochs=1, batch_size=30, warmup=warmup, learning_rate=1e-12,
    )  # fmt: skip
    x, z = guide.last["x"], guide.last["z"]
    assert z.shape == (objective.draws, 30, 2)
    q = guide.conditionals["z"](x)
    sigma = model.likelihood.log_scale.exp()
    seen = torch.distributions.Normal(model.likelihood.net(z), sigma).log_prob(x).sum(-1).mean()
    kl = (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()
    [row] = result.history
    assert row["reconstruction"] == pytest.approx(seen.item(), rel=1e-9)
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-9)
    assert row["elbo"] == pytest.approx((seen - kl).item(), rel=1e-9)


@pytest.mark.parametrize(
    "objective", [IWAE(3), DReG(3), StickingTheLanding(3), Beta(4.0, 3), Capacity(2.0, 0)], ids=repr
)
def test_parts_of_a_batch_add_up_where_rows_stand_alone(ppca, noise, objective):
    model, guide, x = ppca
    eps = torch.randn(objective.draws, 4, 2)
    held = [*model.parameters(), *guide.parameters()]
    found = []
    for parts, given in ((1, [eps]), (2, [eps[:, :2], eps[:, 2:]]), (3, eps.tensor_split(3, 1))):
        for p in held:
            p.grad = None
        noise(*given)
        training = Training(objective, 10, parts=parts)
        loss = training.loss_and_grads(model, guide, x, total=10)
        found.append((loss.detach(), training.terms.elbo, *(p.grad for p in held)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_run_keeps_its_objective_and_goes_on_with_no_other(data, tmp_path):
    objective = BetaTC(6.0, estimator="weighted")
    fitted(data, objective, out=tmp_path / "run", epochs=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["fit"]["objective"] == repr(objective)
    assert "estimator='weighted'" in repr(objective)
    again = BetaTC(6.0, estimator="weighted")
    fitted(data, again, out=tmp_path / "run", epochs=2, resume=True)
    for other in (BetaTC(6.0), BetaTC(5.0, estimator="weighted"), Beta(6.0), None):
        with pytest.raises(ValueError, match="was begun with objective=BetaTC"):
            fitted(data, other, out=tmp_path / "run", epochs=3, resume=True)


def test_patience_waits_for_the_capacity_to_be_reached(data):
    """With a KL that is held away from its best, validation gets worse from the first epoch on."""
    objective = Capacity(30.0, 8)
    history = fitted(data, objective, epochs=20, patience=2, learning_rate=0.1).history
    assert objective.capacity == 30
    best = max(history[7:], key=lambda row: row["validation_elbo"])["epoch"]
    assert len(history) == best + 2
    validation = [row["validation_elbo"] for row in history]
    assert validation.index(max(validation)) + 1 + 2 < 8, "it would have stopped before the end"


def test_capacity_is_that_of_the_epoch_when_a_run_goes_on(data, tmp_path):
    whole = fitted(data, Capacity(3.0, 6), out=tmp_path / "whole", epochs=4)
    fitted(data, Capacity(3.0, 6), out=tmp_path / "part", epochs=2)
    resumed = fitted(data, Capacity(3.0, 6), *pair(9), out=tmp_path / "part", epochs=4, resume=True)
    assert_same_runs(resumed, whole)
    checkpoint = Run.open(tmp_path / "part").latest()
    # The last step was the first half of the fourth epoch, or its second.
    assert 3 * 3 / 6 <= checkpoint.tensors["objective.capacity"] < 4 * 3 / 6


def assert_same_runs(one, other):
    ours, theirs = (weights(result.model, result.guide) for result in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    mine, expected = (Run.open(result.run.folder).latest().tensors for result in (one, other))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    for row, other_row in zip(one.history, other.history, strict=True):
        assert row | {"seconds": 0} == other_row | {"seconds": 0}


def discriminator(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def test_a_discriminator_is_resumed_to_the_same_bits(data, tmp_path):
    options = {"batch_size": 20}
    net = discriminator()
    whole = fitted(data, FactorVAE(net), out=tmp_path / "whole", epochs=4, **options)
    fitted(data, FactorVAE(discriminator()), out=tmp_path / "part", epochs=2, **options)
    other = discriminator(5)
    resumed = fitted(
        data, FactorVAE(other), *pair(9), out=tmp_path / "part", epochs=4, resume=True, **options
    )
    assert_same_runs(resumed, whole)
    held = Run.open(tmp_path / "part").latest().tensors
    assert sum(name.startswith("objective.") for name in held) == 4
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert torch.equal(value, held[f"objective.{name}"])


def correlated(rows):
    """Draws of correlated coordinates, and the same with the coordinates permuted."""
    z = torch.randn(rows, 1) + 0.5 * torch.randn(rows, 2)
    return z, torch.stack([z[torch.randperm(rows), d] for d in (0, 1)], 1)


class Near(nn.Module):
    """q(z | x) = Normal(x, 0.1), which learns nothing."""

    def forward(self, x):
        return dist.Normal(x, 0.1).to_event(1)


def test_the_discriminator_learns_to_tell_draws_apart():
    net = discriminator()

    def entropy():
        torch.manual_seed(3)
        z, permuted = correlated(5000)
        logits = net(z), net(permuted)
        softplus = nn.functional.softplus
        return (softplus(-logits[0]).mean() + softplus(logits[1]).mean()).item() / 2

    x, _ = correlated(400)
    before = entropy()
    model, guide = PPCA(2, 2), Factorized(z=(Near(), ["x"]))
    fitted({"train": x}, FactorVAE(net, 1.0), model, guide, epochs=60, batch_size=100)
    assert before > 0.68
    assert entropy() < 0.6


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replicas_have_discriminators_of_their_own(data, tmp_path, compiled):
    net = discriminator()
    before = [p.clone() for p in net.parameters()]
    model, guide = pair()
    options = {"compile": compiled, "seeds": 2, "epochs": 2, "precision": "32-true"}
    net.float(), model.float(), guide.float()
    fitted(data, FactorVAE(net), model, guide, out=tmp_path / "runs", **options)
    assert all(torch.equal(p, old.to(p)) for p, old in zip(net.parameters(), before, strict=True))
    left = []
    for seed in (0, 1):
        run = Run.open(tmp_path / "runs" / f"seed-{seed}")
        left.append(run.latest().tensors)
        assert bool(run.record["compiled_batches"]) is compiled
    names = [name for name in left[0] if name.startswith("objective.")]
    assert len(names) == 4
    for name in names:
        own = net.state_dict()[name.removeprefix("objective.")]
        assert not torch.equal(left[0][name], left[1][name])
        assert not torch.equal(left[0][name], own)
