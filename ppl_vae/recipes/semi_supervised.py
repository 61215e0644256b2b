"""Recipes of labels that are given in part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, load_data
from ppl_vae.discrete import Estimator, Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models.auxiliary import ADGM, SDGM
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.semi_supervised import M2
from ppl_vae.models.stacked import M1M2
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import MutualInformation, Penalty, SemiSupervised, VirtualAdversarial
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import COMPARED, width

CLASSES = 10


def m2_digits_50(
    *,
    labels: int = 50,
    label_seed: int = 0,
    estimator: Estimator = "enumerate",
    classification: float = 100.0,
    consistency: float = 100.0,
    latents: int = 10,
    hidden: int = 128,
) -> Experiment:
    """M2 on the embedded digits, 50 of whose labels are known.

    Kingma et al. 2014 (arXiv:1406.5298), with penalties on the classifier for a change of its
    answer near by (Miyato et al. 2018, arXiv:1704.03976) and for answers that say little.
    No published figure for these data; the same net on the 50 labels alone is what it is held
    against.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        estimator: of the label's gradient.
        classification: weight of the classification term, alpha.
        consistency: weight of both penalties, in nats; 0 leaves them out.
        latents: size of the style.
        hidden: width of the two hidden layers of each net.
    """
    data = load_data("digits").labeled(labels, label_seed)
    likelihood = Binomial(MLP(CLASSES + latents, hidden, hidden, width(data)), total_count=16)
    fit: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 125,
        "labeled_batch": min(25, labels),
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "objective": SemiSupervised(
            classification, penalties=_penalties(consistency, epsilon=8.0, rise=25)
        ),
    }

    def nets(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, hidden, hidden, outputs)

    return _m2(data, likelihood, nets, latents, estimator, fit)


def m2_mnist_100(
    *,
    labels: int = 100,
    label_seed: int = 0,
    estimator: Estimator = "enumerate",
    classification: float = 0.1,
    consistency: float = 0.0,
    latents: int = 50,
    hidden: int = 500,
) -> Experiment:
    """M2 on dynamically binarized MNIST with 100 labels.

    Kingma et al. 2014 (arXiv:1406.5298), table 1: error 11.97 % (+- 1.71) with 100 labels, 4.94 %
    with 600, 3.60 % with 1000 and 3.92 % with 3000. The ELBO is in nats, and must not be compared.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        estimator: of the label's gradient.
        classification: weight of the classification term, alpha.
        consistency: weight of the penalties on the classifier, in nats; 0, as in the paper, leaves
            them out.
        latents: size of the style.
        hidden: width of the hidden layer of each net.
    """
    data = load_data("mnist", binarize="dynamic").labeled(labels, label_seed)
    likelihood = Bernoulli(MLP(CLASSES + latents, hidden, width(data)))
    fit: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 200,
        "labeled_batch": min(100, labels),
        "learning_rate": 3e-4,
        "objective": SemiSupervised(
            classification, penalties=_penalties(consistency, epsilon=1.5, rise=5)
        ),
    }

    def nets(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, hidden, outputs)

    return _m2(data, likelihood, nets, latents, estimator, fit)


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

    Kingma et al. 2014 (arXiv:1406.5298), table 1: error 3.33 % (+- 0.14) with 100 labels, 2.59 %
    with 600, 2.40 % with 1000 and 2.18 % with 3000. As there, M1 is fitted first, then M2 on its
    features. Not as there: then both are one program, whose classifier is that of the second stage
    behind a copy of M1's encoder; of images without labels, it pays for a change of its answer near
    by (Miyato et al. 2018, arXiv:1704.03976) and for answers that say little (Krause et al. 2010).
    The ELBO is in nats, and must not be compared.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        features: size of M1's latent.
        latents: size of the style.
        hidden: width of M1's two hidden layers.
        consistency: weight of classification and of both penalties, in nats.
    """
    data = load_data("mnist", binarize="dynamic")
    pixels = width(data)
    encoder = MLP(pixels, hidden, hidden, 2 * features)
    q_z1, likelihood = Normal(encoder), Bernoulli(MLP(features, hidden, hidden, pixels))
    first = Experiment(
        VAE(StandardNormal(features), likelihood),
        Factorized(z=(q_z1, ["x"])),
        data.without_labels(),
        {"epochs": 15, "batch_size": 200, "learning_rate": 1e-3, "schedule": "cosine"},
    )
    data = data.labeled(labels, label_seed)
    head = MLP(features, 300, 300, CLASSES)

    def level() -> Normal:
        return Normal(MLP(CLASSES + latents, 300, 2 * features))

    def q_style() -> Normal:
        return Normal(MLP(features + CLASSES, 300, 2 * latents))

    second = Experiment(
        M2(StandardNormal(latents), level(), CLASSES),
        Factorized(y=(_labels(head, "enumerate"), ["x"]), z=(q_style(), ["x", "y"])),
        data,
        {
            "epochs": 8,
            "batch_size": 350,
            "labeled_batch": min(100, labels),
            "schedule": "cosine",
            "objective": SemiSupervised(
                consistency, penalties=_penalties(consistency, epsilon=0.6)
            ),
        },
        before=first,
        begin=lambda: _means(q_z1, data),
    )
    trunk = MLP(pixels, hidden, hidden, features)

    def begin() -> None:
        with torch.no_grad():
            for own, learned in zip(trunk.parameters(), encoder.parameters(), strict=True):
                own.copy_(learned[: len(own)])  # of the last layer, the locations
        for part in (q_z1, likelihood):
            part.requires_grad_(False)

    guide = Factorized(
        z1=(q_z1, ["x"]),
        y=(_labels(nn.Sequential(trunk, head), "enumerate"), ["x"]),
        z2=(q_style(), ["z1", "y"]),
    )
    # Not M2's, which has learned means, but of draws: coordinates that say nothing vary in those.
    model = M1M2(StandardNormal(latents), level(), likelihood, CLASSES)
    fit: dict[str, Any] = {
        "epochs": 20,
        "batch_size": 300,
        "labeled_batch": min(50, labels),
        "learning_rate": 5e-4,
        "schedule": "cosine",
        "objective": SemiSupervised(
            consistency, penalties=_penalties(consistency, epsilon=1.5, start=0.6, rise=3)
        ),
    }
    return Experiment(model, guide, data, fit, second, begin)


def sdgm_mnist_100(
    *,
    labels: int = 100,
    label_seed: int = 0,
    estimator: Estimator = "enumerate",
    classification: float = 0.1,
    latents: int = 100,
    hidden: int = 500,
) -> Experiment:
    """Skip deep generative model of dynamically binarized MNIST with 100 labels.

    Maaløe et al. 2016 (arXiv:1602.05473), table 1: error 1.32 % (+- 0.07) with 100 labels, after
    1000 epochs with batch normalization, which is left out here. The ELBO is in nats, and must not
    be compared.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        estimator: of the label's gradient.
        classification: weight of the classification term, alpha.
        latents: size of the style, and of the auxiliary latent.
        hidden: width of the two hidden layers of each net.
    """
    data = load_data("mnist", binarize="dynamic").labeled(labels, label_seed)
    model = SDGM(
        StandardNormal(latents),
        Normal(MLP(CLASSES + latents, hidden, hidden, 2 * latents)),
        Bernoulli(MLP(latents + CLASSES + latents, hidden, hidden, width(data))),
        CLASSES,
    )
    return _auxiliary(data, model, ["a", "x", "y"], latents, hidden, estimator, classification)


def adgm_mnist_100(
    *,
    labels: int = 100,
    label_seed: int = 0,
    estimator: Estimator = "enumerate",
    classification: float = 0.1,
    latents: int = 100,
    hidden: int = 500,
) -> Experiment:
    """Auxiliary deep generative model of dynamically binarized MNIST with 100 labels.

    Maaløe et al. 2016 (arXiv:1602.05473), table 1: error 0.96 % (+- 0.02) with 100 labels, after
    1000 epochs with batch normalization, which is left out here. The ELBO is in nats, and must not
    be compared.

    Args:
        labels: how many training images keep their label, as many of each class.
        label_seed: of the draw of those.
        estimator: of the label's gradient.
        classification: weight of the classification term, alpha.
        latents: size of the style, and of the auxiliary latent.
        hidden: width of the two hidden layers of each net.
    """
    data = load_data("mnist", binarize="dynamic").labeled(labels, label_seed)
    model = ADGM(
        StandardNormal(latents),
        Normal(MLP(width(data) + CLASSES + latents, hidden, hidden, 2 * latents)),
        Bernoulli(MLP(CLASSES + latents, hidden, hidden, width(data))),
        CLASSES,
    )
    return _auxiliary(data, model, ["x", "y"], latents, hidden, estimator, classification)


def gmvae_digits(*, components: int = 10, latents: int = 10, hidden: int = 128) -> Experiment:
    """Clusters of the embedded digits in the latent space of a VAE.

    Jiang et al. 2017 (arXiv:1611.05148). No published figure for these data; vae-digits with the
    same settings is the one without clusters.

    Args:
        components: number of clusters.
        latents: size of z.
        hidden: width of the two hidden layers of encoder and decoder.
    """
    data = load_data("digits")
    pixels = width(data)
    likelihood = Binomial(MLP(latents, hidden, hidden, pixels), total_count=16)
    component = Normal(nn.Linear(components, 2 * latents))
    guide = Factorized(z=(Normal(MLP(pixels, hidden, hidden, 2 * latents)), ["x"]))
    model = MixtureVAE(component, likelihood, components)
    return Experiment(model, guide, data.without_labels(), dict(COMPARED))


def _penalties(weight: float, **radius: float) -> list[Penalty]:
    """Of the classifier, alike in weight."""
    if weight == 0:
        return []
    return [VirtualAdversarial(weight=weight, **radius), MutualInformation(weight)]


def _means(q: Normal, data: Dataset) -> Dataset:
    """A data set of the posterior means of its grey images, with its labels."""
    splits = {}
    with torch.no_grad():
        for split, columns in data.splits.items():
            like = next(q.parameters())
            x = (columns["x"].to(like.device) / data.unit).to(like.dtype)
            splits[split] = {**columns, "x": q(x).mean.cpu()}
    return dataclasses.replace(data, splits=splits, image_shape=None, unit=1.0, binarization="none")


def _m2(
    data: Dataset,
    likelihood: nn.Module,
    nets: Callable[[int, int], nn.Module],
    latents: int,
    estimator: Estimator,
    fit: dict[str, Any],
) -> Experiment:
    """M2, its guide ``q(y | x) q(z | x, y)``; ``nets`` makes one from its inputs and outputs."""
    guide = Factorized(
        y=(_labels(nets(width(data), CLASSES), estimator), ["x"]),
        z=(Normal(nets(width(data) + CLASSES, 2 * latents)), ["x", "y"]),
    )
    return Experiment(M2(StandardNormal(latents), likelihood, CLASSES), guide, data, fit)


def _auxiliary(
    data: Dataset,
    model: ADGM | SDGM,
    context: list[str],
    latents: int,
    hidden: int,
    estimator: Estimator,
    classification: float,
) -> Experiment:
    """A model with an auxiliary latent and the guide ``q(a | x) q(y | a, x) q(z | context)``."""
    sizes = {"a": latents, "x": width(data), "y": CLASSES}

    def net(outputs: int, *inputs: str) -> MLP:
        return MLP(sum(sizes[name] for name in inputs), hidden, hidden, outputs)

    guide = Factorized(
        a=(Normal(net(2 * latents, "x")), ["x"]),
        y=(_labels(net(CLASSES, "a", "x"), estimator), ["a", "x"]),
        z=(Normal(net(2 * latents, *context)), context),
    )
    fit: dict[str, Any] = {
        "epochs": 1000,
        "batch_size": 200,
        "labeled_batch": 100,
        "learning_rate": 3e-4,
        "objective": SemiSupervised(classification),
    }
    return Experiment(model, guide, data, fit)


def _labels(net: nn.Module, estimator: Estimator) -> Labels:
    """A classifier, with both baselines where the score function needs one."""
    return Labels(net, estimator=estimator, baseline="both" if estimator == "score" else None)
