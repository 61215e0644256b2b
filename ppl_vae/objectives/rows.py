"""What our own objectives are computed from: the log-probabilities of each row.

Pyro's ELBOs add up a whole batch. A bound that is no sum, such as a log-mean-exp over draws, needs
each row's own terms; here they are read off the traces once, for every objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from ppl_vae.objectives.enumeration import Enumeration
from ppl_vae.objectives.objective import closed_kl
from ppl_vae.sites import PairError, sample_nodes

PARTICLES = "num_particles_vectorized"
"""The plate of draws, by the name that Pyro gives its own."""

Number = float | Tensor


class RowTerms:
    """Log-probabilities of one run of a pair, by site, draw and row.

    The plate of rows is the one at dim -1, the innermost; there is none besides it. How much a row
    counts is the scale of the observed sites: ``total / rows``, and what handlers multiply it by.
    The scale of a latent in proportion to it is the weight of its KL. What a handler masks counts
    for nothing. Of enumerated sites, all is a mean over their values: exact, where draws would be
    an estimate; a site that the model enumerates has its exact posterior as guide.

    Shapes: K is the number of draws; ``(K, rows)`` but where stated.

    Args:
        model_trace, guide_trace: made under a plate of K draws at dim -2.
        reparameterized: whether all draws have to be, for a gradient to pass through them; False
            for an objective that learns from others too.

    Attributes:
        reconstruction: log p(x | z), all observed sites.
        log_p, log_q: of each local latent, without its weight.
        weights: of the KL of each local latent: a number, ``()`` or ``(rows,)``.
        scale: what a row counts for: a number, ``()`` or ``(rows,)``.
        shared: log p - log q of the draws of sites outside the plate, scaled: ``()``.
        draws: K.
        rows: their number.
        total: how many rows the batch stands for.
        enumeration: of the sites whose values are summed over.

    Raises:
        PairError: no plate of rows, or a plate besides it; a latent that is drawn without
            reparameterization, or not drawn by the guide as a latent of its rows; a site of the
            guide's rows that is no latent of the model's; an enumerated site that is no row's.
    """

    def __init__(
        self, model_trace: Trace, guide_trace: Trace, *, reparameterized: bool = True
    ) -> None:
        self.model_nodes = dict(sample_nodes(model_trace))
        self.guide_nodes = dict(sample_nodes(guide_trace))
        for node in (*self.model_nodes.values(), *self.guide_nodes.values()):
            _check_plates(node)
        for node in self.guide_nodes.values() if reparameterized else ():
            _check_reparameterized(node)
        rows, draws = _row_plate(self.model_nodes.values()), _particles(self.model_nodes.values())
        self.rows, self.total, self.draws = rows.size, rows.full_size, draws.size
        self._shape = torch.Size((self.draws, self.rows))
        observed = [node for node in self.model_nodes.values() if node["is_observed"]]
        latents = [node for node in self.model_nodes.values() if not node["is_observed"]]
        for node in latents:
            if not _summed(node):
                _check_drawn(node, self.guide_nodes.get(node["name"]))
        of_rows = {node["name"] for node in latents if _row_frame(node) is not None}
        for name, node in self.guide_nodes.items():
            if _row_frame(node) is not None and name not in of_rows:
                raise PairError(
                    f"site {name!r} of the guide is no latent of the model's rows: its density is "
                    "part of no latent's; draw the latent itself, from a distribution that has one"
                )
        local = [node for node in (*observed, *latents) if _row_frame(node) is not None]
        self.scale: Number = local[0]["scale"]
        guides = [n for n in self.guide_nodes.values() if n["name"] in of_rows]
        self._log_p = {node["name"]: _log_prob(node) for node in local}
        self._log_q = {node["name"]: _log_prob(node) for node in guides}
        self.enumeration = Enumeration(self.model_nodes, self.guide_nodes, self._log_p, self._log_q)
        self._log_q |= self.enumeration.log_q
        log_probs = {name: self._mean(value) for name, value in self._log_p.items()}
        zeros = torch.zeros_like(log_probs[local[0]["name"]])
        self.reconstruction: Tensor = zeros
        self.shared: Tensor = zeros.new_zeros(())
        self.log_p: dict[str, Tensor] = {}
        self.log_q: dict[str, Tensor] = {}
        self.weights: dict[str, Number] = {}
        for node in (*observed, *latents):
            name = node["name"]
            if name not in log_probs:
                self.shared = self.shared + self._scaled_sum(node)
                continue
            weight = _ratio(node["scale"], self.scale)
            if node["is_observed"]:
                self.reconstruction = self.reconstruction + weight * log_probs[name]
                continue
            self.weights[name], self.log_p[name] = weight, log_probs[name]
            self.log_q[name] = self._mean(self._log_q[name])
        for name, node in self.guide_nodes.items():
            if name not in self.log_q:
                self.shared = self.shared - self._scaled_sum(node)

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights, log p(x, z) - log q(z | x), latents by their weights; summed
        over enumerated values, not weighted by their probabilities."""
        total: Tensor = self.reconstruction.new_zeros(())
        for name, log_p in self._log_p.items():
            if name not in self.weights:
                total = total + _ratio(self.model_nodes[name]["scale"], self.scale) * log_p
                continue
            summed = name in self.enumeration.drawn or name in self.enumeration.marginal
            ratio = log_p if summed else log_p - self._log_q[name]
            total = total + self.weights[name] * ratio
        return self.enumeration.log_sum(total).expand(self._shape)

    def kl(self, name: str) -> Tensor:
        """The KL of a site, ``(K, rows)``, without its weight: in closed form where there is one
        that is a term of the ELBO, else of the draws."""
        model, guide = self.model_nodes[name], self.guide_nodes.get(name)
        closed = closed_kl(guide["fn"], model["fn"]) if guide and self._in_order else None
        if closed is None or guide is None:
            return self.log_q[name] - self.log_p[name]
        return self._mean(_masked(_masked(closed, model), guide))

    def kl_per_latent(self, name: str) -> Tensor:
        """The KL of each coordinate of a site, ``(K, rows, Z)``, as :meth:`kl`: of diagonal normals
        that are not masked.

        Raises:
            PairError: model or guide is another family there.
        """
        p, q = (
            normal_of(nodes[name], who)
            for nodes, who in ((self.model_nodes, "model"), (self.guide_nodes, "guide"))
        )
        if self._in_order:
            kl = kl_divergence(q, p)
        else:
            value = self.guide_nodes[name]["value"]
            kl = q.log_prob(value) - p.log_prob(value)
        events = len(self.model_nodes[name]["fn"].event_shape)
        kl = self.enumeration.mean(kl, events)
        return kl.expand(*self._shape, *kl.shape[kl.dim() - events :]).reshape(*self._shape, -1)

    def weighted_kl(self) -> Tensor:
        """The KLs of all local latents by their weights: ``(K, rows)``."""
        kls = (weight * self.kl(name) for name, weight in self.weights.items())
        return sum(kls, torch.zeros_like(self.reconstruction))

    def only_site(self, what: str) -> str:
        """The one local latent.

        Raises:
            PairError: there are several, or none, or its rows are masked.
        """
        if len(self.log_q) != 1:
            raise PairError(
                f"{what} needs one latent site a row, found {', '.join(self.log_q) or 'none'}: "
                "its aggregate posterior is that of one vector"
            )
        self.refuse_masks(what)
        return next(iter(self.log_q))

    def refuse_masks(self, what: str) -> None:
        """Refuse latents some of whose rows count for nothing.

        Raises:
            PairError: a local latent is masked.
        """
        for name in self.log_q:
            masks = (nodes[name]["mask"] for nodes in (self.model_nodes, self.guide_nodes))
            if any(mask is not None and mask is not True for mask in masks):
                raise PairError(
                    f"{what} takes all rows of a batch alike, and latent {name!r} is masked: leave "
                    "masked rows out of the batch"
                )

    def sum(self, values: Tensor) -> Tensor:
        """Values of rows ``(K, rows)`` or ``(rows,)`` averaged over draws and summed over the rows
        that the batch stands for: ``()``."""
        return (self.scale * values).sum() / (values.shape[0] if values.dim() > 1 else 1)

    def mean(self, values: Tensor) -> Tensor:
        """Values ``(K, rows, ...)`` averaged over draws and rows, by what rows count: ``(...)``."""
        share = self._scales() / self.size
        return (values.mean(0) * share.reshape(-1, *(1,) * (values.dim() - 2))).sum(0)

    def mean_weight(self, name: str) -> Number:
        """The weight of a local latent's KL, averaged over rows: a number or ``()``."""
        weight = self.weights[name]
        if not isinstance(weight, Tensor) or weight.dim() == 0:
            return weight
        return self.mean(weight.expand(1, self.rows))

    @property
    def size(self) -> Tensor:
        """How much all rows count together: ``()``."""
        return self._scales().sum()

    def _scales(self) -> Tensor:
        like = self.reconstruction
        scale = torch.as_tensor(self.scale, dtype=like.dtype, device=like.device)
        return scale.expand(self.rows)

    @property
    def _in_order(self) -> bool:
        # A KL given a latent that depends on the one at hand is no term of the ELBO.
        latents = [n for n, node in self.model_nodes.items() if not node["is_observed"]]
        return latents == [name for name in self.guide_nodes if name in latents]

    def _mean(self, values: Tensor) -> Tensor:
        return self.enumeration.mean(values).expand(self._shape)

    def _scaled_sum(self, node: Mapping[str, Any]) -> Tensor:
        """The log-probability of a site that belongs to no row, averaged over draws."""
        in_plate = any(frame.name == PARTICLES for frame in node["cond_indep_stack"])
        return (node["scale"] * _log_prob(node)).sum() / (self.draws if in_plate else 1)


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
    return _masked(node["fn"].log_prob(node["value"]), node)


def _masked(values: Tensor, node: Mapping[str, Any]) -> Tensor:
    if node["mask"] is None:
        return values
    return torch.where(torch.as_tensor(node["mask"], device=values.device), values, 0.0)


def _ratio(scale: Number, reference: Number) -> Number:
    return 1.0 if scale is reference else scale / reference


def _row_frame(node: Mapping[str, Any]) -> Any:
    return next((frame for frame in node["cond_indep_stack"] if frame.dim == -1), None)


def _row_plate(nodes: Iterable[Mapping[str, Any]]) -> Any:
    """The one plate at dim -1."""
    plates = {frame.name: frame for node in nodes if (frame := _row_frame(node)) is not None}
    if len(plates) != 1:
        found = "none" if not plates else " and ".join(map(repr, plates))
        raise PairError(
            f"the model's plates at dim -1: {found}; expected one, that of the rows, whose terms "
            "this objective is computed from: make the dims of others event dims with .to_event"
        )
    return next(iter(plates.values()))


def _particles(nodes: Iterable[Mapping[str, Any]]) -> Any:
    frames = (frame for node in nodes for frame in node["cond_indep_stack"])
    return next(frame for frame in frames if frame.name == PARTICLES)


def _check_plates(node: Mapping[str, Any]) -> None:
    name = node["name"]
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and frame.dim != -1 and frame.name != PARTICLES:
            raise PairError(
                f"site {name!r} stands in plate {frame.name!r} besides the rows'; expected one "
                "plate, at dim -1: make the other dims event dims with .to_event"
            )
    if _summed(node) and _row_frame(node) is None:
        raise PairError(
            f"site {name!r} is enumerated and stands outside the plate of rows, whose terms would "
            "no longer add up: take TraceEnum_ELBO, or draw the site in the guide"
        )


def _check_drawn(node: Mapping[str, Any], drawn: Mapping[str, Any] | None) -> None:
    name = node["name"]
    if drawn is None:
        raise PairError(f"the guide does not draw {name!r}, which is latent in the model")
    if (_row_frame(node) is None) != (_row_frame(drawn) is None):
        raise PairError(
            f"site {name!r} stands in a plate at dim -1 in one of model and guide only; expected "
            "the plate of rows in both, or in neither"
        )


def _summed(node: Mapping[str, Any]) -> bool:
    return not node["is_observed"] and node["infer"].get("_enumerate_dim") is not None


def _check_reparameterized(node: Mapping[str, Any]) -> None:
    if not (node["is_observed"] or node["fn"].has_rsample or _summed(node)):
        raise PairError(
            f"site {node['name']!r} is drawn without reparameterization "
            f"({type(node['fn']).__name__}): this objective has no gradient through it; take "
            "TraceGraph_ELBO, VIMCO or ReweightedWakeSleep"
        )
