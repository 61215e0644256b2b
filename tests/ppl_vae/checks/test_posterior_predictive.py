from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_vae.checks.posterior_predictive import posterior_predictive
from ppl_vae.checks.result import NotApplicable
from ppl_vae.model import GenerativeModel

REPLICATES = 100


class Shared(GenerativeModel):
    """w ~ Normal(0, I), x ~ Normal(w, 1): all rows have one mean."""

    def forward(self, x=None, *, n=None, total=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with self.rows(x, n=n, total=total):
            return pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


class GivenOthers(GenerativeModel):
    """p(w | other rows), exactly."""

    def __init__(self, others):
        super().__init__()
        self.mean, self.scale = others.sum(0) / (1 + len(others)), (1 + len(others)) ** -0.5

    def forward(self, x=None, *, n=None, total=None):
        pyro.sample("w", dist.Normal(self.mean, self.scale).to_event(1))


class Kinds(GenerativeModel):
    """c ~ Bernoulli(1/2), z ~ Normal(6 c, 1), x ~ Normal(z - 6 c, 1): x has one law for both c."""

    def forward(self, x=None, c=None, *, n=None, total=None):
        with self.rows(x, c, n=n, total=total):
            c = pyro.sample("c", dist.Bernoulli(torch.full((1,), 0.5)).to_event(1), obs=c)
            z = pyro.sample("z", dist.Normal(6 * c, 1.0).to_event(1))
            mean = (z - 6 * c).expand(*z.shape[:-1], 2)
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


class OfKinds(GenerativeModel):
    """p(z | x, c), exactly."""

    def forward(self, x=None, c=None, *, n=None, total=None):
        with self.rows(x, c, n=n, total=total):
            mean = 6 * c + x.sum(-1, keepdim=True) / 3
            pyro.sample("z", dist.Normal(mean, 3**-0.5).to_event(1))


def as_test(rows):
    return {"train": rows, "test": rows}


def p_of_others(seed):
    """p of a right model, whose global latent was learned from as many other rows."""
    torch.manual_seed(seed)
    x = Shared().simulate(100)["x"]
    pair = Shared(), GivenOthers(x[:50])
    return posterior_predictive(
        *pair, as_test(x[50:]), replicates=REPLICATES, statistics={"mean": torch.mean}, seed=seed
    ).p


def test_replicates_have_global_latents_of_their_own():
    """var(mean of 3 entries of 50 rows) is 1 / 150 given w, and 1 / 153 more over w."""
    x = torch.zeros(50, 3)
    result = posterior_predictive(
        Shared(),
        GivenOthers(x),
        as_test(x + 1e-3 * torch.arange(50)[:, None]),
        replicates=2000,
        statistics={"mean": torch.mean},
    )
    (record,) = result.statistics
    assert record["replicated_sd"] == pytest.approx((1 / 150 + 1 / 153) ** 0.5, rel=0.06)


@pytest.mark.slow
def test_the_error_rate_holds_where_global_latents_are_not_known_well():
    p = np.array([p_of_others(seed) for seed in range(400)])
    for level in (0.05, 0.2):
        error = (level * (1 - level) / len(p)) ** 0.5
        assert abs((p <= level).mean() - level) < 4 * error


def test_observables_before_latents_are_given():
    """Another c would make of z what no row has."""
    torch.manual_seed(0)
    drawn = Kinds().simulate(300)
    data = as_test({"x": drawn["x"], "c": drawn["c"]})
    result = posterior_predictive(Kinds(), OfKinds(), data, replicates=REPLICATES)
    assert result.verdict == "pass"
    assert not any("c: " in record["statistic"] for record in result.statistics)
    with pytest.raises(NotApplicable, match="'c' comes before latents"):
        posterior_predictive(Kinds(), OfKinds(), data, replicates=REPLICATES, site="c")
