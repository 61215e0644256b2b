"""Figures of the check of labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from xarray import DataArray, Dataset, DataTree

from ppl_vae.calibration import LabelPosterior, calibrated_accuracy, reliability
from ppl_vae.checks.result import CheckResult
from ppl_vae.detection import histograms
from ppl_vae.figures import empty

_SAID = {
    "classifier": "classifier q(y | x)",
    "importance": "importance sampling p(y | x)",
    "evidence": "log p(x), nats",
}
_DRAWS = 400  # of labels, in each row, for the bands of the PAV plot
_BAND = (2.5, 97.5)  # percentiles


def reliability_diagram(posterior: LabelPosterior, result: CheckResult) -> Figure:
    """Accuracy by confidence, with bars that right probabilities would keep to, and counts."""
    settings, figure = result.settings, empty(8.4, 5.2)
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    bins, width = settings["bins"], 1 / settings["bins"]
    for (name, p), record, ax, counts in zip(
        posterior.probabilities.items(), result.statistics, *axes, strict=True
    ):
        found = reliability(p, posterior.known(), bins)
        drawn = calibrated_accuracy(
            p, bins, replicates=settings["replicates"], seed=settings["seed"]
        )
        low, high = np.percentile(drawn, _BAND, axis=0)
        ax.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        ax.vlines(
            found.confidence, low, high, color="0.75", linewidth=6, label="95 % if they are right"
        )
        color = "C3" if record["verdict"] == "fail" else "C0"
        ax.plot(found.confidence, found.accuracy, "o-", color=color, markersize=4, label="data")
        ax.set_title(
            f"{_SAID[name]}\nerror {record['calibration_error']:.3f}, by chance "
            f"{record['replicated_mean']:.3f}, adjusted p = {record['p_adjusted']:.2g}",
            fontsize=9,
            color="C3" if record["verdict"] == "fail" else "black",
        )
        left = np.minimum((found.confidence * bins).astype(int), bins - 1) * width
        counts.bar(left, found.rows, width, align="edge", color=color, edgecolor="white")
        counts.set(xlabel="confidence: largest probability", yscale="log", xlim=(0, 1.02))
        for one in (ax, counts):
            one.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="accuracy", ylim=(0, 1.02))
    axes[1, 0].set_ylabel("rows")
    axes[0, 0].legend(frameon=False, loc="upper left", fontsize=8)
    figure.suptitle(
        f"Calibration of labels: {result.verdict} (family-wise error rate "
        f"{result.error_rate:.2g})\n"
        f"{settings['rows']} held-out rows ({settings['split']})",
        fontsize=11,
    )
    return figure


def confusion(posterior: LabelPosterior, result: CheckResult) -> Figure:
    """Rows by their class and the most probable one."""
    labels = posterior.known().numpy()
    classes = posterior.classifier.shape[1]
    size = min(0.42 * classes + 1.3, 8.0)
    figure = empty(2 * size, size + 0.7)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, p), record in zip(
        axes, posterior.probabilities.items(), result.statistics, strict=True
    ):
        counts = confusion_matrix(labels, p.argmax(1).numpy(), labels=np.arange(classes))
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if classes <= 20:
            for row, column in zip(*counts.nonzero(), strict=True):
                color = "white" if share[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                ax.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
            ax.set_xticks(range(classes))
            ax.set_yticks(range(classes))
        ax.set(xlabel="most probable class")
        ax.set_title(
            f"{_SAID[name]}\naccuracy {record['accuracy']:.3f} ± {record['accuracy_se']:.3f}",
            fontsize=9,
        )
    axes[0].set_ylabel("class")
    figure.suptitle(
        f"{len(labels)} held-out rows ({result.settings['split']}), shaded by their share of a "
        "class",
        fontsize=10,
    )
    return figure


def pava(posterior: LabelPosterior, result: CheckResult) -> Figure:
    """How often the most probable class is right, as an increasing function of its probability.

    By the pool-adjacent-violators algorithm, without bins: Dimitriadis et al. 2021,
    arXiv:2008.03033; the band is that of labels drawn from the probabilities.
    """
    # These take seconds to import, which only those who plot pay.
    import arviz_plots
    import matplotlib.pyplot as plt
    from arviz_plots.plot_collection import PlotCollection

    stream = np.random.default_rng(result.settings["seed"])
    drawn, right = {}, {}
    for name, p in posterior.probabilities.items():
        confidence, chosen = p.max(1)
        events = _bernoulli(confidence.numpy(), _DRAWS, stream)
        title = _SAID[name]
        drawn[title] = DataArray(events[None], dims=("chain", "draw", "row"))
        right[title] = DataArray((chosen == posterior.known()).numpy().astype(int), dims=("row",))
    tree = DataTree.from_dict(
        {"posterior_predictive": Dataset(drawn), "observed_data": Dataset(right)}
    )
    collection = PlotCollection.wrap(
        Dataset(right),
        cols=["__variable__"],
        col_wrap=len(right),
        backend="matplotlib",
        figure_kwargs={"figsize": (8.4, 4.2), "figsize_units": "inches"},
    )
    arviz_plots.plot_ppc_pava(
        tree,
        ci_prob=(_BAND[1] - _BAND[0]) / 100,
        plot_collection=collection,
        visuals={
            "xlabel": {"text": "confidence: largest probability"},
            "ylabel": {"text": "accuracy, made increasing"},
        },
    )
    axes = [collection.get_target(title, {}) for title in right]
    figure = axes[0].figure
    plt.close(figure)  # the figure is the caller's: pyplot need not keep it
    figure.set_layout_engine("constrained")
    for ax in axes:
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.suptitle(
        f"Accuracy by confidence, without bins; band: 95 % if the probabilities are right\n"
        f"{result.settings['rows']} held-out rows ({result.settings['split']})",
        fontsize=10,
    )
    return figure


def unknown(
    known: Mapping[str, np.ndarray], unknown: Mapping[str, np.ndarray], auroc: Mapping[str, float]
) -> Figure:
    """The distribution of each score over rows of known and of unknown classes."""
    return histograms(
        known,
        unknown,
        titles={name: f"AUROC {area:.3f}" for name, area in auroc.items()},
        labels={
            name: _SAID[name] if name == "evidence" else f"largest probability,\n{_SAID[name]}"
            for name in auroc
        },
        kinds=("known classes", "unknown classes"),
    )


def _bernoulli(p: np.ndarray, draws: int, stream: np.random.Generator) -> np.ndarray:
    """Draws ``(draws, rows)`` whose mean over draws is p, up to half a draw, as the plot takes the
    mean for the probability: so many ones a row, in random order."""
    ranks = stream.random((draws, len(p))).argsort(0)
    return (ranks < np.rint(p * draws)).astype(int)
