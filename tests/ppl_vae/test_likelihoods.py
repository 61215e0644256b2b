from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from scipy.special import expit, softmax
from torch import nn

from ppl_vae.evaluation import evaluate
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
)
from ppl_vae.models.vae import VAE
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import PairError, check_data, read_sites

pytestmark = pytest.mark.usefixtures("float64")
D = 3
PIXELS = (0.3, 1.0, 2.5)


def net(kinds=1):
    return nn.Linear(2, kinds * D)


def eq_8(x, logits):
    """log p(x | lambda) of the continuous Bernoulli, for lambda other than 1/2."""
    lam = expit(logits)
    constant = 2 * np.arctanh(1 - 2 * lam) / (1 - 2 * lam)
    return np.log(constant) + x * np.log(lam) + (1 - x) * np.log1p(-lam)


def eq_2(x, out, components, levels=256):
    """A mixture of logistics, rounded, from differences of scipy's distribution function."""
    *logits, loc, log_scale = np.moveaxis(out.reshape(*out.shape[:-1], -1, components, D), -3, 0)
    edges = 2 * (np.arange(levels + 1) - 0.5) / (levels - 1) - 1
    edges[0], edges[-1] = -np.inf, np.inf
    level = np.asarray(x, int)
    low, high = (
        scipy.stats.logistic.cdf(e, loc, np.exp(log_scale))
        for e in (edges[level], edges[level + 1])
    )
    weights = softmax(logits[0], -2) if logits else 1.0
    return np.log((weights * (high - low)).sum(-2))


# name: (likelihood, data, independent log density of data and the net's output)
BITS, COUNTS, BYTES = [0.0, 1.0, 1.0], [0.0, 2.0, 5.0], [0.0, 100.0, 255.0]
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
        f"{family.__name__} {scale}, {learned=}": (
            lambda family=family, scale=scale, learned=learned: family(
                net(), torch.tensor(scale), learned=learned
            ),
            [-1.0, 0.5, 4.0],
            lambda x, out, scale=scale, logpdf=logpdf: logpdf(x, out, scale),
        )
        for family, logpdf in (
            (Gaussian, scipy.stats.norm.logpdf),
            (Laplace, scipy.stats.laplace.logpdf),
        )
        for scale, learned in [(0.7, False), (0.7, True), (PIXELS, True)]
    },
    "DiscretizedLogistic": (
        lambda: DiscretizedLogistic(net(2)),
        BYTES,
        lambda x, out: eq_2(x, out, 1),
    ),
    "DiscretizedLogistic of 5 levels": (
        lambda: DiscretizedLogistic(net(2), 5),
        [0.0, 1.0, 4.0],
        lambda x, out: eq_2(x, out, 1, 5),
    ),
    "DiscretizedLogisticMixture": (
        lambda: DiscretizedLogisticMixture(net(12), 4),
        BYTES,
        lambda x, out: eq_2(x, out, 4),
    ),
    "Categorical": (
        lambda: Categorical(net(7), 7),
        [0.0, 2.0, 6.0],
        lambda x, out: np.stack(
            [np.log(softmax(out[..., d::D], -1))[..., int(k)] for d, k in enumerate(x)], -1
        ),
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
    learned = "learned=True" in name
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
    ("build", "top", "out"),
    [
        (Bernoulli, 1, [1.0]),
        (lambda n: Binomial(n, 5), 5, [1.0]),
        (lambda n: Binomial(n, 1), 1, [1.0]),
        (lambda n: DiscretizedLogistic(n, 2), 1, [1.0, 0.3]),
        (DiscretizedLogistic, 255, [1.0, 2.0]),
        (DiscretizedLogistic, 255, [0.02, -3.0]),
        (lambda n: DiscretizedLogisticMixture(n, 2), 255, [1.0, 2.0, 0.1, -0.1, -0.5, 1.0]),
        (lambda n: Categorical(n, 3), 2, [1.0, 2.0, -0.5]),
    ],
)
def test_discrete_likelihoods_sum_to_1_and_have_the_mean_of_the_sum(build, top, out, logit):
    d = build(nn.Identity())(logit * torch.tensor(out))
    values = torch.arange(top + 1.0).unsqueeze(-1)
    probabilities = d.log_prob(values).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    mean = (probabilities * values[:, 0]).sum()
    torch.testing.assert_close(d.mean, mean.reshape(1), atol=1e-9, rtol=1e-9)


LEVELS = {
    "DiscretizedLogistic": (DiscretizedLogistic, 2),
    "DiscretizedLogisticMixture": (
        lambda n, levels=256: DiscretizedLogisticMixture(n, 3, levels),
        9,
    ),
    "Categorical": (Categorical, 256),
}
OF_LEVELS = pytest.mark.parametrize("name", LEVELS)


@OF_LEVELS
@pytest.mark.parametrize("levels", [4, 256])
def test_levels_are_drawn_as_often_as_is_probable(name, levels):
    build, kinds = LEVELS[name]
    d = build(nn.Identity(), levels)(torch.randn(levels if name == "Categorical" else kinds))
    draws = d.sample((20_000,)).squeeze(-1)
    assert d.support.check(draws.unsqueeze(-1)).all()
    values = torch.arange(float(levels)).unsqueeze(-1)
    cdf = d.log_prob(values).exp().cumsum(0)
    found = (draws <= values).double().mean(-1)
    # Kolmogorov-Smirnov at a level of 1e-6, conservative for discrete draws.
    assert (cdf - found).abs().max() < 2.7 / 20_000**0.5


@OF_LEVELS
def test_levels_are_discrete_sites_that_refuse_other_data(name):
    build, kinds = LEVELS[name]
    model = VAE(StandardNormal(2), build(nn.Linear(2, kinds * D)))
    site = read_sites(model, n=4)["x"]
    assert site.support.is_discrete
    assert (site.event_shape, site.batch_shape) == ((D,), (4,))
    draws = model.simulate(4)["x"]
    check_data(model, [{"x": draws}])
    assert read_sites(model, x=draws)["x"].observed
    for wrong in (0.5, -1.0, 256.0):
        with pytest.raises(PairError, match=r"hold .*IntegerInterval\. Expected whole .*unit=1"):
            check_data(model, [{"x": torch.full((4, D), wrong)}])
    expanded = build(nn.Identity())(torch.zeros(kinds * D)).expand([5, 4])
    assert expanded.sample().shape == (5, 4, D)
    assert expanded.log_prob(draws).shape == (5, 4)


def test_a_uniform_categorical_has_8_bits_a_dimension():
    encoder, decoder = nn.Linear(D, 4), nn.Linear(2, 256 * D)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.zeros_(parameter)
    model = VAE(StandardNormal(2), Categorical(decoder))
    x = torch.randint(0, 256, (10, D)).double()
    guide = MeanField(model, encoder, x)
    found = evaluate(model, guide, {"train": x, "test": x}, samples=2000)
    assert found.bits_per_dim == pytest.approx(8, abs=0.05)


@pytest.mark.parametrize("name", ["DiscretizedLogistic", "DiscretizedLogisticMixture"])
@pytest.mark.parametrize("loc", [-1e6, -1.0, 0.003, 1.0, 1e6])
@pytest.mark.parametrize("log_scale", [-200.0, -7.0, 0.0, 200.0])
def test_extreme_logistics_have_finite_densities_and_gradients_in_float32(name, loc, log_scale):
    build, kinds = LEVELS[name]
    numbers = [loc, log_scale] if kinds == 2 else [0.0, loc, log_scale]
    out = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(kinds // len(numbers))
    out.requires_grad_()
    log_prob = build(nn.Identity())(out).log_prob(torch.arange(256.0).float().unsqueeze(-1))
    assert log_prob.isfinite().all()
    for level in (0, 100, 255):
        (slope,) = torch.autograd.grad(log_prob[level], out, retain_graph=True)
        assert slope.isfinite().all()
        if abs(loc) > 255:  # far off, it is still told where the data are
            assert slope[-kinds // len(numbers) - 1] * loc < 0 or level == (255 if loc > 0 else 0)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: DiscretizedLogistic(net(2), 1), r"DiscretizedLogistic\(levels=1\)"),
        (lambda: Categorical(net(), 0), r"Categorical\(levels=0\)"),
        (lambda: DiscretizedLogisticMixture(net(), 3, 1), r"Mixture\(levels=1\)"),
        (lambda: DiscretizedLogisticMixture(net(), 0), r"Mixture\(components=0\)"),
    ],
)
def test_levels_and_components_are_enough(build, problem):
    with pytest.raises(ValueError, match=problem + ": expected at least"):
        build()


@OF_LEVELS
def test_a_net_of_another_width_is_refused(name):
    build, kinds = LEVELS[name]
    with pytest.raises(ValueError, match=rf"{name} has {kinds + 1} outputs.*multiple of {kinds},"):
        build(nn.Identity())(torch.zeros(kinds + 1))


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


@pytest.mark.parametrize("family", [Gaussian, Laplace])
@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0, 1.0])]
)
def test_scales_must_be_positive_and_finite(family, scale):
    with pytest.raises(
        ValueError, match=rf"{family.__name__}\(scale=.*expected positive and finite"
    ):
        family(net(), scale)
