"""What a Pyro program is here: rows in one plate, observables by name, parameters of its own."""

from __future__ import annotations

import inspect
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

# Frozen parameters are no oversight here: modules hold their own, and the store is not asked.
warnings.filterwarnings("ignore", message=".* was not registered in the param store")

ROWS = "data"
"""Name of the plate in which the rows of the data stand."""


class _AbstractPyroModule(type(PyroModule), ABCMeta):
    """Lets a PyroModule have abstract methods."""


class Program(PyroModule, metaclass=_AbstractPyroModule):
    """A Pyro program over independent rows: what models and guides have in common."""

    def rows(self, *observed: Tensor | None, n: int | None, total: int | None) -> pyro.plate:
        """The plate of rows, sized by the observed tensors, or by ``n`` where none is given.

        Args:
            observed: each ``(rows, ...)`` or None.
            n: number of rows, needed where nothing is observed.
            total: size of the data set that the rows stand for: log-probabilities in the plate
                are scaled by ``total / rows``. None: the rows are all there is.

        Raises:
            ValueError: observed tensors that differ in rows, no rows at all, neither data nor
                ``n``, or fewer in ``total`` than rows.
        """
        sizes = {len(x) for x in observed if x is not None} | ({n} if n is not None else set())
        if not sizes:
            raise ValueError(f"{type(self).__name__}: give data, or n=, the number of rows to draw")
        if len(sizes) > 1 or (size := sizes.pop()) < 1:
            shapes = [tuple(x.shape) for x in observed if x is not None]
            raise ValueError(
                f"{type(self).__name__}: data of shapes {shapes} and n={n}; expected one number "
                "of rows, at least 1"
            )
        if total is not None and total < size:
            raise ValueError(
                f"{type(self).__name__}: total={total} is smaller than the {size} rows given; "
                "it is the size of the whole data set that they stand for"
            )
        return pyro.plate(ROWS, total or size, subsample=torch.arange(size))


class GenerativeModel(Program):
    """A generative story as a Pyro program.

    The docstring *is* the story, one line a site: ``z_n ~ prior  # comment  data | Z``, where
    ``data`` names the site's plates and ``Z`` its event shape in symbols that mean the same size
    throughout. One line may stand for all levels of a hierarchy, from the top down:
    ``z{l}_n ~ level(z{l+1}_n)  # level l = L..1  data | Z_l`` for sites z3, z2, z1. To implement:

    - ``forward(self, x=None, ..., *, n=None, total=None)``: arguments are the observable sites,
      by site name; one that is None is latent. Rows stand in ``self.rows(x, n=n, total=total)``.
      Further keyword-only arguments are covariates, ``*, c, n=None, total=None``: always given, and
      never sites. Such a model is one of the observables given c, p(x | c); c goes to ``rows`` too.
    - a method ``<site>_dist`` for each site, that returns its ``Distribution``; its arguments are
      sites by name, those that it depends on. For levels, ``z_dist(level, *above)``, where a
      starred argument takes all levels drawn before, the top first.
    - ``toy()``, for a model of the zoo: a small instance, on which the contract tests run.

    Attributes:
        classes: number of classes, where labels are one-hot sites or covariates; data hold them as
            numbers. None: there are no labels.
    """

    classes: int | None = None

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    @classmethod
    def toy(cls) -> Self:
        """A small instance: a few latents, a few observables, quick to run."""
        raise NotImplementedError(
            f"{cls.__name__} has no toy(): a model of the zoo needs one, for `show` and the tests"
        )

    def example_covariates(self, n: int) -> dict[str, Tensor]:
        """Covariates of ``n`` rows for a :meth:`toy`, by name: a conditional model of the zoo has
        them, for `show` and the tests."""
        if self.covariates:
            raise NotImplementedError(
                f"{type(self).__name__} has no example_covariates(): a model of the zoo that is "
                f"given {', '.join(self.covariates)} needs them, for `show` and the tests"
            )
        return {}

    @property
    def covariates(self) -> tuple[str, ...]:
        """Names of what the model is given and does not model: the keyword-only arguments of
        ``forward`` besides ``n`` and ``total``."""
        parameters = inspect.signature(self.forward).parameters.values()
        keywords = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return tuple(name for name in keywords if name not in ("n", "total"))

    def covariates_in(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The covariates among some columns, by name.

        Raises:
            ValueError: one is missing.
        """
        if missing := [name for name in self.covariates if name not in columns]:
            raise ValueError(
                f"{type(self).__name__} is a model given {', '.join(self.covariates)}: "
                f"{missing[0]!r} is missing; pass it by name, with as many rows as are drawn"
            )
        return {name: columns[name] for name in self.covariates}

    @property
    def observables(self) -> tuple[str, ...]:
        """Names of the sites that can be observed: the positional arguments of ``forward``."""
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def observed(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The columns of a batch that this model can observe, and its covariates, to be passed to
        it by name. Labels ``(rows,)`` come one-hot, ``(rows, classes)``; a withheld one as zeros.
        """
        names = (*self.observables, *self.covariates)
        return {name: self._one_hot(columns[name]) for name in names if name in columns}

    def _one_hot(self, column: Tensor) -> Tensor:
        if self.classes is None or column.dtype != torch.int64 or column.dim() != 1:
            return column
        like = next(self.parameters(), torch.zeros(()))
        every = torch.arange(self.classes, device=column.device)
        return (column.unsqueeze(-1) == every).to(like.dtype)

    def simulate(self, n: int, **covariates: Tensor) -> dict[str, Tensor]:
        """``n`` rows of the story from its start: a draw of every site, ``(n, event)`` each.

        Global sites have their event shape alone. Draws from torch's global random state.

        Args:
            covariates: ``(n, ...)`` each, all that the model is given; the result has them too.

        Raises:
            ValueError: a covariate is missing.
            TypeError: an argument that is no covariate of the model.
        """
        if unknown := [name for name in covariates if name not in self.covariates]:
            raise TypeError(
                f"{type(self).__name__}.simulate takes no {unknown[0]!r}: its covariates are "
                f"{', '.join(self.covariates) or 'none'}"
            )
        given = self.covariates_in(covariates)
        with torch.no_grad(), own_parameters(self):
            trace = poutine.trace(self).get_trace(n=n, **given)
        return {name: node["value"] for name, node in sample_nodes(trace)} | given


def sample_nodes(trace: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes of a trace that are random variables: neither plates nor parameters."""
    for name, node in cast(dict[str, Any], trace.nodes).items():
        if node["type"] == "sample" and not site_is_subsample(node):
            yield name, node


def by_name(
    names: tuple[str, ...], args: tuple[Tensor | None, ...], kwargs: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Observed tensors by site name, from positional and keyword arguments; None is dropped.

    Raises:
        TypeError: too many arguments, one given twice, or a name that is not in ``names``.
    """
    try:
        bound = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        ).bind_partial(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{error}; observable sites are {', '.join(names)}") from None
    return {name: value for name, value in bound.arguments.items() if value is not None}


@contextmanager
def own_parameters(*programs: object, averages: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Run PyroModules on the parameters they hold, whatever Pyro's global store holds.

    Pyro's store matches parameters by name: a second model whose ``encoder.weight`` meets that
    of a first one would silently train, or read, the first one's. Modules hold their own
    parameters, so they get an empty store for the time of a call. Plain functions keep theirs
    nowhere else and run on the global store as they always do.

    Args:
        averages: keeps, from call to call, what no module holds: the decaying averages that
            TraceGraph_ELBO puts into the store for its baselines.
    """
    if not all(isinstance(program, torch.nn.Module) for program in programs):
        yield
        return
    averages = {} if averages is None else averages
    with cast(Any, pyro.get_param_store()).scope({"params": averages, "constraints": {}}):
        yield
        averages.update(baseline_averages())


def baseline_averages() -> dict[str, Tensor]:
    """The decaying averages of baselines in Pyro's store, by name."""
    held = cast(Any, pyro.get_param_store())._params
    return {name: tensor for name, tensor in held.items() if name.startswith(_AVERAGE)}


_AVERAGE = "__baseline_avg_downstream_cost_"
"""How Pyro names the decaying averages of TraceGraph_ELBO's baselines."""
