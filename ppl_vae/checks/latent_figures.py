"""Figures of the checks of latents."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ppl_vae.checks.result import CheckResult
from ppl_vae.evaluation import ACTIVE
from ppl_vae.figures import empty

_MOST = 60  # latents in one picture
_NAMED = 30  # so many have their names below


def latents(result: CheckResult) -> Figure:
    """KL, and variance of the posterior mean, of each latent, the largest first."""
    group = result.groups["latent_use"]
    kl, variance = group["kl"].values, group["variance"].values
    names = group["latent"].values
    if not len(names):
        return sensitivity(result)
    by_kl = np.isfinite(kl).any()
    order = np.argsort(-np.nan_to_num(kl if by_kl else variance, nan=-1.0))[:_MOST]
    place = np.arange(len(order))
    figure = empty(8.4, 4.6 if by_kl else 2.9)
    axes = figure.subplots(2 if by_kl else 1, 1, sharex=True, squeeze=False)[:, 0]
    active = variance[order] > ACTIVE
    if by_kl:
        color = np.where(active, "C0", "0.7")
        axes[0].bar(place, kl[order], color=color)
        axes[0].set_ylabel("KL, nats per datum")
    axes[-1].bar(place, np.maximum(variance[order], 1e-6), color=np.where(active, "C0", "0.7"))
    axes[-1].axhline(ACTIVE, color="black", linestyle="--", linewidth=1)
    axes[-1].set(yscale="log", ylabel="variance of\nthe posterior mean")
    named = len(order) <= _NAMED
    axes[-1].set_xticks(place if named else [], names[order] if named else [], rotation=90)
    axes[-1].set_xlabel("latents, largest first; gray: not active (below the line)")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    last = result.statistics[-1]
    count = f"{last['active']} of {last['coordinates']} coordinates active"
    more = f", {len(order)} shown" if len(order) < len(names) else ""
    figure.suptitle(
        f"Use of the latents: {result.verdict} (family-wise error rate {result.error_rate:.2g})\n"
        f"{count}{more}; {result.settings['rows']} held-out rows ({result.settings['split']})",
        fontsize=11,
    )
    return figure


def sensitivity(result: CheckResult) -> Figure:
    """KL of each site, and the nats lost when rows exchange their draws of it."""
    records = [record for record in result.statistics if record["site"] != "all"]
    figure = empty(8.4, 1.4 + 0.35 * len(records))
    left, right = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(records))[::-1]
    color = ["C3" if record["verdict"] == "fail" else "C0" for record in records]
    for ax, figure_name, label in (
        (left, "kl", "KL, nats per datum (red: collapsed)"),
        (right, "nats_lost", "nats lost per datum when exchanged"),
    ):
        values = [record[figure_name] for record in records]
        error = [1.96 * record[f"{figure_name}_se"] for record in records]
        ax.barh(place, values, xerr=error, color=color, ecolor="0.3", capsize=2)
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    left.axvline(result.settings["tolerance"], color="black", linestyle="--", linewidth=1)
    left.set_yticks(place, [record["site"] for record in records])
    for name, shade in zip(left.get_yticklabels(), color, strict=True):
        name.set_color(shade if shade == "C3" else "black")  # a KL of 0 has no bar
    figure.suptitle(
        f"What depends on each site: {result.settings['rows']} held-out rows "
        f"({result.settings['split']})",
        fontsize=11,
    )
    return figure


def marginals(result: CheckResult) -> Figure:
    """The coordinates whose aggregate posterior is farthest from the prior, with both."""
    group = result.groups["aggregate_posterior"]
    records = [r for r in result.statistics if r["what"] == "coordinate"]
    shown = sorted(records, key=lambda record: -record["kl"])[:6]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = empty(2.9 * columns, 2.3 * lines + 0.9)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, record in zip(axes, shown, strict=False):
        of_prior, of_rows = (
            group[name].sel(coordinate=record["name"]).values for name in ("prior", "aggregate")
        )
        both = np.concatenate([of_prior, of_rows])
        low, high = np.percentile(both, [0.2, 99.8])
        edges = np.linspace(low, high if high > low else low + 1, 30)
        for values, color, label in ((of_prior, "0.6", "prior"), (of_rows, "C0", "aggregate")):
            weights = np.full(len(values), 1 / len(values))
            ax.hist(values, edges, weights=weights, histtype="step", color=color, label=label)
        ax.set_title(f"{record['name']}: KL {record['kl']:.2g} nats", fontsize=9)
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    first = figure.axes[0]
    figure.legend(
        *first.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    record = result.statistics[0]
    figure.suptitle(
        f"Aggregate posterior and prior: {result.verdict} (error rate {result.error_rate:.2g})\n"
        f"told apart with accuracy {record['accuracy']:.3f}",
        fontsize=11,
    )
    return figure
