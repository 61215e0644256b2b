"""Importance sampling: figures of every row of a split, averaged over its draws.

The guide draws for a *block* of rows, so that its encoder sees each row once. The model, whose
decoder sees every draw, then scores the block *chunk* by chunk: large enough for its matrix
products, and small enough for what they make to stay in the processor's cache. Scoring draws
nothing, so neither the size of a chunk nor compiling changes what was drawn.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae import graphs
from ppl_vae.assignments import Assignments, Figures, Key
from ppl_vae.centers import center
from ppl_vae.data import Rows
from ppl_vae.draws import observed, particles
from ppl_vae.model import ROWS, GenerativeModel, own_parameters, sample_nodes

Compile = Literal["auto"] | bool
"""Whether to compile the scoring of draws; "auto": where that saves time, compiling included."""

_Tree = TypeVar("_Tree")


class Draws(NamedTuple):
    """What a guide drew for some rows, by site; shapes as in :data:`Figures`.

    Attributes:
        values: of the latents.
        log_q: log-densities of the values, in nats.
        normals: location and scale of the sites that are diagonal normals.
    """

    values: dict[str, Tensor]
    log_q: dict[str, Tensor]
    normals: dict[str, tuple[Tensor, Tensor]]


class Budget(NamedTuple):
    """How many draws, counted over the rows, are made at once by the guide, and scored at once."""

    block: int
    chunk: int


CACHED = 64 * 2**20
"""Bytes of all the tensors that one chunk's operations make on a CPU; about a fourth is alive at
a time.

Measured with a 784-pixel Bernoulli on a processor with 32 MiB of level-3 cache: twice as much
takes 1.4 times as long a draw, eight times as much 2 to 4 times: memory is mapped for each tensor.
"""

COMPILING = 8.0
"""Seconds that compiling takes at most (3 to 6 on an idle machine, 0.5 if cached on disk)."""

SAVED = 0.3
"""Share of the time of scoring that compiling saves (0.2 to 0.4 measured)."""

TIMED = 100
"""Calls at most that are timed, to find whether compiling pays."""


def mean_figures(
    model: GenerativeModel,
    guide: torch.nn.Module,
    rows: Rows,
    *,
    samples: int,
    budget: Budget,
    compile: Compile,
    withheld: Collection[str] = (),
) -> Figures:
    """Figures of every row, ``(rows, ...)`` on the CPU, averaged over ``samples`` draws.

    These are "reconstruction", "elbo" and their log-mean-exp "log evidence"; of each site "kl" (or
    "global kl", shared by the rows); and in closed form, where there is one, "kl per latent" and
    "posterior mean". What a global site has of these stands at each row of a block alike.

    Of sites that are enumerated, and of ``withheld`` ones, observables that are inferred although
    the rows have them, every value is tried; figures are means under their probabilities, and
    importance weights sums (see :class:`Assignments`). Of each such site, "probability" and "log
    evidence" hold a figure a value.

    Log-densities are computed, and summed over a site's entries, in the model's dtype; all sums
    over sites and draws are float64.
    """
    means = _Means(len(rows), samples)
    assignments = Assignments(model, guide, observed(model, rows, slice(0, 2), withheld), withheld)
    for figures, draws, part in each_figure(
        model,
        guide,
        lambda part: observed(model, rows, part, withheld),
        len(rows),
        samples=samples,
        budget=budget,
        compile=compile,
        assignments=assignments,
    ):
        means.add(figures, part, _size(draws))
    return means.result()


def each_figure(
    model: GenerativeModel,
    guide: torch.nn.Module,
    columns: Callable[[slice], dict[str, Tensor]],
    rows: int,
    *,
    samples: int,
    budget: Budget,
    compile: Compile,
    assignments: Assignments,
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Figures, slice, slice]]:
    """Figures of all draws and rows, part by part: (figures, which draws, which rows).

    Each part comes in pieces: first what the guide alone says of it, then, in chunks, what the
    model says (see :func:`draw` and :func:`score`).

    Args:
        columns: the rows of a slice, as the model takes them.
        rows: how many there are.
        given: values of global sites that are not drawn, ``(event)`` each.
    """
    draws, step = _split(samples, rows, budget.block)
    draws_a_chunk, rows_a_chunk = _split(draws, step, budget.chunk)
    scorer = _Scorer(model, compile, samples * rows // (draws_a_chunk * rows_a_chunk))
    for part in parts(rows, step):
        batch = columns(part)
        for some in parts(samples, draws):
            drawn, figures = draw_all(guide, batch, _size(some), assignments, given)
            yield figures, some, part
            for (d, new_d), (r, new_r) in product(
                overlapping(_size(some), draws_a_chunk), overlapping(_size(part), rows_a_chunk)
            ):
                chunk = {name: column[r] for name, column in batch.items()}
                own = [_cut(one, d, r) for one in drawn]
                each: list[Figures] = []
                for one in own:  # no comprehension: a frame of its own is in a warning's way
                    each.append(scorer(chunk, one, _size(d)))
                figures = assignments.combine(each, [one.log_q for one in own])
                yield (
                    _cut(figures, new_d, new_r),
                    slice(some.start + d.start + new_d.start, some.start + d.stop),
                    slice(part.start + r.start + new_r.start, part.start + r.stop),
                )


def log_weight(figures: Figures) -> Tensor | None:
    """The log importance weight of each draw, among what the model says of it, ``(draws, rows)``:
    where enumerated sites' values were all tried, that of their sum."""
    return figures.get(("log weight", ""), figures.get(("elbo", "")))


def draw_all(
    guide: torch.nn.Module,
    batch: Mapping[str, Tensor],
    draws: int,
    assignments: Assignments,
    given: Mapping[str, Tensor] | None = None,
) -> tuple[list[Draws], Figures]:
    """Draw the latents for each combination of enumerated sites' values, which are among them.

    Args:
        given: values of further sites that are not drawn, ``(event)`` each.
    """
    pairs = [
        draw(guide, batch, draws, values | dict(given or {})) for values in assignments.of_guide()
    ]
    rows = len(next(iter(batch.values())))
    each = [
        drawn._replace(values=drawn.values | _of_all(values, draws, rows))
        for drawn, _ in pairs
        for values in assignments.of_model()
    ]
    return each, assignments.mean([f for _, f in pairs], [drawn.log_q for drawn, _ in pairs])


def _of_all(values: Mapping[str, Tensor], draws: int, rows: int) -> dict[str, Tensor]:
    """One value for all draws and rows."""
    return {name: value.expand(draws, rows, *value.shape) for name, value in values.items()}


def draw(
    guide: torch.nn.Module,
    batch: Mapping[str, Tensor],
    draws: int,
    values: Mapping[str, Tensor] | None = None,
) -> tuple[Draws, Figures]:
    """Draw every latent for each row of a batch; also the figures that the guide alone gives.

    Args:
        values: of sites that are not drawn, ``(event)`` each; they are scored all the same.
    """
    values = values or {}
    given = _of_all(values, draws, len(next(iter(batch.values()))))
    conditioned = poutine.condition(guide, data=given)
    with own_parameters(guide):
        trace = poutine.trace(particles(draws, 1)(conditioned)).get_trace(**batch)
    drawn, figures = Draws({}, {}, {}), Figures()
    auxiliary: dict[str, Tensor] = {}
    for name, node in sample_nodes(trace):
        if node["is_observed"] and name not in values:
            continue
        q = node["fn"]
        log_q = q.log_prob(node["value"]).double()
        if node["infer"].get("is_auxiliary"):
            auxiliary[name.removesuffix("_unconstrained")] = log_q
            continue
        drawn.values[name], drawn.log_q[name] = node["value"], log_q
        if (normal := _diagonal_normal(q)) is not None:
            drawn.normals[name] = normal
        if _local(node) and not q.support.is_discrete:
            with suppress(NotImplementedError):
                figures["posterior mean", name] = _once(center(q)).double()
    # An autoguide draws a site through an auxiliary one, whose density is part of the site's q.
    for name in auxiliary.keys() & drawn.log_q.keys():
        drawn.log_q[name] = drawn.log_q[name] + auxiliary[name]
    return drawn, figures


def score(model: GenerativeModel, batch: Mapping[str, Tensor], drawn: Draws, draws: int) -> Figures:
    """The figures that need the model, of each draw."""
    given = poutine.condition(model, data=drawn.values)
    with own_parameters(model):
        trace = poutine.trace(particles(draws, 1)(given)).get_trace(**batch)
    reconstruction: Tensor | float = 0.0
    elbo: Tensor | float = 0.0
    figures = Figures()
    for name, node in sample_nodes(trace):
        log_p = node["fn"].log_prob(node["value"]).double()
        if node["is_observed"] and name not in drawn.values:
            reconstruction = reconstruction + log_p
            continue
        # A site that the model enumerates has no density of the guide's.
        kl = drawn.log_q[name] - log_p if name in drawn.log_q else -log_p
        p = _diagonal_normal(node["fn"])
        if p is not None and name in drawn.normals:
            closed = kl_divergence(TorchNormal(*drawn.normals[name]), TorchNormal(*p))
            figures["kl per latent", name] = closed.double().reshape(*closed.shape[:2], -1)
        if _local(node):
            figures["kl", name] = kl
            elbo = elbo - kl
        else:
            figures["global kl", name] = kl
    figures["reconstruction", ""] = torch.as_tensor(reconstruction)
    # log p(x, z) - log q(z | x): what is averaged to the ELBO is the log importance weight.
    figures["elbo", ""] = elbo + figures["reconstruction", ""]
    return figures


def budget(
    model: GenerativeModel,
    guide: torch.nn.Module,
    batch: Mapping[str, Tensor],
    *,
    samples: int,
    memory: int,
    withheld: Collection[str] = (),
) -> Budget:
    """What fits into ``memory`` MiB, and into the cache, as found by drawing for a small batch."""
    assignments = Assignments(model, guide, batch, withheld)

    def made(rows: int, draws: int) -> tuple[int, int]:
        some = {name: column[:rows] for name, column in batch.items()}
        with OutputBytes() as by_guide:
            drawn, _ = draw_all(guide, some, draws, assignments)
        with OutputBytes() as by_model:
            score(model, some, drawn[0], draws)
        return by_guide.bytes, by_model.bytes

    column = next(iter(batch.values()))
    rows, draws = len(column), min(samples, 16)
    # What is made once, whatever the rows and draws, such as a VampPrior's components, is in no
    # draw's share.
    few = rows // 2, (draws + 1) // 2
    pairs = zip(made(rows, draws), made(*few) if few[0] else (0, 0), strict=True)
    each = [max(1, (more - less) // (rows * draws - few[0] * few[1])) for more, less in pairs]
    # A block is alive while its chunks are scored.
    most = memory * 2**20 // 2
    if column.device.type == "cpu":
        most = min(most, CACHED)
    block, chunk = (max(1, most // made_a_draw) for made_a_draw in each)
    return Budget(block, chunk)


class _Scorer:
    """:func:`score`, compiled once that saves time.

    Args:
        chunks: how many calls are expected.
    """

    def __init__(self, model: GenerativeModel, compile: Compile, chunks: int) -> None:
        self._model, self._compile, self._left = model, compile, chunks
        self._seconds: list[float] = []  # of each uncompiled call
        self._program: graphs.Call | None = None
        self._shapes: list[torch.Size] = []  # that the program is for

    def __call__(self, batch: dict[str, Tensor], drawn: Draws, draws: int) -> Figures:
        if self._compile is False and self._program is None:
            return score(self._model, batch, drawn, draws)
        leaves, structure = pytree.tree_flatten((batch, drawn))
        # A program is for fixed strides too.
        leaves = [leaf.contiguous() for leaf in leaves]

        def scored(*leaves: Tensor) -> Figures:
            batch, drawn = pytree.tree_unflatten(list(leaves), structure)
            return score(self._model, batch, drawn, draws)

        self._left -= 1
        if self._pays():
            self._shapes = [leaf.shape for leaf in leaves]
            self._program = _compiled(scored, leaves)
            self._compile = False  # once, whether or not it could be
        if self._program is not None and self._shapes == [leaf.shape for leaf in leaves]:
            return self._program(*leaves)
        start = time.perf_counter()
        figures = scored(*leaves)
        if leaves[0].is_cuda:
            torch.cuda.synchronize(leaves[0].device)
        self._seconds.append(time.perf_counter() - start)
        return figures

    def _pays(self) -> bool:
        if self._compile == "auto":
            # The first call warms up.
            seconds = min(self._seconds[1:], default=0.0)
            return seconds * self._left * SAVED > COMPILING
        return self._compile is True


def _compiled(function: graphs.Call, inputs: list[Tensor]) -> graphs.Call | None:
    """A function as one program for inputs of these shapes; None, with a warning, if refused."""
    try:
        _, graph = graphs.record(function, *inputs)
        return graph.compile(*inputs)
    except graphs.Untraceable as error:
        warnings.warn(
            f"evaluation runs eagerly, since it cannot be compiled: {error}. Results are the "
            "same; compile=False leaves out the attempt",
            RuntimeWarning,
            stacklevel=7,  # at the caller of `evaluate`
        )
        return None


class _Means:
    """Means over draws that arrive in parts."""

    def __init__(self, rows: int, samples: int) -> None:
        self._rows, self._samples = rows, samples
        self._means = Figures()

    def add(self, figures: Figures, rows: slice, draws: int) -> None:
        """Take in ``draws`` draws of some rows."""
        summed = {key: value for key, value in figures.items() if key[0] == "log weight"}
        if (weight := log_weight(figures)) is not None:
            summed["log weight", ""] = weight
        for (_, site), value in summed.items():
            log_sum = self._column(("log evidence", site), value, -math.inf)
            log_sum[rows] = torch.logaddexp(log_sum[rows], value.logsumexp(0))
        for key in figures.keys() - summed.keys():
            # Of a figure that is alike for all draws only one is there.
            value = figures[key]
            self._column(key, value, 0.0)[rows] += value.mean(0) * (draws / self._samples)

    def _column(self, key: Key, like: Tensor, start: float) -> Tensor:
        # All at once: small results allocated between large intermediate ones would keep the
        # allocator from using the same memory again for the next part.
        if key not in self._means:
            self._means[key] = like.new_full((self._rows, *like.shape[2:]), start)
        return self._means[key]

    def result(self) -> Figures:
        means = {key: column.cpu() for key, column in self._means.items()}
        for kind, site in means:
            if kind == "log evidence":
                means[kind, site] -= math.log(self._samples)
        return means


def parts(total: int, step: int) -> Iterator[slice]:
    """Slices of ``step``, the last one maybe smaller, that make up ``total``."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def overlapping(total: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Slices of exactly ``step``, if there are so many, each with the part of it that is new.

    >>> list(overlapping(5, 3))
    [(slice(0, 3, None), slice(0, 3, None)), (slice(2, 5, None), slice(1, 3, None))]
    """
    for part in parts(total, step):
        start = max(0, part.stop - step)
        yield slice(start, part.stop), slice(part.start - start, part.stop - start)


def _split(draws: int, rows: int, capacity: int) -> tuple[int, int]:
    """How many draws of how many rows to take at a time: at most ``capacity``, all draws first."""
    some = evenly(draws, capacity)
    return some, evenly(rows, max(1, capacity // some))


def evenly(total: int, most: int) -> int:
    """The smallest step in which ``total`` is made in as few parts as in steps of ``most``."""
    return math.ceil(total / math.ceil(total / most))


def _cut(tree: _Tree, draws: slice, rows: slice) -> _Tree:
    """Some draws and rows of all tensors ``(draws, rows, ...)``; what there is one of is kept."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[
            draws if tensor.shape[0] > 1 else slice(None),
            rows if tensor.shape[1] > 1 else slice(None),
        ]

    return pytree.tree_map(cut, tree)


def _size(part: slice) -> int:
    return part.stop - part.start


def _local(node: Mapping[str, Any]) -> bool:
    return any(frame.name == ROWS for frame in node["cond_indep_stack"])


def _diagonal_normal(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of independent normals, once where all draws have the same."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return (_once(fn.loc), _once(fn.scale)) if isinstance(fn, TorchNormal) else None


def _once(value: Tensor) -> Tensor:
    """One draw of a tensor that was expanded over the draws; otherwise all of them."""
    return value[:1] if value.stride(0) == 0 else value


class OutputBytes(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.bytes += t.numel() * t.element_size()
        return out
