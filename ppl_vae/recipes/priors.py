"""Recipes that change the prior of the plain VAE."""

from __future__ import annotations

from typing import Literal

from ppl_vae.data import load_data
from ppl_vae.elementwise import RationalQuadratic
from ppl_vae.flows import Coupling, MaskedAutoregressive
from ppl_vae.mixtures import MixtureOfGaussians, VampPrior
from ppl_vae.priors import Autoregressive, FlowPrior
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import DECAYED, cooled, digits, example, gated, posterior, with_vamp


def vamp_digits(*, components: int = 50, latents: int = 10, hidden: int = 128) -> Experiment:
    """VAE of the embedded digits with a VampPrior, whose pseudo-inputs start at training rows.

    Tomczak & Welling 2018 (arXiv:1705.07120). No published figure for these data; vae-digits with
    the same settings (--epochs 200 --learning_rate 1e-3 --warmup 20) is the plain
    one.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    rows = example(made.data, len(made.data.split("train")))
    made.model.prior = VampPrior.from_data(
        posterior(made), rows, components, noise=0.5, bounds=(0.0, 16.0)
    )
    return made


def mixture_prior_digits(
    *, components: int = 50, latents: int = 10, hidden: int = 128
) -> Experiment:
    """VAE of the embedded digits with a mixture of Gaussians as prior.

    The VampPrior's counterpart in Tomczak & Welling 2018 (arXiv:1705.07120), section 4.
    No published figure for these data.

    Args:
        components: of the mixture.
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    made.model.prior = MixtureOfGaussians(latents, components)
    return made


def flow_prior_digits(
    *,
    prior: Literal["maf", "coupling", "spline", "made"] = "maf",
    layers: int = 4,
    latents: int = 10,
    hidden: int = 128,
) -> Experiment:
    """VAE of the embedded digits with a flow, or an autoregressive mixture, as prior.

    Chen et al. 2017 (arXiv:1611.02731), section 3.2; Germain et al. 2015 (arXiv:1502.03509).
    No published figure for these data.

    Args:
        prior: masked autoregressive flow, affine or spline coupling, or MADE with mixtures of five
            normals.
        layers: how many maps of a flow follow one another.
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    if prior == "made":
        made.model.prior = Autoregressive(latents, components=5)
    elif prior == "maf":
        made.model.prior = FlowPrior(MaskedAutoregressive(latents, layers=layers))
    else:
        elementwise = RationalQuadratic() if prior == "spline" else None
        flow = Coupling(latents, layers=layers, elementwise=elementwise)
        made.model.prior = FlowPrior(flow)
    return made


def vamp_static_mnist(*, components: int = 500, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of static MNIST with a VampPrior and gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120), table 1: NLL 85.57 nats, by 5000 importance samples;
    protocol as in vae-static-mnist, K 500. Without weight decay, the ELBO of training rows is 7
    nats above that of validation rows.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    made = with_vamp(gated(load_data("static_mnist"), latents, hidden), components)
    made.fit = cooled(120, 40, **DECAYED)
    return made


def vamp_mnist(*, components: int = 500, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized MNIST with a VampPrior and gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120), protocol as in vae-static-mnist: NLL 82.38 nats.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return with_vamp(gated(load_data("mnist", binarize="dynamic"), latents, hidden), components)


def vamp_omniglot(*, components: int = 1000, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized OMNIGLOT at 28x28 with a VampPrior and gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120) have 104.75 nats on chardata.mat, with K 1000. These
    images are resampled and split otherwise: figures must not be compared with theirs.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return with_vamp(gated(load_data("omniglot", binarize="dynamic"), latents, hidden), components)


def vamp_fashion(*, components: int = 500, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized Fashion-MNIST with a VampPrior and gated layers.

    Norouzi et al. 2020 (arXiv:2004.04795), the VampPrior paper's protocol: NLL 227.35 nats.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return with_vamp(
        gated(load_data("fashion_mnist", binarize="dynamic"), latents, hidden), components
    )


def vamp_caltech(*, components: int = 500, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of the Caltech-101 silhouettes with a VampPrior and gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120): NLL 114.55 nats; data and protocol as in vae-caltech.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return with_vamp(gated(load_data("caltech_silhouettes"), latents, hidden), components)


def vamp_omniglot_iwae(
    *, components: int = 1000, latents: int = 40, hidden: int = 300
) -> Experiment:
    """VAE of the papers' own OMNIGLOT file with a VampPrior and gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120): NLL 104.75 nats with K 1000; data and protocol as in
    vae-omniglot-iwae.

    Args:
        components: number of pseudo-inputs.
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return with_vamp(
        gated(load_data("omniglot_iwae", binarize="dynamic"), latents, hidden), components
    )
