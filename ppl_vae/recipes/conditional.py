"""Recipes of data given what is known of them: images given labels, pixels given other pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.data.quadrants import Hidden, quadrants
from ppl_vae.guide import Prior
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models.conditional import BaselineNet, ConditionalVAE, OnGuess
from ppl_vae.nn import MLP
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import COMPARED

QUADRANTS: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 100,
    "learning_rate": 1e-3,
    "patience": 20,
}
"""How models of quadrants are fitted, with or without a latent."""


def cvae_digits(*, latents: int = 10, hidden: int = 128) -> Experiment:
    """Conditional VAE of the embedded digits: an image given its label.

    Sohn et al. 2015 (NeurIPS 28, "Learning structured output representation using deep conditional
    generative models"). No published figure for these data; vae-digits with the same settings
    (--epochs 200 --learning_rate 1e-3 --warmup 20) is the model that is not told the label.

    Args:
        latents: size of z.
        hidden: width of the two hidden layers of encoder and decoder, and of the prior's one.
    """
    data = _given_labels(load_data("digits"))
    return _conditional(data, latents, hidden, dict(COMPARED))


def cvae_mnist_quadrants(
    *, given: Literal[1, 2, 3] = 1, latents: int = 50, hidden: int = 500, guess: bool = False
) -> Experiment:
    """Conditional VAE of static MNIST: hidden quadrants of an image given the others.

    Sohn et al. 2015 (NeurIPS 28), section 5.1, with nets as in Pyro's tutorial on conditional VAEs.
    Their CVAE has 68.62, 45.57 and 20.97 nats with 1, 2 and 3 quadrants given, Pyro's 71.8, 51.0
    and 24.2. Neither is to be compared with what is found here: theirs are other bits, or grey
    pixels, and Pyro scores draws of the recognition net without their weights, which is no
    likelihood. Here `ppl-vae evaluate` weights them; with ppl_vae.Prior as a guide, draws come from
    p(z | c). Data: Larochelle & Murray 2011, fixed bits, 50k/10k/10k.

    Args:
        given: quadrants: 1, the lower left; 2, the left half; 3, all but the lower right.
        latents: size of z.
        hidden: width of the two hidden layers of each net.
        guess: build the decoder on a net of c alone, learned with the rest, so that z adds to a
            guess.
    """
    return _conditional(_parted(given), latents, hidden, dict(QUADRANTS), guess=guess)


def baseline_mnist_quadrants(*, given: Literal[1, 2, 3] = 1, hidden: int = 500) -> Experiment:
    """The net without a latent that cvae-mnist-quadrants is held against: one guess at each pixel.

    Sohn et al. 2015 (NeurIPS 28), section 5.1: the baseline, its pixels independent given c. That
    of Pyro's tutorial has 100.4, 61.9 and 25.4 nats with 1, 2 and 3 quadrants given, of grey
    pixels, so that they must not be compared. Its likelihood needs no sampling: evaluate with
    --samples 1.

    Args:
        given: as in cvae-mnist-quadrants.
        hidden: width of the two hidden layers.
    """
    data = _parted(given)
    columns = data.splits["train"]
    pixels, known = columns["x"].shape[1], columns["c"].shape[1]
    model = BaselineNet(Bernoulli(MLP(known, hidden, hidden, pixels)))
    return Experiment(model, Prior(model), data, dict(QUADRANTS))


def _conditional(
    data: Dataset, latents: int, hidden: int, fit: dict[str, Any], *, guess: bool = False
) -> Experiment:
    """p(z | c) and q(z | x, c) normal; bits, or the digits' counts."""
    batch = data.split("train").batch(slice(0, 2))
    x, c = batch["x"].shape[1], batch["c"].shape[1]
    decoder: nn.Module = MLP(latents + c, hidden, hidden, x)
    if guess:
        decoder = OnGuess(MLP(c, hidden, hidden, x), decoder)
    bits = data.binarization == "static"
    likelihood = Bernoulli(decoder) if bits else Binomial(decoder, total_count=16)
    model = ConditionalVAE(Normal(MLP(c, hidden, 2 * latents)), likelihood)
    encoder = nn.Sequential(MLP(x + c, hidden, hidden), nn.ReLU())  # the guide's heads are linear
    guide = MeanField(model, encoder, x=batch["x"], c=batch["c"])
    return Experiment(model, guide, data, fit)


def _parted(given: int) -> Dataset:
    return quadrants(load_data("static_mnist", labels=False), cast(Hidden, 4 - given))


def _given_labels(data: Dataset) -> Dataset:
    """The data set with its labels, one-hot, as the covariate c."""
    assert data.classes is not None
    classes = torch.eye(len(data.classes), dtype=torch.uint8)
    splits = {
        split: {"x": columns["x"], "c": classes[columns["y"]]}
        for split, columns in data.splits.items()
    }
    return replace(data, splits=splits, classes=None)
