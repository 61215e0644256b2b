"""What our own objectives are computed from: the log-probabilities of each row.

Pyro's ELBOs add up a whole batch. A bound that is no sum, such as a log-mean-exp over draws, needs
each row's own terms; here they are read off the traces once, for every objective.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from ppl_vae.sites import PairError, sample_nodes

PARTICLES = "num_particles_vectorized"
"""The plate of draws, by the name that Pyro gives its own."""

Number = float | Tensor


class RowTerms:
    """Log-probabilities of one run of a pair, by site, draw and row.

    The plate of rows is the one at dim -1, the innermost; there is none besides it. How much a row
    counts is the scale of the observed sites: ``total / rows``, and what handlers multiply it by.
    The scale of a latent in proportion to it is the weight of its KL.

    Shapes: K is the number of draws; ``(K, rows)`` but where stated.

    Args:
        model_trace, guide_trace: made under a plate of K draws at dim -2.

    Attributes:
        reconstruction: log p(x | z), all observed sites.
        log_p, log_q: of each local latent, without its weight.
        weights: of the KL of each local latent: a number or ``()``.
        scale: what a row counts for: a number, ``()`` or ``(rows,)``.
        shared: log p - log q of latents outside the plate, scaled: ``()``.
        rows: their number.
        total: how many rows the batch stands for.

    Raises:
        PairError: a latent that is enumerated, or drawn without reparameterization, or a plate
            besides that of the rows.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace) -> None:
        self.model_nodes = dict(sample_nodes(model_trace))
        self.guide_nodes = dict(sample_nodes(guide_trace))
        nodes = self.model_nodes
        for node in nodes.values():
            _check_plates(node)
        for node in self.guide_nodes.values():
            _check_plates(node)
            if not (node["is_observed"] or node["fn"].has_rsample):
                raise PairError(
                    f"site {node['name']!r} is drawn without reparameterization "
                    f"({type(node['fn']).__name__}): this objective has no gradient through it; "
                    "take TraceGraph_ELBO"
                )
        observed = [node for node in nodes.values() if node["is_observed"]]
        latents = [node for node in nodes.values() if not node["is_observed"]]
        frames = [frame for node in nodes.values() if (frame := _row_frame(node)) is not None]
        self.rows = frames[0].size if frames else 1
        self.total = frames[0].full_size if frames else 1
        local = [node for node in (*observed, *latents) if _row_frame(node) is not None]
        self.scale: Number = local[0]["scale"] if local else 1.0
        draws = next(n["value"] for n in self.guide_nodes.values()).shape[0]
        self._shape = torch.Size((draws, self.rows))
        self.reconstruction: Tensor = torch.zeros(())
        self.shared: Tensor = torch.zeros(())
        self.log_p: dict[str, Tensor] = {}
        self.log_q: dict[str, Tensor] = {}
        self.weights: dict[str, Number] = {}
        for node in observed:
            if _row_frame(node) is None:
                self.shared = self.shared + _scaled_sum(node, draws)
            else:
                weight = _ratio(node["scale"], self.scale)
                self.reconstruction = self.reconstruction + weight * self._log_prob(node)
        for node in latents:
            name = node["name"]
            if _row_frame(node) is None:
                self.shared = self.shared + _scaled_sum(node, draws)
                continue
            self.weights[name] = _ratio(node["scale"], self.scale)
            self.log_p[name] = self._log_prob(node)
            self.log_q[name] = self._log_prob(self.guide_nodes[name])
        for node in self.guide_nodes.values():
            if node["name"] not in self.log_q:
                self.shared = self.shared - _scaled_sum(node, draws)

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights, log p(x, z) - log q(z | x), latents by their weights."""
        latent = (w * (self.log_p[n] - self.log_q[n]) for n, w in self.weights.items())
        return sum(latent, self.reconstruction)

    @property
    def draws(self) -> int:
        """K."""
        return self._shape[0]

    def kl(self, name: str) -> Tensor:
        """The KL of a site, ``(K, rows)``, without its weight: in closed form where there is one
        that is a term of the ELBO, else of the draws."""
        p, q = self.model_nodes[name]["fn"], self.guide_nodes[name]["fn"]
        if self._in_order:
            try:
                return kl_divergence(q, p).expand(self._shape)
            except NotImplementedError:
                pass
        return self.log_q[name] - self.log_p[name]

    def kl_per_latent(self, name: str) -> Tensor:
        """The KL of each coordinate of a site, ``(K, rows, Z)``: of diagonal normals.

        Raises:
            PairError: model or guide is another family there.
        """
        p, q = (
            normal_of(nodes[name], who)
            for nodes, who in ((self.model_nodes, "model"), (self.guide_nodes, "guide"))
        )
        kl = kl_divergence(q, p)
        return kl.expand(*self._shape, *kl.shape[-len(self.model_nodes[name]["fn"].event_shape) :])

    def weighted_kl(self) -> Tensor:
        """The KLs of all local latents by their weights: ``(K, rows)``."""
        kls = (weight * self.kl(name) for name, weight in self.weights.items())
        return sum(kls, torch.zeros_like(self.reconstruction))

    def only_site(self, what: str) -> str:
        """The one local latent.

        Raises:
            PairError: there are several, or none.
        """
        if len(self.log_q) != 1:
            raise PairError(
                f"{what} needs one latent site a row, found {', '.join(self.log_q) or 'none'}: "
                "its aggregate posterior is that of one vector"
            )
        return next(iter(self.log_q))

    def sum(self, values: Tensor) -> Tensor:
        """Values of rows ``(K, rows)`` or ``(rows,)`` averaged over draws and summed over the rows
        that the batch stands for: ``()``."""
        return (self.scale * values).sum() / (values.shape[0] if values.dim() > 1 else 1)

    def mean(self, values: Tensor) -> Tensor:
        """Values ``(K, rows, ...)`` averaged over draws and rows, by what rows count: ``(...)``."""
        scale = torch.as_tensor(self.scale, dtype=values.dtype, device=values.device)
        share = scale.expand(self.rows)
        share = share / share.sum()
        return (values.mean(0) * share.reshape(-1, *(1,) * (values.dim() - 2))).sum(0)

    @property
    def size(self) -> Tensor:
        """How much all rows count together: ``()``."""
        like = self.reconstruction
        return torch.as_tensor(self.scale, dtype=like.dtype, device=like.device).expand(
            self.rows
        ).sum()  # fmt: skip

    @property
    def _in_order(self) -> bool:
        # A KL given a latent that depends on the one at hand is no term of the ELBO.
        drawn = [name for name in self.guide_nodes if name in self.log_q]
        return drawn == list(self.log_q)

    def _log_prob(self, node: Mapping[str, Any]) -> Tensor:
        return _log_prob(node).expand(self._shape)


class RowObjective(ELBO):
    """An objective that is computed from the log-probabilities of rows.

    A ``pyro.infer.ELBO``: it runs under ``pyro.infer.SVI`` and under ours, on programs whose rows
    stand in one plate at dim -1. To implement: ``loss_of``, or ``differentiable_loss`` and with it
    all that is run.

    Args:
        draws: K, of the latents, made together in a plate at dim -2.

    Attributes:
        state: what the objective itself learns, or changes over training: its parameters are
            trained with the pair's, and a run's checkpoints hold it. None: nothing.
        ends: the epoch from which it no longer changes: early stopping waits for it.

    Raises:
        ValueError: draws below 1.
    """

    ends: float = 0.0
    state: nn.Module | None = None

    def __init__(self, draws: int = 1) -> None:
        if draws < 1:
            raise ValueError(f"{type(self).__name__}(draws={draws}): expected at least 1")
        super().__init__(num_particles=draws, max_plate_nesting=1, vectorize_particles=True)

    @property
    def draws(self) -> int:
        """K."""
        return self.num_particles

    @abstractmethod
    def loss_of(self, terms: RowTerms) -> Tensor:
        """The loss ``()``, in nats of all rows that the batch stands for."""

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start. Most do not depend on it."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss ``()``, whose gradients are those of the objective."""
        return self.loss_of(RowTerms(*self._get_trace(model, guide, args, kwargs)))

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.detach()

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(self.plate(guide)).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.plate(model), trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace

    def plate(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """A program whose draws are made K times together."""
        return pyro.plate(PARTICLES, self.draws, dim=-2)(program)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({settings})"

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, but for modules: what ``run.json`` keeps."""
        return {"draws": self.draws}


def normal_of(node: Mapping[str, Any], who: str) -> TorchNormal:
    """The entries of a site's distribution, where it is a diagonal normal.

    Raises:
        PairError: it is another one.
    """
    fn = node["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not isinstance(fn, TorchNormal):
        raise PairError(
            f"site {node['name']!r} of the {who} is {type(fn).__name__}; this objective needs "
            "diagonal normals there: take MeanField as guide, or a prior that is normal"
        )
    return fn


def _log_prob(node: Mapping[str, Any]) -> Tensor:
    log_prob = node["fn"].log_prob(node["value"])
    if node["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, 0.0)
    return log_prob


def _scaled_sum(node: Mapping[str, Any], draws: int) -> Tensor:
    """The log-probability of a site that belongs to no row, averaged over draws."""
    log_prob = node["scale"] * _log_prob(node)
    in_plate = any(frame.name == PARTICLES for frame in node["cond_indep_stack"])
    return log_prob.sum() / (draws if in_plate and log_prob.shape[:1] == (draws,) else 1)


def _ratio(scale: Number, reference: Number) -> Number:
    return 1.0 if scale is reference else scale / reference


def _row_frame(node: Mapping[str, Any]) -> Any:
    return next((frame for frame in node["cond_indep_stack"] if frame.dim == -1), None)


def _check_plates(node: Mapping[str, Any]) -> None:
    name = node["name"]
    if any(frame.vectorized and frame.dim < -2 for frame in node["cond_indep_stack"]) or any(
        frame.dim == -2 and frame.name != PARTICLES for frame in node["cond_indep_stack"]
    ):
        raise PairError(
            f"site {name!r} stands in a plate besides the rows'; expected one plate, at dim -1: "
            "make the other dims event dims with .to_event"
        )
    if node["infer"].get("enumerate"):
        raise PairError(
            f"site {name!r} is enumerated: this objective draws every latent; take "
            "TraceEnum_ELBO, or draw the site in the guide"
        )
