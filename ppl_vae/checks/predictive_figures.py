"""Figures of predictive checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from xarray import DataTree

from ppl_vae.checks.result import CheckResult, Picture
from ppl_vae.sites import Site

DRAWS = 200  # replicates whose entries are kept for pictures
_ROWS = 200  # of each of them


def some_rows(x: Tensor) -> Tensor:
    """The rows of which entries are shown, on the CPU, ``(rows, D)``."""
    return x[:_ROWS].reshape(min(len(x), _ROWS), -1).cpu()


def entries(site: Site, observed: Tensor, replicated: Tensor, seed: int) -> dict[str, Picture]:
    """Pictures of single entries, by what they show: whichever suits the observable.

    Of each row one entry is taken, at random among those that vary, so that what is shown is
    independent where rows are.

    Args:
        observed: ``(rows, event)``.
        replicated: ``(draws, rows, D)``: the first rows of each replicate.
        seed: of the choice of entries.
    """
    x = some_rows(observed)
    varying = (replicated.flatten(0, 1).amax(0) > replicated.flatten(0, 1).amin(0)).nonzero()[:, 0]
    if not len(varying):
        return {}
    generator = torch.Generator().manual_seed(seed)
    column = varying[torch.randint(len(varying), (len(x),), generator=generator)]
    data = x[torch.arange(len(x)), column].numpy()
    draws = replicated[:, torch.arange(len(x)), column].numpy()
    binary = bool(np.isin(draws, (0, 1)).all() and np.isin(data, (0, 1)).all())
    show: Callable[[DataTree], Any]
    if binary:
        if len(np.unique(data)) < 2:
            return {}
        kind, show = "pava", _pava
        caption = (
            "How often an entry is 1, by the share of replicates in which it is: a line that "
            "leaves the band shows probabilities that are too high or too low."
        )
        draws, data = draws.astype(np.int64), data.astype(np.int64)
    elif site.support.is_discrete:
        kind, show = "rootogram", _rootogram
        caption = (
            "How often each count occurs in the data and in replicates (square root scale): counts "
            "that are too rare or too frequent ask for a likelihood with more dispersion or zeros."
        )
        draws, data = draws.astype(np.int64), data.astype(np.int64)
    else:
        kind, show = "pit", _pit
        caption = (
            "Ranks of single entries among their replicates (PIT): a line that leaves the band "
            "shows noise that is too narrow (S), too wide (inverted S) or off to one side."
        )
    tree = DataTree.from_dict(
        {
            "posterior_predictive": _dataset(draws[None], ("chain", "draw", "row"), site.name),
            "observed_data": _dataset(data, ("row",), site.name),
        }
    )
    return {kind: Picture(partial(_entries, tree, show), caption)}


def _dataset(values: np.ndarray, dims: tuple[str, ...], name: str) -> Any:
    from xarray import Dataset

    coords = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    return Dataset({name: (dims, values)}, coords=coords)


def _pava(tree: DataTree) -> Any:
    import arviz_plots

    return arviz_plots.plot_ppc_pava(tree, data_type="binary", backend="matplotlib")


def _rootogram(tree: DataTree) -> Any:
    import arviz_plots

    return arviz_plots.plot_ppc_rootogram(tree, backend="matplotlib")


def _pit(tree: DataTree) -> Any:
    import arviz_plots

    return arviz_plots.plot_ppc_pit(tree, backend="matplotlib")


def _entries(tree: DataTree, show: Callable[[DataTree], Any], result: CheckResult) -> Figure:
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .* data looks binary")
        collection = show(tree)
    (name,) = tree["observed_data"].data_vars
    ax = collection.get_target(name, {})
    ax.set_title("")
    figure = ax.figure
    plt.close(figure)  # the figure is the caller's: pyplot need not keep it
    figure.set_size_inches(6.4, 4.2)
    figure.set_layout_engine("constrained")
    figure.suptitle(f"{name}: one entry of each row, against {result.settings['against']}")
    return figure


def statistics(result: CheckResult) -> Figure:
    """Each statistic's distribution over replicates, and a line at the data's."""
    # These take seconds to import, which only those who plot pay.
    import arviz_plots
    import matplotlib.pyplot as plt
    from arviz_plots.plot_collection import PlotCollection

    shown = {
        record["statistic"]: record
        for record in result.statistics
        if record["verdict"] != "not applicable"
    }
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    replicated = result.groups[f"{result.name}_statistics"][list(shown)]
    collection = PlotCollection.wrap(
        replicated,
        cols=["__variable__"],
        col_wrap=columns,
        backend="matplotlib",
        figure_kwargs={
            "figsize": (3.1 * columns, 2.5 * lines + 0.9),
            "figsize_units": "inches",
        },
    )
    # A histogram needs a spread; without one, the replicates are a line as well.
    spread = [name for name in shown if np.ptp(replicated[name].values) > 0]
    with warnings.catch_warnings():
        # Statistics are numbers, even where all of them happen to be 0 or 1.
        warnings.filterwarnings("ignore", message="The .* data looks binary")
        if spread:
            arviz_plots.plot_ppc_tstat(
                DataTree.from_dict(
                    {
                        "prior_predictive": replicated[spread],
                        "observed_data": result.groups[f"{result.name}_observed"][spread],
                    }
                ),
                group="prior_predictive",
                t_stat="mean",  # of one number a replicate: the statistic itself
                kind="hist",
                plot_collection=collection,
                visuals={"title": False},
            )
    axes = {name: collection.get_target(name, {}) for name in shown}
    figure = next(iter(axes.values())).figure
    plt.close(figure)  # the figure is the caller's: pyplot need not keep it
    figure.set_layout_engine("constrained")
    held = None
    for name, record in shown.items():
        ax, color = axes[name], "C3" if record["verdict"] == "fail" else "black"
        if name not in spread:
            ax.axvline(record["replicated_mean"], color="C0", linewidth=2)
        ax.set_ylim(bottom=0)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=5)
        held = ax.axvline(record["observed"], color=color, linewidth=2)
        ax.set_title(
            f"{name}\np = {record['p']:.2g}, adjusted {record['p_adjusted']:.2g}",
            fontsize=10,
            color=color,
        )
    settings = result.settings
    title = result.name.replace("_", " ")
    figure.suptitle(
        f"{title[0].upper()}{title[1:]} check: {result.verdict} (family-wise error rate "
        f"{result.error_rate:.2g})\n{settings['rows']} rows ({settings['split']}), and "
        f"{settings['replicates']} replicates: {settings['against']}",
        fontsize=11,
    )
    figure.legend(
        [next(iter(axes.values())).lines[0], held],
        ["replicates: frequency", "data (red: fails)"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure
