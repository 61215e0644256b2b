"""A model's density over unconstrained coordinates of its local latents, for gradients to climb."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_vae.assignments import Assignments
from ppl_vae.draws import particles
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.sites import read_sites

Start = Literal["prior", "guide"]
"""Where annealing starts."""


class NotAnnealable(ValueError):
    """A model, or a guide, whose latents no gradient moves; the message says why."""


class Density:
    """log start(z) and log p(x, z) of rows, over coordinates u of z that know no bounds.

    Enumerated sites are summed out, in the guide too. Both densities are over u: they have the
    Jacobian of z(u). The prior is that of the latents given whatever observed sites they depend on.

    Args:
        columns: some rows of what the model observes, and its covariates.
        given: values of all global latents, ``(event)`` each.
        withheld: observables that are inferred, of which every value is tried.

    Raises:
        NotAnnealable: see :func:`ppl_vae.annealing.annealed_log_evidence`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        guide: torch.nn.Module,
        columns: Mapping[str, Tensor],
        *,
        start: Start,
        given: Mapping[str, Tensor],
        withheld: Collection[str] = (),
    ) -> None:
        self._model, self._guide, self._start = model, guide, start
        # As a plate of particles leaves a global value: one for all chains and rows.
        self._given = {name: value[None, None] for name, value in given.items()}
        few = {name: column[:2] for name, column in columns.items()}
        self._assignments = Assignments(model, guide, few, withheld)
        summed = {*self._assignments.drawn, *self._assignments.marginal}
        sites = read_sites(model, **few)
        self._events = {
            name: site.event_shape
            for name, site in sites.items()
            if site.local and not site.observed and name not in summed
        }
        if discrete := [n for n in self._events if sites[n].support.is_discrete]:
            raise NotAnnealable(
                f"site {discrete[0]!r} of {type(model).__name__} is discrete and not enumerated: "
                "it has no gradient to follow"
            )
        if not self._events:
            raise NotAnnealable(f"{type(model).__name__} has no continuous latent of its rows")
        if start == "guide" and any(
            site.auxiliary and site.local for site in read_sites(guide, **few).values()
        ):
            raise NotAnnealable(
                f"{type(guide).__name__} draws auxiliary sites, so that it has no density to start "
                'from: take start="prior"'
            )
        self._shapes: dict[str, torch.Size] = {}  # of each site's coordinates
        self.draw(few, 1)

    def draw(self, columns: Mapping[str, Tensor], chains: int) -> Tensor:
        """Coordinates of exact draws from the start, ``(chains, rows, U)``."""
        program = self._model if self._start == "prior" else self._guide
        nodes = self._trace(program, columns, {}, chains)
        return self.coordinates(columns, {name: nodes[name]["value"] for name in self._events})

    def coordinates(self, columns: Mapping[str, Tensor], z: Mapping[str, Tensor]) -> Tensor:
        """Coordinates of latents ``(chains, rows, event)``, by site: ``(chains, rows, U)``."""
        chains, rows = next(iter(z.values())).shape[:2]
        given = {name: z[name] for name in self._events}
        nodes = self._trace(self._model, columns, given, chains)
        flat: list[Tensor] = []
        for name, event in self._events.items():
            support = nodes[name]["fn"].support
            own = dist.transforms.biject_to(support).inv(z[name].expand(chains, rows, *event))
            self._shapes[name] = own.shape[2:]
            flat.append(own.flatten(2) if own.dim() > 2 else own.unsqueeze(-1))
        return torch.cat(flat, -1)

    def __call__(self, u: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log start(u) and log p(x, u) in nats: float64 ``(chains, rows)`` each."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        placed = {
            name: flat.reshape(*flat.shape[:-1], *shape)
            for (name, shape), flat in zip(self._shapes.items(), u.split(sizes, -1), strict=True)
        }
        rows = u.shape[1]
        every = [
            {name: value.expand(len(u), rows, *value.shape) for name, value in values.items()}
            for drawn in self._assignments.of_guide()
            for values in [drawn | own for own in self._assignments.of_model()]
        ]
        moved = _Moved(placed)
        starts: list[Tensor] = []
        joints: list[Tensor] = []
        for values in every:
            nodes = self._trace(self._model, columns, values, len(u), moved)
            latent = {*self._events, *values}
            prior = moved.log_jacobian + _log_density(nodes, latent)
            seen = {name for name, node in nodes.items() if node["is_observed"]} - latent
            starts.append(prior)
            joints.append(prior + _log_density(nodes, seen))
        joint = torch.stack(torch.broadcast_tensors(*joints)).logsumexp(0)
        if self._start == "prior":
            return torch.stack(torch.broadcast_tensors(*starts)).logsumexp(0), joint
        of_guide: list[Tensor] = []
        for values in self._assignments.of_guide():
            nodes = self._trace(self._guide, columns, values | moved.values, len(u))
            of_guide.append(_log_density(nodes, {*self._events, *values}))
        start = torch.stack(torch.broadcast_tensors(*of_guide)).logsumexp(0)
        return start + moved.log_jacobian, joint

    def _trace(
        self,
        program: Any,
        columns: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        chains: int,
        moved: _Moved | None = None,
    ) -> dict[str, dict[str, Any]]:
        """The nodes of the rows' sites of one run, under a plate of chains."""
        conditioned = poutine.condition(program, data=self._given | dict(values))
        with own_parameters(program):
            if moved is None:
                trace = poutine.trace(particles(chains, 1)(conditioned)).get_trace(**columns)
            else:
                with moved:
                    trace = poutine.trace(particles(chains, 1)(conditioned)).get_trace(**columns)
        return {
            name: node
            for name, node in sample_nodes(trace)
            if any(frame.name == ROWS for frame in node["cond_indep_stack"])
        }


class _Moved(Messenger):
    """Gives sites the values that coordinates stand for.

    Attributes:
        values: of the sites, in the last run.
        log_jacobian: of z(u), all sites together, ``(chains, rows)``, in the last run.
    """

    def __init__(self, coordinates: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._coordinates = coordinates
        self.values: dict[str, Tensor] = {}
        self.log_jacobian: Tensor = torch.zeros(())

    def __enter__(self) -> Any:
        self.values = {}
        like = next(iter(self._coordinates.values()))
        self.log_jacobian = torch.zeros(like.shape[:2], dtype=torch.float64, device=like.device)
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        u = self._coordinates.get(msg["name"])
        if u is None:
            return
        transform = dist.transforms.biject_to(msg["fn"].support)
        z = transform(u)
        entries = transform.log_abs_det_jacobian(u, z).reshape(*u.shape[:2], -1)
        self.log_jacobian = self.log_jacobian + entries.sum(-1).double()
        self.values[msg["name"]] = msg["value"] = z
        msg["done"] = True


def _log_density(nodes: Mapping[str, dict[str, Any]], names: set[str]) -> Tensor:
    """Log density of some sites together, float64, ``(chains, rows)`` or less."""
    terms = [
        node["fn"].log_prob(node["value"]).double() for name, node in nodes.items() if name in names
    ]
    return sum(
        terms, torch.zeros((), dtype=torch.float64, device=terms[0].device if terms else None)
    )
