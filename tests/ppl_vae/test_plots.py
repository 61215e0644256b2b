from __future__ import annotations

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from ppl_vae import plots
from ppl_vae.guide import Factorized
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.model import GenerativeModel
from ppl_vae.models._template import Template
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import evaluating

SHAPE = (1, 2, 2)


def linear(weight, bias):
    net = MLP(*reversed(np.shape(weight)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(weight))
        net[0].bias.copy_(torch.tensor(bias))
    return net


def image_model():
    """Mean image [[z0, z1], [z0 + z1, 0]]."""
    decoder = linear([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [0.0] * 4)
    return VAE(StandardNormal(2), Gaussian(decoder, 0.1))


def image_guide(model, gains=(1.0, 1.0)):
    """Posterior mean of z: the first two pixels, times gains."""
    encoder = linear([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], [0.0, 0.0])
    guide = MeanField(model, encoder, x=torch.zeros(2, 4))
    head = guide.heads["z"].net
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[0, 0], head.weight[1, 1] = gains
    return guide


def drawn(figure):
    """The picture's pixels: grey levels 0 to 1."""
    (image,) = figure.axes[0].images
    return np.asarray(image.get_array())


def cell(canvas, row, column, height=2, width=2, space=1):
    y, x = row * (height + space), column * (width + space)
    return canvas[y : y + height, x : x + width]


def rescaled(values):
    return (values - values.min()) / (values.max() - values.min())


def column_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def row_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


X = torch.tensor(
    [[1.0, 0.0, 9.0, 9.0], [-1.0, 2.0, 9.0, 9.0], [0.0, 0.5, 9.0, 9.0], [0.5, -2.0, 9.0, 9.0]]
)


def test_reconstructions_are_the_means_at_the_posterior_means():
    model = image_model()
    figure = plots.reconstructions(model, image_guide(model), X, SHAPE)
    z = X[:, :2]
    means = torch.stack([z[:, 0], z[:, 1], z.sum(1), 0 * z[:, 0]], 1)
    expected = rescaled(torch.stack([X, means]).numpy())  # limits are shared by both lines
    for line in (0, 1):
        for i in range(4):
            np.testing.assert_allclose(
                cell(drawn(figure), line, i).ravel(), expected[line, i], atol=1e-6
            )
    assert row_labels(figure) == ["data", "mean"]


def test_many_reconstructions_wrap():
    model = image_model()
    figure = plots.reconstructions(model, image_guide(model), X.repeat(5, 1), SHAPE)
    assert row_labels(figure) == ["data", "mean"] * 2
    assert (cell(drawn(figure), 3, 4) == 1).all()  # the last line is filled up with white


def test_interpolation_of_a_linear_decoder_is_linear():
    model = image_model()
    figure = plots.interpolation(model, image_guide(model), X, SHAPE, steps=3)
    canvas = drawn(figure)
    low, high = -2.0, 9.0
    for line, (a, b) in enumerate([(0, 1), (2, 3)]):
        for step, t in enumerate([0.0, 0.5, 1.0]):
            z = (1 - t) * X[a, :2] + t * X[b, :2]
            expected = (torch.tensor([z[0], z[1], z.sum(), 0.0]) - low) / (high - low)
            np.testing.assert_allclose(cell(canvas, line, 1 + step).ravel(), expected, atol=1e-6)
        np.testing.assert_allclose(cell(canvas, line, 0).ravel(), (X[a] - low) / (high - low))
        np.testing.assert_allclose(cell(canvas, line, 4).ravel(), (X[b] - low) / (high - low))
    assert column_labels(figure) == ["data", "0", "0.5", "1", "data"]


def test_traversal_moves_the_most_active_latent_first():
    model = image_model()
    figure = plots.traversal(model, image_guide(model, gains=(0.1, 1.0)), X, SHAPE, steps=3)
    assert row_labels(figure) == ["z[1]", "z[0]"]
    assert column_labels(figure) == ["2%", "50%", "98%"]
    start = 0.1 * X[0, 0], X[0, 1]
    means = np.zeros((2, 3, 4))
    for step, q in enumerate(scipy.stats.norm.ppf([0.02, 0.5, 0.98])):
        for line, (z0, z1) in enumerate([(start[0], q), (q, start[1])]):
            means[line, step] = [z0, z1, z0 + z1, 0]
    expected = rescaled(means)
    for line in range(2):
        for step in range(3):
            np.testing.assert_allclose(
                cell(drawn(figure), line, step).ravel(), expected[line, step], atol=1e-6
            )
    first = plots.traversal(model, image_guide(model, gains=(0.1, 1.0)), X, SHAPE, units=1)
    assert row_labels(first) == ["z[1]"]


def test_manifold_runs_right_and_up():
    figure = plots.manifold(image_model(), SHAPE, n=4)
    canvas = drawn(figure)
    assert canvas.shape == (8, 8)  # no gaps
    q = scipy.stats.norm.ppf([0.125, 0.375, 0.625, 0.875])
    low, high = 2 * q[0], 2 * q[-1]
    for row in range(4):
        for column in range(4):
            z0, z1 = q[column], q[3 - row]
            expected = (np.array([z0, z1, z0 + z1, 0]) - low) / (high - low)
            np.testing.assert_allclose(
                cell(canvas, row, column, space=0).ravel(), expected, atol=1e-6
            )


def test_samples_show_means_or_draws():
    model = image_model()
    with evaluating(7, model):
        z = pyro.poutine.trace(model).get_trace(n=5).nodes["z"]["value"]
    means = torch.stack([z[:, 0], z[:, 1], z.sum(1), 0 * z[:, 0]], 1).numpy()
    canvas = drawn(plots.samples(model, SHAPE, n=5, seed=7))
    for i in range(5):
        np.testing.assert_allclose(
            cell(canvas, i // 3, i % 3).ravel(), rescaled(means)[i], atol=1e-6
        )
    assert (cell(canvas, 1, 2) == 1).all()
    assert not np.array_equal(canvas, drawn(plots.samples(model, SHAPE, n=5, seed=8)))
    bits = VAE(StandardNormal(2), Bernoulli(linear([[1.0, 1.0]] * 4, [0.0] * 4)))
    assert set(np.unique(drawn(plots.samples(bits, SHAPE, n=9, draw=True)))) == {0.0, 1.0}
    assert len(np.unique(drawn(plots.samples(bits, SHAPE, n=9)))) > 3


def test_limits_are_those_of_the_likelihood():
    nearly_grey = VAE(StandardNormal(2), Bernoulli(linear([[0.01, 0.0]] * 4, [0.0] * 4)))
    canvas = drawn(plots.samples(nearly_grey, SHAPE, n=4))
    assert np.abs(cell(canvas, 0, 0) - 0.5).max() < 0.02  # not stretched from black to white


class Ladder(GenerativeModel):
    """z2 ~ Normal(0, 1), z1 ~ Normal(10 z2, 1), x ~ Normal(z1, 1) in all four pixels."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(10 * z2, 1.0).to_event(1))
            loc = z1.expand(*z1.shape[:-1], 4)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def test_traversal_of_an_upper_latent_moves_what_depends_on_it():
    model = Ladder()
    guide = FullRank(model, MLP(4, 4), x=X[:2])
    figure = plots.traversal(model, guide, X, SHAPE, latent="z2", steps=3)
    assert row_labels(figure) == ["z2[0]"]
    q = scipy.stats.norm.ppf([0.02, 0.5, 0.98])  # z1, and so x, follow at 10 z2
    for step in range(3):
        np.testing.assert_allclose(cell(drawn(figure), 0, step), rescaled(q)[step], atol=1e-6)
    lower = plots.traversal(model, guide, X, SHAPE)
    assert row_labels(lower) == ["z1[0]"]
    with pytest.raises(ValueError, match="no local continuous latent 'z3' before 'x'; it has z2"):
        plots.traversal(model, guide, X, SHAPE, latent="z3")


def test_global_latents_and_bounded_supports():
    model = Template.toy()  # z > 0, and w for all rows
    guide = MeanField(model, MLP(4, 8), x=torch.ones(2, 4))
    x = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 1.0, 4.0]])
    for figure in (
        plots.traversal(model, guide, x, SHAPE),
        plots.interpolation(model, guide, x, SHAPE),
        plots.reconstructions(model, guide, x, SHAPE),
        plots.samples(model, SHAPE, n=4),
    ):
        assert np.isfinite(drawn(figure)).all()
    # Gamma(2, 1) has no quantile function in torch: draws stand in.
    given = plots._latent(model, "z", "x", {})
    with evaluating(0, model, guide):
        found = plots._quantiles(model, {}, given, torch.tensor([0.1, 0.5, 0.9]), {})
    np.testing.assert_allclose(found[:, 0], scipy.stats.gamma(2).ppf([0.1, 0.5, 0.9]), rtol=0.08)


def test_rows_that_are_no_images_are_strips():
    model = image_model()
    guide = image_guide(model)
    canvas = drawn(plots.reconstructions(model, guide, X[:2], None))
    assert canvas.shape == (5, 4)  # data and mean, a line between, data and mean
    np.testing.assert_allclose(canvas[[0, 3]], X[:2])
    np.testing.assert_allclose(canvas[1], [1.0, 0.0, 1.0, 0.0])
    assert drawn(plots.samples(model, None, n=6)).shape == (6, 4)
    assert drawn(plots.traversal(model, guide, X, None, steps=3)).shape == (7, 4)
    assert drawn(plots.interpolation(model, guide, X, None, steps=3)).shape == (11, 4)


def test_nothing_global_changes():
    """Neither pyplot, nor matplotlib's settings and backend, nor the random state."""
    import matplotlib.pyplot as plt

    model = image_model()
    guide = image_guide(model)
    state, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    plots.samples(model, SHAPE, draw=True)
    plots.reconstructions(model, guide, X, SHAPE)
    plots.interpolation(model, guide, X, SHAPE)
    plots.traversal(model, guide, X, SHAPE)
    plots.manifold(model, SHAPE, n=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(matplotlib.rcParams) == settings
    assert not plt.get_fignums()


def test_figures_are_written_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    model = image_model()
    plots.manifold(model, SHAPE, n=3).savefig(tmp_path / "a.png")
    plots.samples(model, None, n=3).savefig(tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000


class NoMean(GenerativeModel):
    """z ~ Normal(0, 1), x ~ Cauchy(z, 1)."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            return pyro.sample("x", dist.Cauchy(z, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


def test_errors_say_what_would_work():
    model = image_model()
    guide = image_guide(model)
    three = VAE(StandardNormal(3), Gaussian(linear([[1.0, 0.0, 0.0]] * 4, [0.0] * 4)))
    with pytest.raises(ValueError, match="'z' of VAE has 3 dims; expected 2"):
        plots.manifold(three, SHAPE)
    with pytest.raises(ValueError, match="give image_shape"):
        plots.manifold(model, None)
    with pytest.raises(ValueError, match=r"\(1, 3, 2\) does not fit rows of 4 values"):
        plots.samples(model, (1, 3, 2))
    with pytest.raises(ValueError, match="3 rows; expected pairs"):
        plots.interpolation(model, guide, X[:3], SHAPE)
    with pytest.raises(ValueError, match="steps=1"):
        plots.interpolation(model, guide, X, SHAPE, steps=1)
    with pytest.raises(ValueError, match="units=0"):
        plots.traversal(model, guide, X, SHAPE, units=0)
    with pytest.raises(ValueError, match="n=0"):
        plots.samples(model, SHAPE, n=0)
    with pytest.raises(ValueError, match="no observable 'y', only x"):
        plots.samples(model, SHAPE, site="y")
    with pytest.raises(ValueError, match="'x' has no mean"):
        plots.samples(NoMean(), SHAPE)
    assert plots.samples(NoMean(), SHAPE, draw=True).axes


class Labeled(GenerativeModel):
    """y ~ OneHotCategorical(1/2), z ~ Normal(0, I), x ~ Normal((z, y), 1)."""

    def __init__(self, enumerate_labels=False):
        super().__init__()
        self.infer = {"enumerate": "parallel"} if enumerate_labels else {}

    def forward(self, x=None, y=None, *, n=None, total=None):
        with self.rows(x, y, n=n, total=total):
            label = dist.OneHotCategorical(torch.full((2,), 0.5))
            y = pyro.sample("y", label, obs=y, infer=self.infer)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.cat(torch.broadcast_tensors(z, y), -1)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @classmethod
    def toy(cls):
        return cls()


class FirstTwo(nn.Module):
    def forward(self, x):
        return dist.Normal(x[..., :2], 1.0).to_event(1)


class LastTwo(nn.Module):
    def forward(self, x):
        return dist.OneHotCategorical(logits=x[..., 2:])


@pytest.mark.parametrize("enumerated", [False, True])
def test_labels_that_are_latent_stand_at_their_mode(enumerated):
    model = Labeled(enumerate_labels=enumerated)
    sites = {"z": (FirstTwo(), ["x"])}
    guide = Factorized(**sites) if enumerated else Factorized(y=(LastTwo(), ["x"]), **sites)
    x = torch.tensor([[0.2, 0.3, 0.9, 0.1], [0.2, 0.3, 0.4, 0.6]])
    for seed in (0, 1):
        torch.manual_seed(seed)
        canvas = drawn(plots.reconstructions(model, guide, x, None))
        np.testing.assert_allclose(canvas[1], [0.2, 0.3, 1.0, 0.0], rtol=1e-6)
        np.testing.assert_allclose(canvas[4], [0.2, 0.3, 0.0, 1.0], rtol=1e-6)
    between = drawn(plots.interpolation(model, guide, x, None, steps=4))
    np.testing.assert_allclose(between[1:5, 2], [1, 1, 0, 0])  # half way, and no mixture
