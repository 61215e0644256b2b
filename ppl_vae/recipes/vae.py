"""Recipes of the plain VAE: one latent vector, standard normal prior, mean-field guide."""

from __future__ import annotations

from torch import nn

from ppl_vae.data import load_data
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.vae import VAE
from ppl_vae.nn import ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal
from ppl_vae.recipes import Experiment
from ppl_vae.recipes._parts import cooled, digits, example, gated


def vae_digits(*, latents: int = 10, hidden: int = 128) -> Experiment:
    """The demo: a VAE of scikit-learn's 8x8 digits, counts 0 to 16 under a Binomial.

    Kingma & Welling 2014 (arXiv:1312.6114). No published figure: the data come with the package
    scikit-learn, so that it runs anywhere, in seconds.

    Args:
        latents: size of z.
        hidden: width of the decoder's two hidden layers, and of the encoder's one and its features.
    """
    made = digits(latents, hidden)
    made.fit = {"epochs": 60, "batch_size": 50, "learning_rate": 2e-3, "warmup": 10}
    return made


def vae_static_mnist(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of static MNIST with gated layers, as in the VampPrior paper's table.

    Tomczak & Welling 2018 (arXiv:1705.07120): gated MLPs 2 x 300, z 40, batch 100, Adam 5e-4,
    warm-up 100 epochs, at most 2000 epochs, early stopping after 50; NLL 88.56 nats with 5000
    samples. The defaults warm up faster and let the learning rate fall at the end, after which
    there is nothing to wait for; ``ppl-vae reproduce --protocol paper`` does as the paper did.
    Data: Larochelle & Murray 2011 (fixed bits), 50k/10k/10k.

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    made = gated(load_data("static_mnist"), latents, hidden)
    made.fit = cooled(95, 15)
    return made


def vae_mnist(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized MNIST with gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120), protocol as in vae-static-mnist: NLL 84.50 nats.
    Training bits are drawn anew at each batch, validation and test bits once with a fixed seed.

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    made = gated(load_data("mnist", binarize="dynamic"), latents, hidden)
    made.fit = cooled(160, 50)
    return made


def vae_fashion(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized Fashion-MNIST with gated layers.

    Norouzi et al. 2020 (arXiv:2004.04795), the VampPrior paper's protocol: NLL 228.70 nats.

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return gated(load_data("fashion_mnist", binarize="dynamic"), latents, hidden)


def vae_omniglot(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of dynamically binarized OMNIGLOT at 28x28 by area averaging.

    Split by alphabets (Lake et al. 2015) and resampled otherwise than the papers' file: figures
    must not be compared with theirs (108.50 nats on chardata.mat, Tomczak & Welling 2018).

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return gated(load_data("omniglot", binarize="dynamic"), latents, hidden)


def vae_caltech(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of the Caltech-101 silhouettes with gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120): NLL 123.43 nats by 5000 importance samples, protocol
    as in vae-static-mnist. Data: Marlin et al. 2010, 28x28 bits, 4,100 / 2,264 / 2,307; the file
    has the object as 0, load_data gives it as 1, as the paper's code does by `1 - x`.

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return gated(load_data("caltech_silhouettes"), latents, hidden)


def vae_omniglot_iwae(*, latents: int = 40, hidden: int = 300) -> Experiment:
    """VAE of the papers' own OMNIGLOT file with gated layers.

    Tomczak & Welling 2018 (arXiv:1705.07120): NLL 108.50 nats by 5000 importance samples, protocol
    as in vae-static-mnist. Data: chardata.mat of Burda et al. 2016, binarized anew at each batch,
    23,000 / 1,345 / 8,070; which rows are for validation, the paper draws at random.

    Args:
        latents: size of z.
        hidden: width of the two gated hidden layers of encoder and decoder.
    """
    return gated(load_data("omniglot_iwae", binarize="dynamic"), latents, hidden)


def conv_vae_mnist(*, latents: int = 32, width: int = 32, hidden: int = 256) -> Experiment:
    """Convolutional VAE of dynamically binarized MNIST.

    Two strided convolutions each way; no published figure for so small a net.

    Args:
        latents: size of z.
        width: channels of the convolution next to the image; the next one has twice as many.
        hidden: features between the encoder's convolutions and the guide's heads.
    """
    data = load_data("mnist", binarize="dynamic")
    assert data.image_shape is not None
    model = VAE(StandardNormal(latents), Bernoulli(ConvDecoder(latents, data.image_shape, width)))
    encoder = nn.Sequential(ConvEncoder(data.image_shape, hidden, width), nn.ReLU())
    guide = MeanField(model, encoder, example(data))
    fit = {"epochs": 100, "learning_rate": 1e-3, "warmup": 10, "patience": 20}
    return Experiment(model, guide, data, fit)
