"""Reads a Pyro program: its sites, plates, shapes and supports; checks a (model, guide) pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions.constraints import Constraint

from ppl_vae.conditionals import entrywise
from ppl_vae.data import Dataset
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes
from ppl_vae.names import nearest


@dataclass(frozen=True)
class Site:
    """A sample site as one run of a program shows it.

    Shapes: ``batch_shape`` holds the plates' dims, ``event_shape`` one draw's.
    """

    name: str
    observed: bool
    plates: tuple[str, ...]
    batch_shape: torch.Size
    event_shape: torch.Size
    support: Constraint
    family: str
    enumerated: bool
    auxiliary: bool

    @property
    def local(self) -> bool:
        """Whether each row of the data has a value of its own."""
        return ROWS in self.plates

    @property
    def coordinates(self) -> list[str]:
        """Names of the entries of one draw, in the order of the flattened event: z[0], z[1], or
        z[0, 0], z[0, 1], ... of several event dims; the site's own name, if it has none."""
        if not self.event_shape:
            return [self.name]
        every = itertools.product(*map(range, self.event_shape))
        return [f"{self.name}[{', '.join(map(str, index))}]" for index in every]


class PairError(ValueError):
    """A model and a guide that cannot work together, or a model and its data."""


def read_sites(program: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Site]:
    """The sample sites of a program, in the order of one run with these arguments.

    Leaves torch's random state as it was.
    """
    return {name: _site(node) for name, node in sample_nodes(_trace_aside(program, args, kwargs))}


def paired_traces(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Trace, Trace]:
    """One run of the guide, and the model's run on the latents it drew: (model, guide)."""
    with own_parameters(model, guide):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def check_pair(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Refuse a guide that does not cover the model's latents as the model means them.

    Supports are compared by draws: each side's must lie in the other's support, which needs no
    table of which constraints are equal.

    Raises:
        PairError: a latent without a guide site, a guide site without a latent, or a pair of
            sites that differ in plates, shapes or support; it says which and what to do.
    """
    names = f"{_name(model)} and {_name(guide)}"
    model_trace, guide_trace = (_trace_aside(p, args, kwargs) for p in (model, guide))
    model_nodes, guide_nodes = dict(sample_nodes(model_trace)), dict(sample_nodes(guide_trace))
    model_sites = {name: _site(node) for name, node in model_nodes.items()}
    guide_sites = {name: _site(node) for name, node in guide_nodes.items()}

    for name, site in model_sites.items():
        if not (site.observed or site.enumerated or name in guide_sites):
            raise PairError(
                f"{names}: the guide has no site {name!r}, which is latent in the model; "
                + nearest(name, set(guide_sites) - set(model_sites))
            )
    for name, site in guide_sites.items():
        if site.auxiliary:
            continue
        if name not in model_sites:
            raise PairError(
                f"{names}: the model has no site {name!r}, which the guide draws; "
                + nearest(name, model_sites)
                + ' (or mark it with infer={"is_auxiliary": True})'
            )
        other = model_sites[name]
        if other.observed:
            raise PairError(f"{names}: the guide draws {name!r}, which is observed in the model")
        for what in ("plates", "event_shape", "batch_shape"):
            mine, theirs = getattr(site, what), getattr(other, what)
            if mine != theirs:
                raise PairError(
                    f"{names}: at site {name!r} the guide has {what.replace('_', ' ')} "
                    f"{tuple(mine)}, the model {tuple(theirs)}"
                )
        relaxed = guide_nodes[name]["infer"].get("relaxed")  # then draws lie between the values
        for support, draws, owner, drawer in (
            (other.support, guide_nodes[name]["value"], "model", "guide"),
            (site.support, model_nodes[name]["value"], "guide", "model"),
        ):
            if not (relaxed and drawer == "guide") and not support.check(draws).all():
                raise PairError(
                    f"{names}: at site {name!r} the guide is {site.family} on "
                    f"{support_name(site.support)}, the model {other.family} on "
                    f"{support_name(other.support)}: a draw of the {drawer}, "
                    f"{_outside(support, draws)[1]:g}, lies outside the {owner}'s support"
                )
    for program, trace in ((model, model_trace), (guide, guide_trace)):
        _check_parameters(program, trace)


def check_data(model: GenerativeModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Refuse data that the model cannot have emitted: wrong shapes, or values off its support.

    Args:
        batches: columns ``(rows, event)`` by site name, as they would be passed to the model, and
            its covariates, which are not judged.

    Raises:
        ValueError: a covariate is missing.
        PairError: names the site, the row and the value, what was expected, what to do.
    """
    done = size = 0
    sites: dict[str, Site] = {}
    for batch in batches:
        rows = len(next(iter(batch.values())))
        given = model.covariates_in(batch)
        # A support can have the batch's shape, and depend on covariates.
        if rows != size or given:
            sites, size = read_sites(model, n=rows, **given), rows
        for name, values in batch.items():
            if name not in given:
                _check_values(model, sites, name, values, done)
        done += rows


def check_labels(model: GenerativeModel, dataset: Dataset, split: str) -> None:
    """Refuse labels that the model has no class for.

    Raises:
        PairError: names the row and the label.
    """
    y = dataset.splits[split].get("y")
    names = (*model.observables, *model.covariates)
    if y is None or model.classes is None or "y" not in names:
        return
    if len(wrong := (y >= model.classes).nonzero()):
        row = int(wrong[0])
        raise PairError(
            f"{split}['y'] has label {int(y[row])} in row {row}, and {_name(model)} has "
            f"{model.classes} classes, from 0: build the model with as many classes as the data"
        )


def _check_values(
    model: GenerativeModel, sites: Mapping[str, Site], name: str, values: Tensor, first_row: int
) -> None:
    if name not in sites:
        raise PairError(f"{_name(model)} has no site {name!r}; " + nearest(name, model.observables))
    site = sites[name]
    if values.shape[1:] != site.event_shape:
        raise PairError(
            f"data {name!r} have rows of shape {tuple(values.shape[1:])}, but {_name(model)} "
            f"emits {tuple(site.event_shape)}: build the model for this data"
        )
    if not site.support.check(values).all():
        row, value = _outside(site.support, values)
        raise PairError(
            f"data {name!r}, row {first_row + row}, hold {value:g}, which {site.family} cannot "
            f"emit: its support is {support_name(site.support)}. " + _remedy(site.family)
        )


@contextmanager
def aside() -> Iterator[None]:
    """Do something random without moving torch's random state (CPU and CUDA)."""
    # Named, since fork_rng warns of the time it takes where there are many devices.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def evaluating(seed: int, *programs: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no validation, a random state of its own; all undone."""
    modes = {module: module.training for program in programs for module in program.modules()}
    for program in programs:
        program.eval()
    try:
        with torch.no_grad(), aside(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trace_aside(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    with torch.no_grad(), aside(), own_parameters(program):
        return poutine.trace(program).get_trace(*args, **kwargs)


def _site(node: dict[str, Any]) -> Site:
    fn: TorchDistribution = node["fn"]
    family: Any = fn
    while (base := getattr(family, "base_dist", None)) is not None:
        family = base
    return Site(
        name=node["name"],
        observed=node["is_observed"],
        plates=tuple(frame.name for frame in node["cond_indep_stack"]),
        batch_shape=fn.batch_shape,
        event_shape=fn.event_shape,
        support=cast(Constraint, fn.support),
        family=type(family).__name__,
        enumerated=node["infer"].get("enumerate") is not None,
        auxiliary=bool(node["infer"].get("is_auxiliary")),
    )


def _check_parameters(program: Callable[..., Any], trace: Trace) -> None:
    """A parameter that only Pyro's store holds would be lost when a module is saved."""
    if not isinstance(program, torch.nn.Module):
        return
    # An AutoGuide's or PyroModule's parameter statement carries its attribute path as name, and
    # where it has a name of its own, as an AutoGuide has, that before it.
    own = f"{getattr(program, '_pyro_name', '')}."
    held = {name.removesuffix("_unconstrained") for name, _ in program.named_parameters()}
    for name, node in cast(dict[str, dict[str, Any]], trace.nodes).items():
        if node["type"] == "param" and name.replace("$$$", ".").removeprefix(own) not in held:
            raise PairError(
                f"{_name(program)}: pyro.param({name!r}) is not a parameter of the module, so it "
                "would not be saved: make it an attribute, self.name = PyroParam(...)"
            )


def support_name(support: Constraint) -> str:
    """A constraint without its bounds, which may be as many as a batch has entries.

    >>> from torch.distributions import constraints
    >>> support_name(constraints.independent(constraints.unit_interval, 1))
    'Interval'
    """
    return type(entrywise(support)).__name__.strip("_")


def _outside(support: Constraint, values: Tensor) -> tuple[int, float]:
    """Row and value of the first entry outside a support."""
    inside = entrywise(support).check(values)
    if values.dim() == 0:
        return 0, values.item()
    row = int((~inside).nonzero()[0, 0])
    # A constraint on whole vectors, like the simplex, cannot say which entry is at fault.
    entries = values[row][~inside[row]] if inside.shape == values.shape else values[row]
    return row, entries.flatten()[0].item()


def _remedy(family: str) -> str:
    levels = (
        "Expected whole numbers from 0 to levels - 1: for bytes, 256 levels and "
        "dataclasses.replace(dataset, unit=1.0)."
    )
    return {
        "Bernoulli": (
            'Binarize the data (binarize="dynamic" or "static"), or take another likelihood, '
            "such as ContinuousBernoulli."
        ),
        "Binomial": "Expected whole numbers from 0 to total_count.",
        "ContinuousBernoulli": "Expected numbers from 0 to 1: divide by the largest value.",
        "DiscretizedLogistic": levels,
        "DiscretizedLogisticMixture": levels,
        "CategoricalLevels": levels,
    }.get(family, "Take another likelihood, or change the data.")


def _name(program: Callable[..., Any]) -> str:
    if isinstance(program, torch.nn.Module):
        return type(program).__name__
    return getattr(program, "__name__", repr(program))
