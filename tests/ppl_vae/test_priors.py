from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from ppl_vae.priors import StandardNormal

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("size", [1, 4])
def test_standard_normal_is_scipys(size):
    d = StandardNormal(size)()
    assert (d.batch_shape, d.event_shape) == ((), (size,))
    z = torch.linspace(-3, 3, 5 * size).reshape(5, size)
    expected = scipy.stats.multivariate_normal.logpdf(z.numpy(), np.zeros(size))
    torch.testing.assert_close(d.log_prob(z), torch.from_numpy(np.array(expected)))
    assert d.rsample((100, 2)).shape == (100, 2, size)


def test_standard_normal_has_nothing_to_learn_or_save_and_follows_the_dtype():
    prior = StandardNormal(3)
    assert not list(prior.parameters())
    assert not prior.state_dict()
    for dtype in (torch.float32, torch.float64):
        assert prior.to(dtype)().sample().dtype == dtype
    assert prior.to("meta").loc.device.type == "meta"


@pytest.mark.parametrize("size", [0, -2])
def test_standard_normal_needs_a_latent(size):
    with pytest.raises(ValueError, match=rf"StandardNormal\({size}\): expected at least 1 latent"):
        StandardNormal(size)
