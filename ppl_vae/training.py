"""An objective as the training loop runs it, and the plain ELBO watched besides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.objectives import Evolving, Objective, Schedule, Terms, backward
from ppl_vae.objectives.enumeration import Enumeration
from ppl_vae.objectives.objective import is_beside
from ppl_vae.objectives.rows import PARTICLES
from ppl_vae.objectives.semi_supervised import strata


class Training:
    """An objective as the training loop runs it: per datum, annealed, in parts, and watched.

    The latents' log-probabilities are weighted from outside by ``weight``, so neither model nor
    guide knows of annealing; ``terms`` is the unannealed ELBO, whatever the objective is. A loss
    per datum makes the gradient's norm independent of the data's size. All that changes from step
    to step is held in tensors, so that a recorded step follows it.

    Args:
        objective: the estimator that is optimized: a :class:`RowObjective`, or one that is linear
            in log-probabilities, or their scale would change what it is.
        total: size of the data set; log-probabilities are divided by it.
        autocast: gives a context for the programs' runs, such as Fabric's ``autocast``; densities
            are taken outside it, in full precision.
        warmup: of ``weight``, set by ``at``; one that ends at once costs nothing. None: ``weight``
            is set by hand.
        parts: a batch is run in so many parts, whose gradients add up: with less memory, to the
            same mean.
        device, dtype: of the programs.

    Attributes:
        state: what the objective itself learns, or changes over training; None: nothing.
        totals: sums over all rows run so far of reconstruction, KL, and 1: ``(3,)``; rows with and
            without labels by what they stand for.
    """

    def __init__(
        self,
        objective: Objective,
        total: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        warmup: Schedule | None = None,
        parts: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.objective = objective
        self.total = total
        self.autocast = autocast
        self.parts = parts
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self.warmup = warmup
        weighted = warmup is None or warmup.ends > 0
        self._weight = torch.ones((), dtype=dtype, device=device) if weighted else None
        # An attribute, so that a recorded step sees what it takes for granted of it.
        self.state = objective.state if isinstance(objective, Evolving) else None
        if self.state is not None:
            self.state.to(device, dtype)

    @property
    def weight(self) -> float:
        """Weight of the latents' log-probabilities."""
        return 1.0 if self._weight is None else self._weight.item()

    @weight.setter
    def weight(self, weight: float) -> None:
        if self._weight is None:
            raise ValueError("without a warm-up the weight is 1: Training(warmup=)")
        self._weight.fill_(weight)

    @property
    def ends(self) -> float:
        """The epoch from which the objective stays as it is."""
        ends = 0.0 if self.warmup is None else self.warmup.ends
        return max(ends, self.objective.ends) if isinstance(self.objective, Evolving) else ends

    def at(self, epoch: float) -> None:
        """Take up the point of training, in epochs from its start (fractions count)."""
        if self.warmup is not None and self._weight is not None:
            self.weight = self.warmup(epoch)
        if isinstance(self.objective, Evolving):
            self.objective.at(epoch)

    @property
    def terms(self) -> Terms:
        """The mean over the rows run so far."""
        reconstruction, kl, rows = self.totals
        return Terms(reconstruction / rows, kl / rows)

    def forget(self) -> None:
        """Begin the mean of ``terms`` anew."""
        self.totals.zero_()

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return self._run(backward, model, guide, args, kwargs)

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        def loss(objective: Objective, *args: Any, **kwargs: Any) -> Any:
            return objective.loss(*args, **kwargs)

        return self._run(loss, model, guide, args, kwargs)

    def _run(
        self,
        how: Callable[..., Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        loss: Any = 0.0
        batch = max(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        for columns, share in strata(kwargs):
            tensors = [v for v in (*args, *columns.values()) if isinstance(v, Tensor)]
            rows = len(tensors[0])
            for part in range(self.parts):
                own_args = tuple(_part(value, part, self.parts) for value in args)
                own_kwargs = {k: _part(value, part, self.parts) for k, value in columns.items()}
                size = len(_part(tensors[0], part, self.parts))
                if size == 0:
                    continue
                loss = loss + self._run_part(
                    how, model, guide, own_args, own_kwargs, share * size / rows, batch
                )
        return loss

    def _run_part(
        self,
        how: Callable[..., Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        share: float,
        batch: int,
    ) -> Any:
        """Run rows that stand for a share of a batch of so many."""
        observed = share / self.total
        latent = observed if self._weight is None else observed * self._weight
        scale = _Scale(observed=observed, latent=latent)
        watch = _Watch(self.autocast)
        watched = watch.of_model(scale(model)), watch.of_guide(scale(guide))
        loss = how(self.objective, *watched, *args, **kwargs)
        terms = watch.terms(self.total)
        # TraceGraph_ELBO marks tensors by what they come from.
        figures = map(detach_provenance, (terms.reconstruction, terms.kl))
        new = (*figures, torch.ones(()))
        self.totals += share * batch * torch.stack([x.to(self.totals) for x in new])
        return loss


def _part(value: Any, part: int, parts: int) -> Any:
    return value.tensor_split(parts)[part] if isinstance(value, Tensor) and parts > 1 else value


class _Scale(Messenger):
    """Weights the log-probabilities of observed and of latent sites."""

    def __init__(self, observed: float, latent: float | Tensor) -> None:
        super().__init__()
        self.observed = observed
        self.latent = latent

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            unweighted = msg["is_observed"] or is_beside()
            msg["scale"] = msg["scale"] * (self.observed if unweighted else self.latent)


class _Watch:
    """Sums log-probabilities of the runs that an estimator makes of a pair.

    An estimator's own traces are not to be had from outside, so each site's density is taken
    once more.
    """

    def __init__(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.autocast = autocast
        self.runs: list[_Run] = []

    def of_model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Listen(self._hear_model), self.autocast():
                return model(*args, **kwargs)

        return watched

    def of_guide(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Listen(self._hear_guide), self.autocast():
                return guide(*args, **kwargs)

        return watched

    def _hear_model(self, msg: Any) -> None:
        if not self.runs or msg["name"] in self.runs[-1].model:
            self.runs.append(_Run())
        self.runs[-1].model[msg["name"]] = _Heard(msg)

    def _hear_guide(self, msg: Any) -> None:
        if not self.runs or self.runs[-1].model:
            self.runs.append(_Run())
        self.runs[-1].guide[msg["name"]] = _Heard(msg)

    def terms(self, total: int) -> Terms:
        runs = [run.sums() for run in self.runs]
        reconstruction, latent = (
            sum(part) / (len(runs) * total) for part in zip(*runs, strict=True)
        )
        return Terms(torch.as_tensor(reconstruction), -torch.as_tensor(latent))


class _Heard:
    """A site as it was heard: its log-probability, without gradient, and how it counts."""

    def __init__(self, msg: Any) -> None:
        # Not under no_grad: a transform keeps the last value that it inverted, and would give it
        # to the estimator's own look at the site without its gradient.
        self.log_prob: Tensor = msg["fn"].log_prob(msg["value"]).detach()
        if msg["mask"] is not None:
            self.log_prob = torch.where(torch.as_tensor(msg["mask"]), self.log_prob, 0.0)
        self.node = {name: msg[name] for name in ("is_observed", "infer")}
        # Scaled up by the plates but by nothing else; particles are averaged.
        self.scale = 1.0
        for frame in msg["cond_indep_stack"]:
            if frame.name == PARTICLES:
                self.scale /= frame.size
            elif frame.full_size != frame.size:
                self.scale *= frame.full_size / frame.size


class _Run:
    """What was heard of one run of a pair."""

    def __init__(self) -> None:
        self.model: dict[str, _Heard] = {}
        self.guide: dict[str, _Heard] = {}

    def sums(self) -> tuple[Tensor | float, Tensor | float]:
        """Over all rows: log p of the observed sites, and log p - log q of the latents."""
        p = {name: heard.log_prob for name, heard in self.model.items()}
        q = {name: heard.log_prob for name, heard in self.guide.items()}
        model_nodes = {name: heard.node for name, heard in self.model.items()}
        guide_nodes = {name: heard.node for name, heard in self.guide.items()}
        enumeration = Enumeration(model_nodes, guide_nodes, p, q)
        observed: Tensor | float = 0.0
        latent: Tensor | float = 0.0
        for name, heard in self.model.items():
            log_p = heard.scale * enumeration.mean(p[name]).sum()
            if heard.node["is_observed"]:
                observed = observed + log_p
                continue
            latent = latent + log_p
            if name in enumeration.log_q:
                latent = latent - heard.scale * enumeration.mean(enumeration.log_q[name]).sum()
        for name, heard in self.guide.items():
            latent = latent - heard.scale * enumeration.mean(q[name]).sum()
        return observed, latent


class _Listen(Messenger):
    def __init__(self, hear: Callable[[Any], None]) -> None:
        super().__init__()
        self.hear = hear

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (site_is_subsample(msg) or is_beside()):
            self.hear(msg)
