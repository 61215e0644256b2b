"""Recipes of labels that are given in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.discrete import Estimator, Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.stacked import M1M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import MutualInformation, SemiSupervised, VirtualAdversarial
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import width


def m1m2_mnist_100(
    *,
    labels: int = 100,
    label_seed: int = 0,
    features: int = 50,
    latents: int = 50,
    hidden: int = 600,
    consistency: float = 100.0,
) -> Experiment:
    """M1+M2 on dynamically binarized MNIST with 100 labels, its classifier made consistent.

    Kingma et al. 2014 (arXiv:1406.5298), section 2.1: error 3.33 % of the 10,000 test images, with
    100 labels. As there, M1 is fitted first, then M2 on draws of its latent. Not as there: the
    classifier sees the image, by a copy of M1's encoder to begin with; of images without labels, it
    pays for a change of its answer near by (Miyato et al. 2018, arXiv:1704.03976) and for answers
    that say little (Krause et al. 2010). The ELBO is in nats, and must not be compared.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        features: size of M1's latent.
        latents: size of the style.
        hidden: width of M1's two hidden layers.
        consistency: weight of classification and of both penalties, in nats.
    """
    data = load_data("mnist", binarize="dynamic")
    pixels, classes = width(data), 10
    encoder = MLP(pixels, hidden, hidden, 2 * features)
    q_z1, likelihood = Normal(encoder), Bernoulli(MLP(features, hidden, hidden, pixels))
    first = Experiment(
        VAE(StandardNormal(features), likelihood),
        Factorized(z=(q_z1, ["x"])),
        data.without_labels(),
        {"epochs": 15, "batch_size": 200, "learning_rate": 1e-3, "schedule": "cosine"},
    )
    trunk = MLP(pixels, hidden, hidden, features)
    classifier = nn.Sequential(trunk, MLP(features, 300, 300, classes))
    classifier.inputs = pixels  # pyright: ignore
    guide = Factorized(
        z1=(q_z1, ["x"]),
        y=(Labels(classifier, estimator="enumerate"), ["x"]),
        z2=(Normal(MLP(features + classes, 300, 2 * latents)), ["z1", "y"]),
    )
    model = M1M2(
        StandardNormal(latents),
        Normal(MLP(classes + latents, 300, 2 * features)),
        likelihood,
        classes,
    )

    def begin() -> None:
        with torch.no_grad():
            for own, learned in zip(trunk.parameters(), encoder.parameters(), strict=True):
                own.copy_(learned[: len(own)])  # of the last layer, the locations
        for part in (q_z1, likelihood):
            part.requires_grad_(False)

    penalties = [
        VirtualAdversarial(1.5, consistency, rise=5),
        MutualInformation(consistency),
    ]
    fit: dict[str, Any] = {
        "epochs": 15,
        "batch_size": 300,
        "labeled_batch": min(50, labels),
        "learning_rate": 5e-4,
        "schedule": "cosine",
        "objective": SemiSupervised(consistency, penalties=penalties),
    }
    return Experiment(model, guide, data.labeled(labels, label_seed), fit, first, begin)
