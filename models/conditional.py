"""Models of x given c: with a latent, without one, and the first built on the second."""

from __future__ import annotations

import inspect
from typing import Self, cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Normal
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel
from ppl_vae.nn import MLP


class ConditionalVAE(GenerativeModel):
    """Data given what is known of them, with a latent for the rest (Sohn et al. 2015, NeurIPS 28).

        z_n ~ prior(c_n)                # latent     data | Z
        x_n ~ likelihood(z_n, c_n)      # image      data | D

    c is a covariate, given and not modeled: a one-hot label, attributes, the visible part of an
    image. The model is of p(x | c), and so is its likelihood. Source: "Learning structured output
    representation using deep conditional generative models", section 4. Their latent is drawn given
    c; with a prior without context it is independent of c, as in Kingma et al. 2014
    (arXiv:1406.5298). Their *recurrent* model, which is built on the guess of a net, has a
    likelihood whose net is :class:`OnGuess`.

    Args:
        prior: conditional of c, event ``(Z,)``; or one without context.
        likelihood: conditional of z and c, in this order, event ``(D,)``; its net is the decoder.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def z_dist(self, c: Tensor) -> TorchDistribution:
        return self.prior(c) if inspect.signature(self.prior.forward).parameters else self.prior()

    def x_dist(self, z: Tensor, c: Tensor) -> TorchDistribution:
        return self.likelihood(z, c)

    def forward(
        self,
        x: Tensor | None = None,
        *,
        c: Tensor,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, c, n=n, total=total):
            z = pyro.sample("z", self.z_dist(c))
            return pyro.sample("x", self.x_dist(z, c), obs=x)

    def example_covariates(self, n: int) -> dict[str, Tensor]:
        return {"c": _one_hot(self, n)}

    @classmethod
    def toy(cls) -> Self:
        return cls(Normal(MLP(2, 8, 2 * 3)), Bernoulli(MLP(3 + 2, 8, 6)))


class BaselineNet(GenerativeModel):
    """Data from a net of what is known of them, without a latent (Sohn et al. 2015, NeurIPS 28).

        x_n ~ likelihood(c_n)           # image      data | D

    The baseline that a conditional VAE is held against, and may be built on: see :class:`OnGuess`.
    Given c, entries of x are independent, so that its draws are one guess with noise. It is fitted
    with :class:`ppl_vae.Prior` as a guide, which has nothing to draw; what is maximized is then the
    log-likelihood itself.

    Args:
        likelihood: conditional of c, event ``(D,)``.
    """

    def __init__(self, likelihood: nn.Module) -> None:
        super().__init__()
        self.likelihood = likelihood

    def x_dist(self, c: Tensor) -> TorchDistribution:
        return self.likelihood(c)

    def forward(
        self,
        x: Tensor | None = None,
        *,
        c: Tensor,
        n: int | None = None,
        total: int | None = None,
    ) -> Tensor:
        with self.rows(x, c, n=n, total=total):
            return pyro.sample("x", self.x_dist(c), obs=x)

    def example_covariates(self, n: int) -> dict[str, Tensor]:
        return {"c": _one_hot(self, n)}

    @classmethod
    def toy(cls) -> Self:
        return cls(Bernoulli(MLP(2, 8, 6)))


class OnGuess(nn.Module):
    """The net of a decoder that corrects the guess of another: ``guess(c) + net(z, c)``.

    What is added are a likelihood's parameters, such as the logits of bits. The guess is a net of c
    alone: that of a fitted :class:`BaselineNet`, or one that is learned together with the rest.
    Sohn et al. 2015 (section 4) feed the guess to the net of the prior; here it is where the
    decoder starts, so that a latent without use leaves the baseline.

    Shapes: ``(..., Z + C)``, z and c joined, to ``(..., parameters)``.

    Args:
        guess: maps ``(..., C)`` to ``(..., parameters)``.
        net: maps ``(..., Z + C)`` to as many.
        frozen: whether the guess is left as it is, rather than trained further.

    Raises:
        ValueError: nets that do not state their widths, or whose widths do not go together.
    """

    def __init__(self, guess: nn.Module, net: nn.Module, *, frozen: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = _widths("net", net)
        self.given, guessed = _widths("guess", guess)
        if guessed != self.outputs or self.given >= self.inputs:
            raise ValueError(
                f"OnGuess: the guess maps {self.given} numbers to {guessed}, the net {self.inputs} "
                f"to {self.outputs}; expected as many outputs of both, and of the net the inputs "
                "of the guess after those that are the latent"
            )
        self.guess = guess.requires_grad_(not frozen)
        self.net = net

    def forward(self, joined: Tensor) -> Tensor:
        return self.guess(joined[..., -self.given :]) + self.net(joined)


def _widths(what: str, net: nn.Module) -> tuple[int, int]:
    widths = getattr(net, "inputs", None), getattr(net, "outputs", None)
    if not all(isinstance(width, int) for width in widths):
        raise ValueError(
            f"OnGuess: {what} is {type(net).__name__}, which does not state its .inputs and "
            ".outputs; take a net of ppl_vae.nn, such as MLP"
        )
    return cast(tuple[int, int], widths)


def _one_hot(model: nn.Module, n: int) -> Tensor:
    """Labels of two classes in turn, ``(n, 2)``, on the model's device and in its dtype."""
    like = next(model.parameters())
    return torch.eye(2, dtype=like.dtype, device=like.device)[torch.arange(n) % 2]
