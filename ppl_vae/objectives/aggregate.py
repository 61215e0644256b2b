"""ELBOs that regularize the aggregate posterior, q(z) = mean over the data of q(z | x).

All look at the rows that run at once, whose number matters: what they find in a part of a batch, as
under ``fit(accumulate=)``, is not what they find in the whole.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ppl_vae.objectives.row_objective import RowObjective
from ppl_vae.objectives.rows import RowTerms, normal_of


class _Penalized(RowObjective):
    """The ELBO minus a penalty on a batch's draws, once for each row that it stands for.

    One latent site a row. To implement: ``penalty``.

    Attributes:
        kl_share: how much of the KL is left in place.
    """

    kl_share: float = 1.0

    def __init__(self) -> None:
        super().__init__(draws=1)

    @abstractmethod
    def penalty(self, terms: RowTerms, site: str) -> Tensor:
        """What is taken from the mean ELBO of a row, in nats: ``()``."""

    def loss_of(self, terms: RowTerms) -> Tensor:
        penalty = self.penalty(terms, terms.only_site(type(self).__name__))
        elbo = terms.sum(terms.reconstruction - self.kl_share * terms.weighted_kl())
        return terms.size * penalty - elbo - terms.shared


class BetaTC(RowObjective):
    """The KL in three parts, each with a weight of its own, as in the beta-TCVAE.

        E_q log p(x | z) - alpha I(x; z) - beta TC(z) - gamma sum_d KL(q(z_d) || p(z_d))

    Source: Chen et al. 2018 (arXiv:1802.04942), eq. 2 and 4. The densities of the aggregate
    posterior are estimated from the batch: "weighted" is the paper's minibatch-weighted sampling
    (eq. 3), too low by about the logarithm of the number of batches; "stratified" (its appendix
    C.2) is unbiased in the density. One latent site, a diagonal normal in the guide.

    Args:
        beta, alpha, gamma: the weights; all 1 is an ELBO.
        estimator: of log q(z).

    Raises:
        ValueError: a negative weight, or another estimator.
        PairError: when run, of several latent sites, or a guide of another family.
    """

    def __init__(
        self,
        beta: float,
        alpha: float = 1.0,
        gamma: float = 1.0,
        estimator: Literal["weighted", "stratified"] = "stratified",
    ) -> None:
        super().__init__(draws=1)
        if min(beta, alpha, gamma) < 0 or estimator not in ("weighted", "stratified"):
            raise ValueError(
                f"BetaTC(beta={beta}, alpha={alpha}, gamma={gamma}, estimator={estimator!r}): "
                "expected weights of at least 0, and 'weighted' or 'stratified'"
            )
        self.beta, self.alpha, self.gamma, self.estimator = beta, alpha, gamma, estimator

    def loss_of(self, terms: RowTerms) -> Tensor:
        site = terms.only_site("BetaTC")
        joint, marginals = self.aggregate(terms, site)
        log_q, log_p = terms.log_q[site][0], terms.log_p[site][0]
        information = log_q - joint
        correlation = joint - marginals.sum(-1)
        divergence = marginals.sum(-1) - log_p
        kl = self.alpha * information + self.beta * correlation + self.gamma * divergence
        bound = terms.reconstruction[0] - terms.weights[site] * kl
        return -terms.sum(bound) - terms.shared

    def aggregate(self, terms: RowTerms, site: str) -> tuple[Tensor, Tensor]:
        """Estimates of log q(z) ``(rows,)`` and of log q(z_d) ``(rows, Z)`` at a batch's draws."""
        z, (loc, scale) = _draws(terms, site), _normal(terms, site)
        # Of draw i under the posterior of row j: (rows, rows, Z).
        q = torch.distributions.Normal(loc, scale, validate_args=False)
        pairs = q.log_prob(z.unsqueeze(1))
        log_weights = self._weights(z, terms.total).log()
        joint = (log_weights + pairs.sum(-1)).logsumexp(1)
        return joint, (log_weights.unsqueeze(-1) + pairs).logsumexp(1)

    def _weights(self, z: Tensor, total: int) -> Tensor:
        """Of each pair of a draw and a row, ``(rows, rows)``."""
        rows, others = len(z), len(z) - 1
        if self.estimator == "weighted" or rows == 1:
            return z.new_full((rows, rows), 1 / (rows * total))
        own = torch.eye(rows, dtype=z.dtype, device=z.device)
        # One of the others stands for all rows that are not in the batch.
        last = own.roll(-1, 1)
        rest = (1 - own - last) / others
        return own / total + rest + last * (total - others) / (total * others)

    def settings(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "alpha": self.alpha,
            "gamma": self.gamma,
            "estimator": self.estimator,
        }


class FactorVAE(_Penalized):
    """The ELBO minus gamma times the total correlation, by a discriminator's density ratio.

    Source: Kim & Mnih 2018 (arXiv:1802.05983), eq. 2-3. The discriminator learns, at the pair's own
    learning rate and in the same step, to tell draws of q(z) from draws whose coordinates are
    permuted over the batch. Outside of ``fit``, a torch optimizer has to be given its parameters
    too, ``state.parameters()``.

    Args:
        discriminator: net ``(rows, Z)`` to ``(rows, 1)``, the logit of a draw that is not permuted.
            The paper's has six layers of 1000, leaky ReLU.
        gamma: weight of the total correlation.

    Raises:
        ValueError: gamma below 0.
        PairError: when run, of several latent sites.
    """

    def __init__(self, discriminator: nn.Module, gamma: float = 35.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"FactorVAE(gamma={gamma}): expected a weight of at least 0")
        self.state, self.gamma = discriminator, gamma

    def penalty(self, terms: RowTerms, site: str) -> Tensor:
        z = _draws(terms, site)
        assert self.state is not None
        pyro.module("discriminator", self.state)  # by which a pyro.optim one finds its parameters
        fixed = {name: p.detach() for name, p in self.state.named_parameters()}
        correlation = functional_call(self.state, fixed, (z,)).mean()
        own = z.detach()
        permuted = own.gather(0, torch.rand_like(own).argsort(0))
        # Adds the discriminator's loss to the gradient, and nothing to the value.
        loss = (
            nn.functional.softplus(-self.state(own)) + nn.functional.softplus(self.state(permuted))
        ).mean() / 2
        return self.gamma * correlation + loss - loss.detach()

    def settings(self) -> dict[str, Any]:
        return {"gamma": self.gamma}


class DIPVAE(_Penalized):
    """The ELBO minus the distance of the aggregate posterior's covariance from the identity.

        lambda_od sum_{i != j} C_ij^2 + lambda_d sum_i (C_ii - 1)^2

    Source: Kumar et al. 2018 (arXiv:1711.00848), eq. 6-7. C is the covariance over the batch of the
    posterior means ("I"), or of q(z), which adds the mean of the posterior variances ("II"). One
    latent site, a diagonal normal in the guide.

    Args:
        off_diagonal, diagonal: lambda_od and lambda_d.
        kind: "I" or "II".

    Raises:
        ValueError: a negative weight, or another kind.
        PairError: when run, of several latent sites, or a guide of another family.
    """

    def __init__(
        self, off_diagonal: float, diagonal: float, kind: Literal["I", "II"] = "II"
    ) -> None:
        super().__init__()
        if min(off_diagonal, diagonal) < 0 or kind not in ("I", "II"):
            raise ValueError(
                f"DIPVAE(off_diagonal={off_diagonal}, diagonal={diagonal}, kind={kind!r}): "
                "expected weights of at least 0, and 'I' or 'II'"
            )
        self.off_diagonal, self.diagonal, self.kind = off_diagonal, diagonal, kind

    def penalty(self, terms: RowTerms, site: str) -> Tensor:
        loc, scale = _normal(terms, site)
        centered = loc - loc.mean(0)
        covariance = centered.T @ centered / len(loc)
        if self.kind == "II":
            covariance = covariance + torch.diag(scale.square().mean(0))
        diagonal = covariance.diagonal()
        outside = covariance.square().sum() - diagonal.square().sum()
        return self.off_diagonal * outside + self.diagonal * (diagonal - 1).square().sum()

    def settings(self) -> dict[str, Any]:
        return {
            "off_diagonal": self.off_diagonal,
            "diagonal": self.diagonal,
            "kind": self.kind,
        }


class InfoVAE(_Penalized):
    """Part of the KL exchanged for the maximum mean discrepancy of q(z) from the prior.

        E_q log p(x | z) - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + lambda - 1) MMD(q(z), p(z))

    Source: Zhao et al. 2019 (arXiv:1706.02262), eq. 6. The unbiased estimate of the squared MMD,
    from a batch's draws and as many of the prior, with a sum of inverse multiquadratic kernels ``c
    / (c + |z - z'|^2)``, c from 0.1 to 10 times 2 Z (Tolstikhin et al. 2018, arXiv:1711.01558,
    section 4). With alpha = 1 it is a Wasserstein autoencoder's penalty. A batch of a single row,
    which has no such estimate, goes without it.

    Args:
        alpha: how much of the KL is given up, from 0 to 1.
        lam: lambda.

    Raises:
        ValueError: numbers for which the MMD's weight would be negative, or alpha outside 0 to 1.
        PairError: when run, of several latent sites.
    """

    def __init__(self, alpha: float = 0.0, lam: float = 10.0) -> None:
        super().__init__()
        if not (0 <= alpha <= 1 and alpha + lam >= 1):
            raise ValueError(
                f"InfoVAE(alpha={alpha}, lam={lam}): expected alpha from 0 to 1, and a sum of at "
                "least 1, or the discrepancy would be sought"
            )
        self.alpha, self.lam = alpha, lam
        self.kl_share = 1 - alpha

    def penalty(self, terms: RowTerms, site: str) -> Tensor:
        z = _draws(terms, site)
        prior = terms.model_nodes[site]["fn"]
        draws = prior.rsample() if prior.has_rsample else prior.sample()
        if len(z) == 1:
            return z.new_zeros(())
        return (self.alpha + self.lam - 1) * squared_mmd(z, draws.reshape(z.shape))

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "lam": self.lam}


def _draws(terms: RowTerms, site: str) -> Tensor:
    """The one draw of each row: ``(rows, Z)``."""
    return terms.guide_nodes[site]["value"][0].reshape(terms.rows, -1)


def _normal(terms: RowTerms, site: str) -> tuple[Tensor, Tensor]:
    """Locations and scales of the posteriors: ``(rows, Z)`` each."""
    q = normal_of(terms.guide_nodes[site], "guide")
    shape = terms.guide_nodes[site]["value"].shape
    loc, scale = (x.expand(shape)[0].reshape(terms.rows, -1) for x in (q.loc, q.scale))
    return loc, scale


def squared_mmd(one: Tensor, other: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, J. Mach.
    Learn. Res. 13, eq. 3) of two distributions, from draws ``(n, Z)`` and ``(m, Z)``: ``()``.
    Kernels as :class:`InfoVAE` says."""
    within = sum(
        (_kernel(x, x).sum() - _kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1))
        for x in (one, other)
    )
    return within - 2 * _kernel(one, other).mean()


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """``(n, m)``."""
    distances = (one.unsqueeze(1) - other).square().sum(-1)
    size = 2 * one.shape[-1]
    return torch.stack([c * size / (c * size + distances) for c in MULTIPLES]).sum(0)


MULTIPLES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
