from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from ppl_vae.figures import curves, image_grid, limits_for


def drawn(figure):
    (image,) = figure.axes[0].images
    return np.asarray(image.get_array())


def test_image_grid_of_colors():
    images = torch.zeros(1, 2, 3, 2, 2)
    images[0, 0, 0] = 4.0  # red
    images[0, 1] = torch.nan
    canvas = drawn(image_grid(images, column_labels=["a", "b"]))
    assert canvas.shape == (2, 5, 3)
    assert (canvas[:, :2] == [1, 0, 0]).all()
    assert (canvas[:, 2:] == 1).all()
    half = drawn(image_grid(images, limits=(0, 8)))
    assert (half[:, :2] == [0.5, 0, 0]).all()


def test_limits_of_a_support_come_before_those_of_the_values():
    values = torch.tensor([1.0, 3.0, torch.nan])
    assert limits_for(dist.Bernoulli(0.5).support, values) == (0, 1)
    assert limits_for(dist.Beta(1.0, 1.0).support, values) == (0, 1)
    assert limits_for(dist.Poisson(1.0).support, values) == (0, 3)
    assert limits_for(dist.Normal(torch.zeros(3), 1.0).to_event(1).support, values) == (1, 3)
    assert limits_for(dist.Normal(0.0, 1.0).support, torch.ones(2)) == (0.5, 1.5)


def test_curves_show_the_numbers_given():
    metrics = [
        {
            "epoch": epoch,
            "elbo": -100.0 + epoch,
            "reconstruction": -90.0 + epoch,
            "kl": 10.0 * epoch,
            "validation_elbo": -101.0 if epoch == 2 else "",
            "weight": epoch / 3,
        }
        for epoch in (1, 2, 3)
    ]
    figure = curves(metrics)
    elbo, reconstruction, kl, weight = figure.axes
    assert list(elbo.lines[0].get_xdata()) == [1, 2, 3]
    assert list(elbo.lines[0].get_ydata()) == [-99, -98, -97]
    np.testing.assert_array_equal(elbo.lines[1].get_ydata(), [np.nan, -101, np.nan])
    assert list(reconstruction.lines[0].get_ydata()) == [-89, -88, -87]
    assert len(reconstruction.lines) == 1
    assert list(kl.lines[0].get_ydata()) == [10, 20, 30]
    assert list(weight.lines[0].get_ydata()) == [1 / 3, 2 / 3, 1]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training", "validation", "weight of KL (right)"]
    assert elbo.get_ylabel() == "nats per datum"
    constant = curves([row | {"weight": 1.0} for row in metrics])
    assert len(constant.axes) == 3


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="1 or 3 channels"):
        image_grid(torch.zeros(1, 1, 2, 2, 2))
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        image_grid(torch.zeros(1, 1, 1, 2, 2), row_labels=["a", "b"])
    with pytest.raises(ValueError, match="no metrics"):
        curves([])
    with pytest.raises(ValueError, match="have no 'kl'"):
        curves([{"epoch": 1, "elbo": 1.0, "reconstruction": 1.0}])
