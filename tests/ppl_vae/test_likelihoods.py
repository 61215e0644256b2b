from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from scipy.special import expit
from torch import nn

from ppl_vae.likelihoods import Bernoulli, Binomial, ContinuousBernoulli, Gaussian

pytestmark = pytest.mark.usefixtures("float64")
D = 3
PIXELS = (0.3, 1.0, 2.5)


def net():
    return nn.Linear(2, D)


def gaussian(scale, learned):
    return lambda: Gaussian(net(), scale, learned=learned)


def eq_8(x, logits):
    """log p(x | lambda) of the continuous Bernoulli, for lambda other than 1/2."""
    lam = expit(logits)
    constant = 2 * np.arctanh(1 - 2 * lam) / (1 - 2 * lam)
    return np.log(constant) + x * np.log(lam) + (1 - x) * np.log1p(-lam)


# name: (likelihood, data, independent log density of data and the net's output)
BITS, COUNTS = [0.0, 1.0, 1.0], [0.0, 2.0, 5.0]
CASES = {
    "Bernoulli": (
        lambda: Bernoulli(net()),
        BITS,
        lambda x, out: scipy.stats.bernoulli.logpmf(x, expit(out)),
    ),
    "Binomial": (
        lambda: Binomial(net(), 5),
        COUNTS,
        lambda x, out: scipy.stats.binom.logpmf(x, 5, expit(out)),
    ),
    "ContinuousBernoulli": (lambda: ContinuousBernoulli(net()), [0.0, 0.2, 1.0], eq_8),
    **{
        f"Gaussian {scale}, {learned=}": (
            gaussian(scale, learned),
            [-1.0, 0.5, 4.0],
            lambda x, out, scale=scale: scipy.stats.norm.logpdf(x, out, scale),
        )
        for scale, learned in [(0.7, False), (0.7, True)]
    },
    "Gaussian a pixel": (
        gaussian(torch.tensor(PIXELS), True),
        [-1.0, 0.5, 4.0],
        lambda x, out: scipy.stats.norm.logpdf(x, out, PIXELS),
    ),
}
EACH = pytest.mark.parametrize("name", CASES)


@EACH
def test_log_density_is_that_of_an_independent_formula(name):
    build, x, formula = CASES[name]
    likelihood, z = build(), torch.randn(7, 4, 2)
    d = likelihood(z)
    assert (d.batch_shape, d.event_shape) == ((7, 4), (D,))
    expected = formula(np.array(x), likelihood.net(z).detach().numpy()).sum(-1)
    # ContinuousBernoulli keeps a Taylor series near 1/2, which is good to 1e-7.
    log_prob = d.log_prob(torch.tensor(x)).detach()
    torch.testing.assert_close(log_prob, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


@EACH
def test_gradients_reach_the_net_and_the_scale_where_learned(name):
    build, x, _ = CASES[name]
    likelihood = build()
    trained = {n for n, _ in likelihood.named_parameters()}
    learned = "learned=True" in name or "pixel" in name
    assert trained == {"net.weight", "net.bias"} | ({"log_scale"} if learned else set())
    likelihood(torch.randn(4, 2)).log_prob(torch.tensor(x)).sum().backward()
    assert all(p.grad.abs().min() > 0 for p in likelihood.parameters())


@EACH
def test_dtype_follows_the_module(name):
    build, x, _ = CASES[name]
    likelihood = build()
    for dtype in (torch.float32, torch.float64):
        d = likelihood.to(dtype)(torch.randn(4, 2, dtype=dtype))
        assert d.log_prob(torch.tensor(x, dtype=dtype)).dtype == dtype
        assert d.sample().dtype == dtype
        assert d.sample().shape == (4, D)


@pytest.mark.parametrize("logit", [-30.0, -4.0, -0.3, 0.0, 1e-4, 1.0, 12.0])
def test_continuous_bernoulli_integrates_to_1(logit):
    d = ContinuousBernoulli(nn.Identity())(torch.tensor([logit]))
    density = lambda x: d.log_prob(torch.tensor([x])).exp().item()  # noqa: E731
    total, _ = scipy.integrate.quad(density, 0, 1, points=[0.05, 0.95], epsabs=1e-10)
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("logit", [-40.0, -1.0, 0.0, 3.0])
@pytest.mark.parametrize(
    ("build", "top"), [(Bernoulli, 1), (lambda n: Binomial(n, 5), 5), (lambda n: Binomial(n, 1), 1)]
)
def test_discrete_likelihoods_sum_to_1(build, top, logit):
    d = build(nn.Identity())(torch.tensor([logit]))
    values = torch.arange(top + 1.0).unsqueeze(-1)
    assert d.log_prob(values).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("learned", [False, True])
def test_gaussian_scale_is_saved_and_where_learned_found(learned):
    likelihood = Gaussian(nn.Identity(), torch.tensor(PIXELS), learned=learned)
    assert list(likelihood.state_dict()) == ["log_scale"]
    copy = Gaussian(nn.Identity(), torch.ones(3), learned=learned)
    copy.load_state_dict(likelihood.state_dict())
    torch.testing.assert_close(copy(torch.zeros(3)).base_dist.scale, torch.tensor(PIXELS))
    if learned:  # the maximum-likelihood scale is the root mean square
        x = torch.randn(50, 3) * torch.tensor([2.0, 0.5, 1.0])
        optimizer = torch.optim.LBFGS(copy.parameters(), max_iter=50)

        def loss():
            optimizer.zero_grad()
            nats = -copy(torch.zeros(50, 3)).log_prob(x).mean()
            nats.backward()
            return nats

        optimizer.step(loss)
        rms = x.square().mean(0).sqrt()
        torch.testing.assert_close(copy.log_scale.exp(), rms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [0, -3])
def test_binomial_needs_a_count(count):
    with pytest.raises(ValueError, match=rf"Binomial\(total_count={count}\): expected at least 1"):
        Binomial(net(), count)


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0, 1.0])]
)
def test_gaussian_needs_positive_finite_scales(scale):
    with pytest.raises(ValueError, match=r"Gaussian\(scale=.*expected positive and finite"):
        Gaussian(net(), scale)
